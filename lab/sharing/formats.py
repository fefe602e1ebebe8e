"""A trained model in the formats of timm, transformers and ONNX.

Each `write_*` function writes its files, loads them back, and returns how their logits compare with
the model's own on real images. It raises NotPossible for a model that the format cannot represent,
and if the packages that it needs are not installed.
"""

import importlib.util
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from lab.core import UserError, checkpoints, runtime
from lab.data import Loaders
from lab.models import Pretrained, load_pretrained, registry
from model import VisionTransformer, ViTConfig

_TOLERANCE = 1e-4  # largest accepted difference of the logits, relative to the largest logit
NUM_COMPARED = 68  # images on which formats are compared, for ONNX in batches of 1, 3 and 64
_State = dict[str, Tensor]


class NotPossible(UserError):
    """A format that cannot hold a model, or a package that is missing; says which."""


@dataclass(frozen=True)
class Comparison:
    """How the logits of a written model compare with the original's on the same images."""

    difference: float  # the largest absolute difference of any logit
    same: int  # images with the same predicted class
    images: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.1e}, same prediction for {self.same} "
            f"of {self.images} images"
        )


class Expected:
    """Normalized images (B, C, S, S), and the logits (B, classes) of the original model."""

    def __init__(self, model: nn.Module, images: Tensor):
        self.images = images
        with torch.no_grad():
            self.logits = model(images)

    @torch.no_grad()
    def compare(self, model: Callable[[Tensor], Tensor], name: str) -> Comparison:
        """Raises: NotPossible, if the reloaded model computes different logits."""
        logits = model(self.images)
        difference = (logits - self.logits).abs().max().item()
        if not difference <= _TOLERANCE * max(1.0, self.logits.abs().max().item()):
            raise NotPossible(
                f"the logits of {name} differ from the model's by up to {difference:.1e}"
            )
        same = (logits.argmax(1) == self.logits.argmax(1)).sum().item()
        return Comparison(difference, same, len(logits))


def write_weights(folder: Path, pretrained: Pretrained) -> None:
    """Writes model.safetensors, and the config.json with which this project loads it.

    `write_timm` adds to config.json what timm and transformers need.
    """
    names, model = pretrained.class_names, pretrained.model
    header = registry.model_header(model, names, pretrained.preprocess)
    config = {
        "library_name": "vit-lab", "num_classes": len(names), "label_names": names,
        "vit_lab": header,
    }  # fmt: skip
    checkpoints.write_json(folder / "config.json", config)
    _save(folder / "model.safetensors", model.state_dict())


def _save(path: Path, state: _State) -> None:
    state = {name: value.contiguous() for name, value in state.items()}
    metadata = {"format": "pt"}  # which transformers requires
    checkpoints.write_atomically(path, lambda scratch: save_file(state, scratch, metadata))


def remove(folder: Path, name: str) -> None:
    """Removes what the writer of a format has written before it raised NotPossible."""
    if name == "transformers":
        shutil.rmtree(folder / "transformers", ignore_errors=True)
    elif name == "onnx":
        (folder / "model.onnx").unlink(missing_ok=True)


# --- timm ---


def write_timm(folder: Path, pretrained: Pretrained, expected: Expected) -> Comparison:
    """Adds to config.json what timm and, if timm is installed, transformers load the model with.

    The folder contains config.json and model.safetensors.
    """
    import timm

    before = checkpoints.read_json(folder / "config.json")
    config = {**before, "library_name": "timm", **_timm_config(pretrained)}
    checkpoints.write_json(folder / "config.json", config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
        return expected.compare(model, "timm")
    except Exception as error:  # timm raises many kinds
        checkpoints.write_json(folder / "config.json", before)
        if isinstance(error, NotPossible):
            raise
        reason = runtime.first_line(error)
        raise NotPossible(f"timm cannot load this model: {reason}") from error


def _timm_config(pretrained: Pretrained) -> dict[str, Any]:
    """What timm reads in config.json. Raises: NotPossible, for our CNN."""
    import timm

    model, preprocess, names = pretrained.model, pretrained.preprocess, pretrained.class_names
    config = model.config
    if isinstance(config, ViTConfig):
        architecture, arguments = "vit_tiny_patch16_224", _timm_arguments(config)
        num_features, pool = config.embed_dim, config.global_pool
    elif isinstance(config, registry.TimmConfig):
        architecture = config.architecture
        arguments = {k: v for k, v in config.arguments.items() if k != "num_classes"}
        num_features, pool = model.num_features, getattr(model, "global_pool", "avg")
    else:
        raise NotPossible(
            f"timm has no architecture for a {type(model).__name__}; use ONNX or this project"
        )
    known = timm.get_pretrained_cfg(architecture).to_dict()
    channels, size = len(preprocess.mean), preprocess.img_size
    return {
        "architecture": architecture,
        "num_features": num_features,
        "global_pool": pool if isinstance(pool, str) else "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "vit_lab",
            "custom_load": False,
            "input_size": [channels, size, size],
            "fixed_input_size": known.get("fixed_input_size", False),
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct,
            "crop_mode": "center",
            "mean": preprocess.mean,
            "std": preprocess.std,
            "num_classes": len(names),
            # timm converts the first layer of color models to other channels, but no others.
            "first_conv": known.get("first_conv") if channels == 3 else None,
            "classifier": known.get("classifier"),
        },
    }


def _timm_arguments(config: ViTConfig) -> dict[str, Any]:
    """A config of model.py as arguments of timm's VisionTransformer."""
    names = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio",
             "qkv_bias", "init_values", "global_pool", "class_token", "no_embed_class",
             "dynamic_img_size")  # fmt: skip
    default = ViTConfig()
    shape = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    values = {name: getattr(config, name) for name in names}
    return {k: v for k, v in values.items() if k in shape or v != getattr(default, k)}


# --- transformers ---


def write_transformers(folder: Path, pretrained: Pretrained, expected: Expected) -> Comparison:
    """Writes a ViT as a ViTForImageClassification of transformers, which then needs no timm.

    The files go to `folder`/transformers. They are compared as this project loads them.
    """
    config, model = pretrained.model.config, pretrained.model
    if not isinstance(model, VisionTransformer):
        raise NotPossible(
            "without timm, transformers can only load plain ViTs, and this is a "
            f"{type(model).__name__}"
        )
    if config.global_pool != "token":
        raise NotPossible(
            "without timm, transformers can only load ViTs that classify by their class token, and "
            "this ViT averages its patches"
        )
    from lab.models import conversion  # loads timm

    place = folder / "transformers"
    place.mkdir(exist_ok=True)
    names, preprocess = pretrained.class_names, pretrained.preprocess
    state = conversion.to_transformers(model.state_dict(), config)
    _save(place / "model.safetensors", state)
    content = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": config.qkv_bias,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    checkpoints.write_json(place / "config.json", content)
    processor = {  # ViTImageProcessor would squash images that are not square
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": len(preprocess.mean) == 3,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.resized},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": preprocess.img_size, "width": preprocess.img_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
    }
    checkpoints.write_json(place / "preprocessor_config.json", processor)
    return expected.compare(load_pretrained(str(place)).model, "transformers")


# --- ONNX ---


def write_onnx(folder: Path, pretrained: Pretrained, expected: Expected) -> Comparison:
    """Writes model.onnx: normalized images (batch, C, S, S) to logits, for batches of any size."""
    _require("onnx", "onnxscript", "onnxruntime")
    path, model = folder / "model.onnx", pretrained.model
    example = expected.images[:2]  # torch.export would fix a batch size of 1
    try:
        with _silent():
            program = torch.onnx.export(
                model, (example,), dynamo=True, external_data=False, verbose=False,
                input_names=["images"], output_names=["logits"], dynamic_shapes=({0: "batch"},),
            )  # fmt: skip
    except Exception as error:  # the exporter raises many kinds
        reason = runtime.first_line(error)
        raise NotPossible(f"torch.onnx cannot export this model: {reason}") from error
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program.model)  # local paths and source code
    program.model.metadata_props.update(
        classes=json.dumps(pretrained.class_names),
        mean=json.dumps(pretrained.preprocess.mean),
        std=json.dumps(pretrained.preprocess.std),
    )
    checkpoints.write_atomically(path, lambda scratch: program.save(scratch, external_data=False))
    predict = _onnx_model(path)

    def predict_in_batches(images: Tensor) -> Tensor:
        batches = images.tensor_split((1, 4))  # of 1, 3 and the rest
        return torch.cat([predict(batch) for batch in batches if len(batch)])

    return expected.compare(predict_in_batches, "ONNX")


def write_int8(folder: Path, loaders: Loaders) -> str:
    """Writes model-int8.onnx, whose linear layers are int8, and measures what that costs.

    Its activations are quantized with the range of a whole batch, so its predictions depend on the
    batch. They are measured for single images.

    Args:
        folder: contains model.onnx.
        loaders: of the dataset that the model was trained on; its whole test split is predicted.

    Returns: the test accuracy, and that of model.onnx.
    """
    source, path = folder / "model.onnx", folder / "model-int8.onnx"
    if not source.exists():
        raise NotPossible("int8 is made from model.onnx, which could not be written")
    with _silent():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            source, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8,
            per_channel=True,
        )  # fmt: skip
    quantized, original = _onnx_model(path), _onnx_model(source)
    correct = [0, 0]
    total = len(loaders.data.test)
    with tqdm(total=total, desc="int8", unit=" images", leave=False, disable=None) as bar:
        for _, images, labels in loaders.evaluation("test"):
            singly = torch.cat([quantized(image) for image in images.split(1)])
            for i, logits in enumerate((singly, original(images))):
                correct[i] += (logits.argmax(1) == labels).sum().item()
            bar.update(len(labels))
    int8, fp32 = (f"{100 * count / total:.2f} %" for count in correct)
    return f"`model-int8.onnx` has a test accuracy of {int8}, `model.onnx` of {fp32}"


def _onnx_model(path: Path) -> Callable[[Tensor], Tensor]:
    """Images (B, C, S, S) to logits (B, classes), by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise NotPossible(f"{names} not installed; to get it: pip install {names}")


@contextmanager
def _silent() -> Iterator[None]:
    """Suppresses what exporters print about their own progress; errors still raise."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
