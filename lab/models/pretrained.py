"""Pretrained weights as a model that can be trained: a plain ViT in model.py, others in timm."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lab.core import UserError, runtime
from lab.data import Preprocess
from lab.models.cnn import CNNConfig
from lab.models.registry import (
    TimmConfig,
    build,
    build_and_load,
    check_finite,
    classifier,
    meta_model,
    unknown_architecture,
)
from lab.models.sources import Found, find
from model import VisionTransformer, ViTConfig, interpolate_pos_embed

# ImageNet's, as in timm.data.IMAGENET_DEFAULT_MEAN and _STD, which are slow to import.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Pretrained:
    """A model with its pretrained head, and what came with its weights."""

    model: nn.Module  # in eval mode, on the CPU, fp32
    preprocess: Preprocess
    classes: list[str] | None  # names of the head's outputs, if they are known
    origin: str
    remarks: list[str]

    @property
    def num_classes(self) -> int:
        """The number of outputs of the head; 0 without a head."""
        owner = self.model if hasattr(self.model, "num_classes") else self.model.config
        return owner.num_classes

    @property
    def class_names(self) -> list[str]:
        """Names of the head's outputs: its own, ImageNet's, or numbers; [] without a head."""
        if self.classes and len(self.classes) == self.num_classes:
            return self.classes
        if not self.num_classes:
            return []
        from timm.data import ImageNetInfo, infer_imagenet_subset

        if subset := infer_imagenet_subset({"num_classes": self.num_classes}):
            info = ImageNetInfo(subset)
            return [info.index_to_description(i) for i in range(self.num_classes)]
        return [f"class {i}" for i in range(self.num_classes)]

    def fingerprint(self) -> str:
        """A hash of the weights' values, for a run's identity."""
        digest = hashlib.blake2b(digest_size=8)
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.contiguous().numpy())
        return digest.hexdigest()

    def reset_classifier(self, classes: list[str]) -> str:
        """Gives the model a new, zero-initialized head for these classes.

        A head that was trained for the same classes is kept.

        Returns: a sentence that says what was done.
        Raises: UserError, for our CNN.
        """
        model, config = self.model, self.model.config
        is_timm = isinstance(config, TimmConfig)
        if not is_timm and not isinstance(model, VisionTransformer):
            raise UserError(
                f"{self.origin} contains a {type(model).__name__}, which cannot be fine-tuned: use "
                "weights of a ViT or of a timm model"
            )
        old = self.num_classes
        if self.classes == classes and old == len(classes):
            return f"the head of {self.origin} is kept: it was trained for these {old} classes"
        if is_timm:
            model.reset_classifier(len(classes))
            arguments = {**config.arguments, "num_classes": len(classes)}
            model.config = TimmConfig(config.architecture, arguments)
        else:
            model.head = nn.Linear(config.embed_dim, len(classes))
            model.config = replace(config, num_classes=len(classes))
        head = set(classifier(model).parameters())
        for parameter in head:
            nn.init.zeros_(parameter)
        names = ", ".join(name for name, value in model.named_parameters() if value in head)
        reason = f"replaces the pretrained head ({old} outputs)"
        if not old:
            reason = "is added, because the weights have no head"
        return f"a new head for {len(classes)} classes ({names}) {reason}"

    def reinitialized(self) -> nn.Module:
        """The same architecture with random weights, to measure what pretraining contributes."""
        return build(self.model.config)


def load_model(source: str | Path) -> tuple[nn.Module, Preprocess, list[str]]:
    """Loads a trained model to classify images with.

    Args:
        source: a run's folder, wherever it is and whatever it is called now; a file; a folder
            written by share.py; a timm name; or a Hugging Face repository, `owner/name` or
            `owner/name@revision`.

    Returns: the model in eval mode, on the CPU; its preprocessing, which turns an image or the path
        of one into a normalized tensor (C, H, W); and the names of its classes.
    Raises: UserError, for a model that cannot be found, read or used.
    """
    pretrained = load_pretrained(str(source))
    return pretrained.model, pretrained.preprocess, pretrained.class_names


def load_pretrained(
    source: str, img_size: int | None = None, drop_path_rate: float = 0.0, plain_only: bool = False
) -> Pretrained:
    """Loads pretrained weights, strictly.

    Args:
        source: a timm name, a Hugging Face repository, a file, a folder, or a run.
        img_size: side of the images in pixels; position embeddings are interpolated to it. None:
            the size that the weights were trained at.
        drop_path_rate: for training.
        plain_only: refuse a ViT that model.py does not cover, instead of using timm's.

    Raises: UserError, for weights that cannot be found, read or used.
    """
    try:
        found = find(source)
        if isinstance(found.config, TimmConfig):
            return _load_timm(found, found.config, img_size, drop_path_rate, plain_only)
        if isinstance(found.config, CNNConfig):
            return _load_cnn(found, found.config, img_size, plain_only)
        return _load_vit(found, found.config, img_size, drop_path_rate)
    except UserError as error:
        if source in str(error):
            raise
        raise UserError(f"the weights {source!r}: {error}") from error


def _load_vit(
    found: Found, config: ViTConfig, img_size: int | None, drop_path_rate: float
) -> Pretrained:
    """Loads a plain ViT into model.py, with its pretrained head if the weights have one."""
    config = replace(config, drop_path_rate=drop_path_rate)
    model = build_and_load(config, found.state, found.origin)
    size = img_size or config.img_size
    if size != config.img_size:
        state = model.state_dict()
        config = replace(config, img_size=size)
        prefix = int(config.class_token and not config.no_embed_class)
        grid_size = size // config.patch_size
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], grid_size, prefix)
        model = VisionTransformer(config)
        model.load_state_dict(state)
    return _pretrained(found, model, size, config.in_chans)


def _load_cnn(
    found: Found, config: CNNConfig, img_size: int | None, plain_only: bool
) -> Pretrained:
    """Our CNN, for evaluation only; it accepts images of any size."""
    if plain_only:
        raise UserError(f"{found.origin} is a CNN, which finetune.py does not train; use a ViT")
    model = build_and_load(config, found.state, found.origin)
    return _pretrained(found, model, img_size or _native_size(found, 224), config.in_chans)


def _pretrained(found: Found, model: nn.Module, img_size: int, in_chans: int) -> Pretrained:
    preprocess = _preprocess(found, img_size, in_chans)
    return Pretrained(model.eval(), preprocess, found.classes, found.origin, found.remarks)


def _load_timm(
    found: Found, config: TimmConfig, img_size: int | None, drop_path_rate: float, plain_only: bool
) -> Pretrained:
    """Loads a timm architecture's weights into model.py if it is equivalent, else into timm's."""
    import timm

    from lab.models.conversion import config_of, is_vit, unsupported_features

    if not timm.is_model(config.architecture):
        raise UserError(unknown_architecture(config.architecture))
    found.state = {name: value.float() for name, value in found.state.items()}
    check_finite(found.state, found.origin)
    cfg = timm.get_pretrained_cfg(config.architecture)
    arguments = {**config.arguments, "num_classes": _num_outputs(found, cfg.classifier)}
    model = meta_model(TimmConfig(config.architecture, arguments))
    if config.arguments:  # which come from a file
        _check_size(model, found)
    gaps = unsupported_features(model) if is_vit(model) else []
    if plain_only and gaps:
        raise UserError(
            f"{found.origin} is a ViT that model.py does not cover: it has {', '.join(gaps)}. "
            f"finetune_swin.py trains any timm model: --model {found.origin}"
        )
    if is_vit(model) and not gaps:
        if found.state.keys() - model.state_dict().keys():  # the authors' names, not timm's
            found.state = _create_timm_model(found, config.architecture, arguments).state_dict()
        norm = model.blocks[0].norm1
        vit = config_of(found.state, model.blocks[0].attn.num_heads, norm.eps)
        return _load_vit(found, vit, img_size, drop_path_rate)

    size = img_size or config.arguments.get("img_size") or _native_size(found, cfg.input_size[-1])
    size = size if isinstance(size, int) else size[-1]
    if cfg.fixed_input_size or "img_size" in arguments:
        arguments["img_size"] = size
    # Some architectures have no drop path; others, such as Swin, have one by default.
    drops = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    if drop_path_rate or any(drops):
        arguments["drop_path_rate"] = drop_path_rate
    stem = cfg.first_conv if isinstance(cfg.first_conv, str) else ""
    wanted, given = (s.get(f"{stem}.weight") for s in (model.state_dict(), found.state))
    if given is not None and given.ndim == 4 and wanted.shape[1] == 3 != given.shape[1]:
        arguments["in_chans"] = given.shape[1]
    model = _create_timm_model(found, config.architecture, arguments)
    return _pretrained(found, model, size, arguments.get("in_chans", 3))


def _num_outputs(found: Found, classifier: str | tuple[str, ...] | None) -> int:
    """The number of outputs of the pretrained head; 0: there is none."""
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    for name in (*names, "head", "fc", "classifier"):
        weight = found.state.get(f"{name}.weight")
        if weight is not None and weight.ndim:
            return len(weight)
    # CLIP's files have another name for it, from which timm makes a head.
    return found.preprocess["num_classes"] if "visual.proj" in found.state else 0


def _check_size(model: nn.Module, found: Found) -> None:
    """Refuses a config that asks for far more memory than its weights need."""
    wanted = sum(p.numel() for p in model.parameters())
    given = sum(value.numel() for value in found.state.values())
    if wanted > 2 * given + 10**7:
        raise UserError(
            f"{found.origin} does not match its config, which describes {wanted:,} parameters; the "
            f"file contains {given:,}"
        )


def _create_timm_model(found: Found, architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """timm's model with the weights, which timm interpolates to the image and window size.

    Raises: UserError, for weights that do not match.
    """
    import timm

    config = TimmConfig(architecture, arguments)
    channels = arguments.get("in_chans", 3)
    size = timm.get_pretrained_cfg(architecture).input_size[1:]
    overlay = {
        "state_dict": found.state, "num_classes": arguments["num_classes"], "label_offset": 0,
        "custom_load": False, "input_size": (channels, *size),
        "first_conv": None,  # the weights have the right number of channels: keep them as they are
    }  # fmt: skip
    try:
        model = timm.create_model(
            architecture, pretrained=True, pretrained_cfg_overlay=overlay, **config.keywords
        )
    except Exception as error:  # timm's conversions raise many exception types for unknown weights
        lines = "\n".join(str(error).splitlines()[:6]) or repr(error)
        raise UserError(f"{found.origin} does not match {architecture}: {lines}") from error
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    parameters = dict(model.named_parameters())
    missing = sorted(parameters.keys() - found.state.keys())
    if missing and found.state.keys() <= model.state_dict().keys():  # timm accepts some gaps
        raise UserError(f"{found.origin} lacks {', '.join(missing[:10])} of {architecture}")
    model.config = config
    return model


def _native_size(found: Found, default: int) -> int:
    """The side in pixels of the images that the weights were trained on."""
    size = found.preprocess.get("img_size") or found.preprocess.get("input_size") or default
    size = size[-1] if isinstance(size, list | tuple) and size else size
    if type(size) is not int or not 1 <= size <= 4096:
        raise UserError(f"{found.origin}: the image size {str(size)[:40]} must be in [1, 4096]")
    return size


def _preprocess(found: Found, img_size: int, in_chans: int) -> Preprocess:
    """The preprocessing that the weights need; ImageNet's, with a remark, if it is unknown.

    Raises: UserError, for values of a wrong type or size.
    """
    given = found.preprocess
    if not given:
        found.remarks.append("these weights come without mean and std; using ImageNet's")
    try:
        mean = [float(value) for value in given.get("mean") or _IMAGENET_MEAN]
        std = [float(value) for value in given.get("std") or _IMAGENET_STD]
        crop = 1.0 if given.get("crop_pct") is None else float(given["crop_pct"])
        if len(mean) != in_chans:
            mean, std = [sum(mean) / len(mean)] * in_chans, [sum(std) / len(std)] * in_chans
    except (TypeError, ValueError, ZeroDivisionError) as error:
        reason = runtime.first_line(error)
        raise UserError(f"{found.origin}: its mean, std or crop is invalid ({reason})") from error
    if not all(abs(value) < 1e6 for value in (*mean, *std)):  # also catches NaN
        raise UserError(f"{found.origin}: its mean {mean} or std {std} is invalid")
    interpolation, mode = given.get("interpolation", "bicubic"), given.get("crop_mode", "center")
    if interpolation not in ("bicubic", "bilinear"):
        found.remarks.append(f"interpolation {interpolation!r} is not supported; using bicubic")
        interpolation = "bicubic"
    if mode != "center" or crop > 1:
        found.remarks.append(
            f"crop mode {mode!r} (crop_pct {crop:g}) is not supported; using a center crop"
        )
    return Preprocess(img_size, mean, std, min(crop, 1.0), interpolation)
