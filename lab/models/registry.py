"""Models by name: built, described in the header of their weights, and rebuilt from it."""

from ast import literal_eval
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import nn

from lab.core import UserError, checkpoints
from lab.data.preprocess import Preprocess
from lab.models.cnn import CNNConfig, ResidualCNN
from lab.models.lora import merged_state
from model import VisionTransformer, ViTConfig

OURS = {  # by the name in a header
    "VisionTransformer": (VisionTransformer, ViTConfig),
    "ResidualCNN": (ResidualCNN, CNNConfig),
}


@dataclass(frozen=True)
class TimmConfig:
    """What rebuilds a model of timm's: its architecture and what `timm.create_model` is given."""

    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments as timm wants them: JSON, where they may come from, has no tuples."""
        return {k: tuple(v) if isinstance(v, list) else v for k, v in self.arguments.items()}

    @classmethod
    def parse(cls, architecture: str, img_size: int, text: str, **arguments: Any) -> "TimmConfig":
        """From words such as "embed_dim=48 depths=(2,2,2)", which precede `arguments`.

        Raises: UserError, for an architecture that timm has not, or words that are no such pairs.
        """
        if not timm.is_model(architecture):
            raise UserError(unknown_architecture(architecture))
        if timm.get_pretrained_cfg(architecture).fixed_input_size:
            arguments["img_size"] = img_size
        try:
            pairs = [word.split("=", 1) for word in text.split()]
            return cls(architecture, {**arguments, **{k: literal_eval(v) for k, v in pairs}})
        except (ValueError, SyntaxError) as error:
            raise UserError(
                f"MODEL_ARGS={text!r} must be pairs such as embed_dim=48 depths=(2,2,2), without "
                "blanks inside"
            ) from error


def build_timm_model(config: TimmConfig) -> nn.Module:
    """A model of timm's with random weights; `model.config` says what it is.

    Raises: UserError, for an architecture that timm has not, or arguments that it does not take.
    """
    if not timm.is_model(config.architecture):
        raise UserError(unknown_architecture(config.architecture))
    try:
        model = timm.create_model(config.architecture, pretrained=False, **config.keywords)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"timm cannot build {config.architecture} so: {error}") from error
    model.config = config
    return model


def unknown_architecture(name: str) -> str:
    """The sentence for a name that timm does not know, with names that it does."""
    import difflib

    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
    hint = f": perhaps {', '.join(close)}" if close else ""
    return f"timm has no model {name!r}{hint}. All names: timm.list_models()"


def model_header(model: nn.Module, classes: list[str], preprocess: Preprocess) -> dict[str, Any]:
    """The header of a model's weights: what rebuilds it, and what it needs to predict."""
    config = getattr(model, "config", None)  # a head alone has none
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
    judged = {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"]}
    checkpoints.save_weights(
        path, merged_state(model), {**model_header(model, classes, preprocess), **judged}
    )


def load_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a run's `best.safetensors`, in eval mode, and the header beside it.

    Raises: UserError, for a file that holds no model of ours, or another one than its header says.
    """
    state, header = checkpoints.load_weights(path)
    try:
        if header["model"] == "timm":
            model = build_timm_model(TimmConfig(**header["config"]))
        else:
            kind, config = OURS[header["model"]]
            model = kind(config(**header["config"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} holds {header.get('model')!r}, which is no model here") from error
    checkpoints.load_strict(model, {k: v.float() for k, v in state.items()}, path)
    return model.eval(), header
