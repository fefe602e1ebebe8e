"""The ViT of model.py in other libraries, and how this project and each library train it.

`benchmarks.startup` measures imports, so this module imports only model.py; the functions import
the rest.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset

from model import ViTConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How every library trains: AdamW, with a linear warm-up and a cosine decay."""

    epochs: int
    steps: int  # per epoch
    batch_size: int
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup_fraction: float = 0.05  # of all steps
    clip_grad: float = 1.0
    precision: str = "fp32"  # a name in DTYPES
    workers: int = 0  # processes of a DataLoader

    @property
    def warmup_steps(self) -> int:
        return int(self.warmup_fraction * self.epochs * self.steps)


class Images(TorchDataset):
    """Images (N, C, H, W) uint8, given one by one as Pillow images to a transform."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable | None = None):
        self.images, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform, self.mode = transform, "RGB"  # the other libraries expect three channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[i].squeeze()).convert(self.mode)
        return self.transform(image), self.labels[i]


def synthetic_data(count: int, size: int, classes: int = 10) -> Any:
    """A Dataset of random images (count, 3, size, size) and labels, the same in all splits."""
    from lab.data import Dataset, datasets

    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=rng, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=rng)
    split = datasets.full_split(images, labels, [str(i) for i in range(count)])
    names = [str(i) for i in range(classes)]
    return Dataset("synthetic", names, split, split, split, [0.5] * 3, [0.5] * 3, [])


# --- How a library trains ---


def plain_step(
    model: nn.Module, images: Tensor, labels: Tensor, precision: str
) -> Callable[[], object]:
    """A training step of any library's model on one batch: forward, backward, fused AdamW."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)
    device, dtype = images.device.type, DTYPES[precision]
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=precision != "fp32"):
            out = model(images)
            loss = F.cross_entropy(getattr(out, "logits", out), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def our_epoch(
    model: nn.Module, loaders: Any, recipe: Recipe, compiled: bool = False
) -> Callable[[], None]:
    """An epoch of `lab.training.loop`; it writes nothing and can be repeated."""
    from lab.core import Run
    from lab.training import FitConfig, loop, optimizers
    from lab.training.state import TrainState

    config = FitConfig(
        recipe.epochs, recipe.warmup_fraction, clip_grad=recipe.clip_grad,
        precision=recipe.precision, compile=compiled, trial=True,
    )  # fmt: skip
    optimizer = optimizers.adamw(model, recipe.learning_rate, recipe.weight_decay)
    trainer = loop.Trainer(model, optimizer, loaders, config, Run(Path()))

    def epoch() -> None:
        trainer.state = TrainState()
        loop.train_one_epoch(trainer)

    return epoch


def timm_epoch(model: nn.Module, batches: Iterable, recipe: Recipe) -> Callable[[], None]:
    """An epoch of timm's training, which can be repeated.

    It has the parts of timm's train.py, which is not in the package, in the same order.

    Args:
        model: timm's, on the device; frozen parameters stay frozen.
        batches: timm's loader, which moves batches to the device.
    """
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import NativeScaler

    device = next(model.parameters()).device.type
    optimizer = create_optimizer_v2(model, "adamw", recipe.learning_rate, recipe.weight_decay)
    scheduler = CosineLRScheduler(
        optimizer, recipe.epochs * recipe.steps, warmup_t=recipe.warmup_steps, t_in_epochs=False
    )
    scaler = NativeScaler(device) if recipe.precision == "fp16" else None
    done = 0

    def epoch() -> None:
        nonlocal done
        model.train()
        for images, labels in batches:
            with torch.autocast(device, DTYPES[recipe.precision], recipe.precision != "fp32"):
                loss = F.cross_entropy(model(images), labels)
            if scaler:
                scaler(loss, optimizer, recipe.clip_grad or None, parameters=model.parameters())
            else:
                loss.backward()
                if recipe.clip_grad:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
                optimizer.step()
            optimizer.zero_grad()
            done += 1
            scheduler.step_update(done)

    return epoch


def transformers_trainer(
    model: nn.Module, images: Images, recipe: Recipe, folder: str, callbacks: tuple = ()
) -> Any:
    """transformers' Trainer, which neither reports, saves nor validates; `folder` stays empty."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder, num_train_epochs=recipe.epochs, per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay,
        bf16=recipe.precision == "bf16", fp16=recipe.precision == "fp16",
        warmup_steps=recipe.warmup_steps, lr_scheduler_type="cosine",
        max_grad_norm=recipe.clip_grad, use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=recipe.workers, dataloader_persistent_workers=recipe.workers > 0,
        dataloader_drop_last=True, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    _ = arguments.device  # which counts the GPUs
    arguments._n_gpu = min(arguments._n_gpu, 1)  # without a launcher, the others use one as well
    trainer = Trainer(model, arguments, _collate, images, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _collate(pairs: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """A batch with the names that transformers' models expect."""
    images, labels = zip(*pairs, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


# --- The same model ---


def timm_model(config: ViTConfig, state: dict[str, Tensor] | None = None) -> nn.Module:
    """The same model in timm, whose parameters have the same names."""
    from timm.models import VisionTransformer

    arguments = asdict(config)
    norm = partial(nn.LayerNorm, eps=arguments.pop("norm_eps"))
    model = VisionTransformer(**arguments, norm_layer=norm)
    if state:
        model.load_state_dict(state)
    return model


def transformers_model(config: ViTConfig, state: dict[str, Tensor] | None = None) -> nn.Module:
    """The same model in transformers."""
    from transformers import ViTConfig as Config
    from transformers import ViTForImageClassification

    arguments = Config(
        image_size=config.img_size, patch_size=config.patch_size, num_channels=config.in_chans,
        hidden_size=config.embed_dim, num_hidden_layers=config.depth, num_labels=config.num_classes,
        num_attention_heads=config.num_heads, qkv_bias=config.qkv_bias,
        intermediate_size=int(config.embed_dim * config.mlp_ratio), layer_norm_eps=config.norm_eps,
    )  # fmt: skip
    if not state:
        return ViTForImageClassification(arguments)
    from lab.models.conversion import to_transformers

    state = to_transformers(state, config)
    return ViTForImageClassification.from_pretrained(None, config=arguments, state_dict=state)


def torchvision_model(config: ViTConfig, _: dict[str, Tensor] | None = None) -> nn.Module:
    """The same model in torchvision, with random weights."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        config.img_size, config.patch_size, config.depth, config.num_heads, config.embed_dim,
        int(config.embed_dim * config.mlp_ratio), num_classes=config.num_classes,
    )  # fmt: skip


def vit_pytorch_model(config: ViTConfig, _: dict[str, Tensor] | None = None) -> nn.Module:
    """Nearly the same model in vit-pytorch, with random weights; see `extra_parameters`."""
    from vit_pytorch import ViT

    return ViT(
        image_size=config.img_size, patch_size=config.patch_size, num_classes=config.num_classes,
        dim=config.embed_dim, depth=config.depth, heads=config.num_heads,
        mlp_dim=int(config.embed_dim * config.mlp_ratio),
        dim_head=config.embed_dim // config.num_heads,
    )  # fmt: skip


MODELS = {"timm": timm_model, "transformers": transformers_model,
          "torchvision": torchvision_model, "vit-pytorch": vit_pytorch_model}  # fmt: skip


def extra_parameters(config: ViTConfig, library: str) -> int:
    """The number of parameters that a library's model has beyond ours.

    vit-pytorch has norms before and after the patch projection, and no bias in its qkv layers.
    """
    if library != "vit-pytorch":
        return 0
    patch = config.in_chans * config.patch_size**2
    return 2 * patch + 2 * config.embed_dim - config.depth * 3 * config.embed_dim
