"""Builds models by name, and rebuilds them from the header of their weights.

A header comes from a file, which may be untrusted. Its values are checked before a model is
built from them: see `_check_arguments` and `build_and_load`.
"""

import math
import re
import warnings
from ast import literal_eval
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter

from lab.core import Run, UserError, checkpoints, machine
from lab.data import Preprocess
from lab.models.cnn import CNNConfig, ResidualCNN
from lab.models.lora import merged_state
from model import ConfigError, VisionTransformer, ViTConfig

if _counter := getattr(flop_counter, "_FlopCounterMode", None):  # private: not in every version
    machine.avoid_dynamo_import(_counter.__torch_dispatch__)
_ROOT = Path(__file__).resolve().parents[2]
OURS = {  # by the name in a header
    "VisionTransformer": (VisionTransformer, ViTConfig),
    "ResidualCNN": (ResidualCNN, CNNConfig),
}

# Only arguments of timm models that describe a shape may be set. Any other could have
# a side effect; `checkpoint_path`, for one, makes timm unpickle another file.
_COUNTS = {  # the maximum of an argument that is a whole number, or a list of them
    "img_size": 4096, "num_classes": 1_000_000, "depth": 1000, "depths": 1000, "layers": 1000,
    "blocks": 1000,
    **dict.fromkeys(
        ("patch_size", "in_chans", "embed_dim", "embed_dims", "num_heads", "reg_tokens",
         "window_size", "dims", "channels", "widths", "heads", "head_dim", "head_hidden_size",
         "kernel_size", "kernel_sizes", "output_stride", "stem_width", "stem_stride", "base_width",
         "cardinality", "num_features"),
        16_384,
    ),
}  # fmt: skip
_NUMBERS = (
    "mlp_ratio", "mlp_ratios", "expand_ratio", "attn_ratio", "init_values", "ls_init_value",
    "layer_scale_init_value", "head_init_scale", "norm_eps", "drop_rate", "pos_drop_rate",
    "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
)  # fmt: skip
_FLAGS = (
    "qkv_bias", "qk_norm", "proj_bias", "conv_bias", "class_token", "no_embed_class", "pre_norm",
    "final_norm", "fc_norm", "pool_include_prefix", "head_norm_first", "dynamic_img_size",
    "dynamic_img_pad", "strict_img_size", "always_partition", "scale_attn_norm", "scale_mlp_norm",
)  # fmt: skip
_WORDS = ("global_pool", "pos_embed", "act_layer", "norm_layer", "stem_type", "stem_act")


@dataclass(frozen=True)
class TimmConfig:
    """Everything needed to rebuild a timm model: architecture and arguments of `timm.create_model`.

    Raises UserError for an argument that does not describe a shape, or is not sane.
    """

    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or not isinstance(self.arguments, dict):
            raise UserError(
                f"{self.architecture!r} with {self.arguments!r} is not the name of a timm "
                "architecture and its arguments"
            )
        _check_arguments(self.arguments, self.architecture)

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments as timm expects them: with tuples, which JSON does not have."""
        return {k: tuple(v) if isinstance(v, list) else v for k, v in self.arguments.items()}

    @classmethod
    def parse(cls, architecture: str, img_size: int, text: str, **arguments: Any) -> "TimmConfig":
        """Reads MODEL_ARGS such as "embed_dim=48 depths=(2,2,2)"; they override `arguments`.

        Raises: UserError, if timm does not have the architecture, or the text cannot be read.
        """
        import timm

        if not timm.is_model(architecture):
            raise UserError(unknown_architecture(architecture))
        if timm.get_pretrained_cfg(architecture).fixed_input_size:
            arguments["img_size"] = img_size
        try:
            pairs = [word.split("=", 1) for word in text.split()]
            given = {name: literal_eval(value) for name, value in pairs}
        except (ValueError, SyntaxError) as error:
            raise UserError(
                f"MODEL_ARGS={text!r} must be pairs such as embed_dim=48 depths=(2,2,2), without "
                "spaces inside a pair"
            ) from error
        return cls(architecture, {**arguments, **given})


def _check_arguments(arguments: dict[str, Any], owner: str) -> None:
    """Checks names, types and sizes of a model's arguments, which may come from an untrusted file.

    Raises: UserError, for an argument that does not describe a shape, has the wrong type, or is
        implausibly large.
    """
    for name, value in arguments.items():
        if not (expected := _expected(name)):
            raise UserError(
                f"{owner}: the argument {str(name)[:80]!r} is refused, because it does not "
                "describe the shape of a model"
            )
        if value is not None and not _is_sane(name, value):
            raise UserError(f"{owner}: {name}={str(value)[:80]} must be {expected}")


def _expected(name: Any) -> str:
    """What an argument's value must be, in words; empty for an argument that is not accepted."""
    if name in _COUNTS:
        return f"a whole number between 0 and {_COUNTS[name]:,}, or a list of them"
    kinds = ((_NUMBERS, "a number"), (_FLAGS, "true or false"), (_WORDS, "a word"))
    return next((expected for names, expected in kinds if name in names), "")


def _is_sane(name: str, value: Any) -> bool:
    if name in _FLAGS:
        return isinstance(value, bool)
    if name in _WORDS:
        return isinstance(value, str) and re.fullmatch(r"\w{0,40}", value) is not None
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) > 64:
        return False
    if name in _COUNTS:
        return all(type(v) is int and 0 <= v <= _COUNTS[name] for v in values)
    return all(type(v) in (int, float) and math.isfinite(v) and abs(v) <= 1e4 for v in values)


def build_timm_model(config: TimmConfig) -> nn.Module:
    """A timm model with random weights; its attribute `config` says what it is.

    Raises: UserError, for an architecture or arguments that timm does not know.
    """
    import timm

    if not timm.is_model(config.architecture):
        raise UserError(unknown_architecture(config.architecture))
    try:
        model = timm.create_model(config.architecture, pretrained=False, **config.keywords)
    except (TypeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"timm cannot build {config.architecture} with {config.arguments}: {error}"
        ) from error
    model.config = config
    return model


def unknown_architecture(name: str) -> str:
    """An error message for a name that timm does not know, with similar names that it does."""
    import difflib

    import timm

    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
    hint = f". Did you mean {', '.join(close)}?" if close else "."
    return f"timm has no model {name!r}{hint} timm.list_models() lists all names"


def build(config: ViTConfig | CNNConfig | TimmConfig) -> nn.Module:
    """A model with random weights."""
    if isinstance(config, TimmConfig):
        return build_timm_model(config)
    return next(model for model, kind in OURS.values() if isinstance(config, kind))(config)


def meta_model(config: ViTConfig | CNNConfig | TimmConfig) -> nn.Module:
    """A model without memory for its weights, if its code allows that."""
    try:
        with torch.device("meta"):
            return build(config)
    except RuntimeError:
        return build(config)


def classifier(model: nn.Module) -> nn.Module:
    """The output layer, without the norm before it; a distilled DeiT has two of them."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else model.head
    return nn.ModuleList(head) if isinstance(head, tuple) else head


@torch.no_grad()
def pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """The input of the output layer: images (B, C, H, W) to features (B, D)."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


def profile_model(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Counts a model's parameters, and its operations in matrix products and convolutions.

    Args:
        model: on the CPU.
        image_shape: (C, H, W) of one image, or (D,) for a head that reads features.

    Returns: `class`, `parameters` and `trainable_parameters`; `macs`, the multiply-adds of one
        image's forward pass; `training_flops`, the operations of its forward and backward pass.
    """
    image = torch.zeros(1, *image_shape)
    was_training = model.training
    model.eval()  # this image must not change the statistics of a batch norm
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels recompute products, which would count twice
        with flop_counter.FlopCounterMode(display=False) as forward, torch.no_grad():
            model(image)
        with flop_counter.FlopCounterMode(display=False) as training:
            model(image).sum().backward()
    model.zero_grad()
    model.train(was_training)
    parameters = list(model.parameters())
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "macs": forward.get_total_flops() // 2,
        "training_flops": training.get_total_flops(),
    }


def find_path(source: str) -> Path | None:
    """The local file or folder that `source` refers to, or None.

    It may be relative to the working directory or to this project, which has its own weights.
    """
    try:
        path = Path(source).expanduser()
        return next((found for found in (path, _ROOT / path) if found.exists()), None)
    except (OSError, RuntimeError, ValueError):  # too long, a user that does not exist, a NUL
        return None


def short_name(source: str) -> str:
    """A short name of the weights, for the name of a run."""
    path = find_path(source)
    if path and path.is_dir():
        return path.resolve().name
    return Path(source).stem if path or "/" in source else source.split(".")[0]


def folder_of(source: str) -> Path | None:
    """The folder that `source` refers to, or that contains its file; None if there is none."""
    path = find_path(source)
    return path.parent if path and path.is_file() else path


def recorded_constants(source: str) -> dict[str, Any]:
    """The constants of a run, given its folder or a file in it; {} for other weights."""
    folder = folder_of(source)
    try:
        constants = Run(folder).config()["constants"] if folder else {}
    except (UserError, KeyError, TypeError):
        return {}
    return constants if isinstance(constants, dict) else {}


# --- Headers ---


def model_header(model: nn.Module, classes: list[str], preprocess: Preprocess) -> dict[str, Any]:
    """The header of a model's weights: what is needed to rebuild the model and to predict."""
    config = getattr(model, "config", None)  # a linear probe has none
    return {
        "model": "timm" if isinstance(config, TimmConfig) else type(model).__name__,
        "config": asdict(config) if config else {},
        "classes": classes,
        "preprocess": asdict(preprocess),
    }


def save_model(
    path: Path, model: nn.Module, classes: list[str], preprocess: Preprocess, row: dict[str, Any]
) -> None:
    """Writes a model as it was after the epoch of a row of history.csv; `load_model` reads it."""
    scores = {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"]}
    checkpoints.save_weights(
        path, merged_state(model), {**model_header(model, classes, preprocess), **scores}
    )


def config_from_header(header: Any, origin: Path | str) -> ViTConfig | CNNConfig | TimmConfig:
    """The config in the header of a file that this project wrote.

    Raises: UserError, for a header that lacks an entry, or an invalid config.
    """
    wanted = ("model", "config", "classes", "preprocess")
    if not isinstance(header, dict):
        raise UserError(f"{origin} has a damaged header: it is not a JSON object")
    if missing := [name for name in wanted if name not in header]:
        raise UserError(
            f"{origin} comes from an earlier version of this lab: its header lacks "
            f"{', '.join(missing)}. Train it again with --overwrite"
        )
    model, values, classes, preprocess = (header[name] for name in wanted)
    types = ((model, str), (values, dict), (classes, list), (preprocess, dict))
    if not all(isinstance(value, kind) for value, kind in types) or not all(
        isinstance(name, str) for name in classes
    ):
        raise UserError(f"{origin} has a damaged header: an entry has the wrong type")
    try:
        if model == "timm":
            return TimmConfig(**values)
        if model not in OURS:
            raise UserError(f"it contains a {str(model)[:80]}, which this project cannot load")
        known = {name: value for name, value in values.items() if _expected(name)}
        _check_arguments(known, str(model))
        return OURS[model][1](**values)
    except (UserError, ConfigError) as error:
        raise UserError(f"{origin}: {error}") from error
    except TypeError as error:  # the config has different fields
        raise UserError(_architecture_changed(origin, model, str(error))) from error


def build_and_load(
    config: ViTConfig | CNNConfig | TimmConfig, state: dict[str, Tensor], origin: Path | str
) -> nn.Module:
    """Builds a model and loads its weights strictly.

    They are compared before memory is allocated, so a config cannot ask for more than its weights
    have.

    Raises: UserError, for weights that do not match, or are not finite.
    """
    state = {name: value.float() for name, value in state.items()}
    meta = meta_model(config)
    buffers = {name for name, _ in meta.named_buffers()}
    may_be_infinite = {name for name in buffers & state.keys() if not state[name].isnan().any()}
    check_finite({n: value for n, value in state.items() if n not in may_be_infinite}, origin)
    try:
        with warnings.catch_warnings():  # loading weights into a meta model does nothing
            warnings.simplefilter("ignore")
            checkpoints.load_strict(meta, state, origin)
    except UserError as error:
        if isinstance(config, TimmConfig):
            raise
        kind = type(config).__name__.removesuffix("Config")
        raise UserError(_architecture_changed(origin, kind, str(error))) from error
    model = build(config)
    checkpoints.load_strict(model, state, origin)
    return model


def check_finite(state: dict[str, Tensor], origin: Path | str) -> None:
    """Raises UserError for weights that contain NaN or infinity."""
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(
            f"{origin} has NaN or infinite values in {len(bad)} tensors, such as {bad[0]}: its "
            "training diverged or the file is damaged"
        )


def _architecture_changed(origin: Path | str, model: str, reason: str) -> str:
    file, hint = "lab/models/cnn.py", ""
    if "CNN" not in model:
        file = "model.py"
        hint = (
            "Weights from elsewhere need timm's parameter names: patch_embed.proj (a Conv2d), and "
            "qkv and proj in each attention layer. "
        )
    return (
        f"{origin} does not match the model in {file}: {reason}\nIf you have changed {file} since "
        "these weights were saved, undo the change to load them, or train new weights. "
        f"{hint}Otherwise the file is damaged."
    )
