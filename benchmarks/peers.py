"""The ViT of model.py in other libraries, and timm's and transformers' way to train it."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset

from lab.models.conversion import from_transformers
from model import ViTConfig


@dataclass(frozen=True)
class Recipe:
    """How all of them train: AdamW, a linear warm-up, then a cosine, rates set at every step."""

    epochs: int
    steps: int  # of an epoch
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float  # share of the run
    clip_grad: float
    bf16: bool
    workers: int  # of a DataLoader

    @property
    def warmup_steps(self) -> int:
        return int(self.warmup * self.epochs * self.steps)


class Pictures(TorchDataset):
    """Images (N, C, H, W) uint8 one by one, as Pillow's, through a transform: the usual way."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable | None = None):
        self.images, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[i].squeeze()).convert("RGB")  # gray has one channel
        return self.transform(image), self.labels[i]


def usual_step(
    model: nn.Module, images: Tensor, labels: Tensor, bf16: bool
) -> Callable[[], object]:
    """A training step of any library's model, on a batch that stays where it is."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            out = model(images)
            loss = F.cross_entropy(getattr(out, "logits", out), labels)
        loss.backward()
        optimizer.step()

    return step


def timm_training(model: nn.Module, batches: Any, recipe: Recipe) -> Callable[[], None]:
    """An epoch of timm's training, to be called again and again.

    Its parts in the order of its train.py, which the wheel has not.

    Args:
        model: of timm's, on the device; what is frozen stays so.
        batches: timm's loader, which brings them to the device.
    """
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import dispatch_clip_grad

    device = next(model.parameters()).device.type
    optimizer = create_optimizer_v2(model, "adamw", recipe.learning_rate, recipe.weight_decay)
    scheduler = CosineLRScheduler(
        optimizer, recipe.epochs * recipe.steps, warmup_t=recipe.warmup_steps, t_in_epochs=False
    )
    done = 0

    def epoch() -> None:
        nonlocal done
        model.train()
        for images, labels in batches:
            with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            if recipe.clip_grad:
                dispatch_clip_grad(model.parameters(), recipe.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            scheduler.step_update(done)

    return epoch


def collate(pairs: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """A batch in the words of transformers."""
    images, labels = zip(*pairs, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def transformers_trainer(
    model: nn.Module, pictures: Pictures, recipe: Recipe, folder: str, callbacks: tuple = ()
) -> Any:
    """Their Trainer, which reports, saves and validates nothing; `folder` stays empty."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder, num_train_epochs=recipe.epochs, per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay, bf16=recipe.bf16,
        warmup_steps=recipe.warmup_steps, lr_scheduler_type="cosine",
        max_grad_norm=recipe.clip_grad, use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=recipe.workers, dataloader_persistent_workers=recipe.workers > 0,
        dataloader_drop_last=True, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, collate, pictures, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


def in_timm(config: ViTConfig, state: dict[str, Tensor]) -> nn.Module:
    """The same model in timm; the names are the same, so the weights fit as they are."""
    from timm.models import VisionTransformer

    words = asdict(config)
    norm = partial(nn.LayerNorm, eps=words.pop("norm_eps"))
    model = VisionTransformer(**words, norm_layer=norm)
    model.load_state_dict(state)
    return model


def in_transformers(config: ViTConfig, state: dict[str, Tensor] | None = None) -> nn.Module:
    """The same model in transformers, with these weights, or random ones.

    Raises: SystemExit, for a model that transformers' ViT cannot be.
    """
    from transformers import ViTConfig as Config
    from transformers import ViTForImageClassification

    asked = (config.global_pool, config.class_token, config.no_embed_class, config.init_values)
    if asked != ("token", True, False, None):
        raise SystemExit(f"transformers' ViT cannot be {config}: leave it out")
    model = ViTForImageClassification(Config(
        image_size=config.img_size, patch_size=config.patch_size, num_channels=config.in_chans,
        hidden_size=config.embed_dim, num_hidden_layers=config.depth, num_labels=config.num_classes,
        num_attention_heads=config.num_heads, qkv_bias=config.qkv_bias,
        intermediate_size=int(config.embed_dim * config.mlp_ratio), layer_norm_eps=config.norm_eps,
    ))  # fmt: skip
    if state:
        model.load_state_dict(named_as_in_transformers(model, state))
    return model


def in_torchvision(config: ViTConfig, _: dict[str, Tensor] | None = None) -> nn.Module:
    """The same model in torchvision, with random weights."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        config.img_size, config.patch_size, config.depth, config.num_heads, config.embed_dim,
        int(config.embed_dim * config.mlp_ratio), num_classes=config.num_classes,
    )  # fmt: skip


def in_vit_pytorch(config: ViTConfig, _: dict[str, Tensor] | None = None) -> nn.Module:
    """Nearly the same model in vit-pytorch, with random weights; see `parameters_beside`."""
    from vit_pytorch import ViT

    return ViT(
        image_size=config.img_size, patch_size=config.patch_size, num_classes=config.num_classes,
        dim=config.embed_dim, depth=config.depth, heads=config.num_heads,
        mlp_dim=int(config.embed_dim * config.mlp_ratio),
        dim_head=config.embed_dim // config.num_heads,
    )  # fmt: skip


IN = {
    "timm": in_timm, "transformers": in_transformers, "torchvision": in_torchvision,
    "vit-pytorch": in_vit_pytorch,
}  # fmt: skip


def parameters_beside(config: ViTConfig, library: str) -> int:
    """How many parameters more than ours a library's model has.

    vit-pytorch has no bias in its qkv layers, and a norm before and after the patch projection.
    """
    if library != "vit-pytorch":
        return 0
    patch = config.in_chans * config.patch_size**2
    return 2 * patch + 2 * config.embed_dim - config.depth * 3 * config.embed_dim


def named_as_in_transformers(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`from_transformers` backwards, whatever it does: it carries the number of every value."""
    numbers, count = {}, 0
    for name, value in model.state_dict().items():
        numbers[name] = torch.arange(count, count + value.numel()).reshape(value.shape)
        count += value.numel()
    values = torch.empty(count)
    for name, places in from_transformers(numbers, model.config.to_dict())[0].items():
        values[places] = state[name]
    return {name: values[places] for name, places in numbers.items()}


def check_twins(model: nn.Module, names: list[str]) -> None:
    """Raises SystemExit unless the peers give our logits: else they would not do the same work."""
    config, model = model.config, copy.deepcopy(model)
    nn.init.normal_(model.head.weight)
    images = torch.randn(2, config.in_chans, config.img_size, config.img_size)
    for name in {"timm", "transformers"}.intersection(names):  # the others name weights differently
        with torch.no_grad():
            expected, out = model(images), IN[name](config, model.state_dict()).eval()(images)
        if not torch.allclose(getattr(out, "logits", out), expected, rtol=1e-3, atol=1e-3):
            raise SystemExit(f"{name} does not give our logits with our weights")
