"""Reads and checks the records of every run below a folder.

A number in a report is only as trustworthy as the file it comes from, and anybody may have edited
or damaged that file. Records that contradict each other, or that another version of the lab wrote,
are left out of the report, and the reason is listed.
"""

import json
import os
import re
import reprlib
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.attention import score_report
from lab.core import Run, runtime
from lab.finetuning import mode_label
from lab.report.record_files import (
    ATTENTION_CONFIG,
    CONFIG,
    METRICS,
    SCORES,
    SWEEP,
    TEXT,
    History,
    InvalidRecord,
    Predictions,
    check,
    read_history,
    read_json,
    read_predictions,
)

TASKS = {  # by script, in the order of the lab
    "train.py": "From scratch",
    "cnn_baseline.py": "CNN twin",
    "finetune.py": "Fine-tuning",
    "finetune_swin.py": "Swin and other models",
}

# The values of constants in records that are older than the constant.
_OLD_DEFAULTS = {
    "TRAIN_FRACTION": 1.0, "OPTIMIZER": "adamw", "PROGRESSIVE_RESIZE": 0.0, "MODEL_FILE": None,
}  # fmt: skip
_VITS = "VisionTransformer|ViT|Vit|Deit|Beit|Eva|Cait|Levit|Xcit|VOLO|TNT|Hiera|Nest|Twins|CoaT"
_RUN_FILES = {"metrics.json", "history.csv", "predictions.csv", "best.safetensors", "last.pt"}
_WEIGHT_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".npz"}


@dataclass(frozen=True)
class Record:
    """One run. Metrics and predictions are None until the run is finished."""

    folder: Path
    config: dict[str, Any]
    history: History
    metrics: dict[str, Any] | None
    predictions: Predictions | None
    sweep: Path | None  # the folder of the sweep that the run is a trial of
    is_reference: bool = False  # came with the project, in official/

    @cached_property
    def constants(self) -> dict[str, Any]:
        return {**_OLD_DEFAULTS, **self.config["constants"]}

    @cached_property
    def script(self) -> str:
        """The script that started the run, such as "train.py"."""
        return _script(self.config)

    @property
    def task(self) -> str:
        return TASKS.get(self.script, self.script)

    @cached_property
    def pretrained(self) -> str:
        """The pretrained model without its folder and file suffix; "" for other runs."""
        path = Path(self.constants.get("PRETRAINED", ""))
        return path.stem if path.suffix in _WEIGHT_SUFFIXES else path.name

    @cached_property
    def mode(self) -> str:
        """Which part of the pretrained model was trained, such as "top 2"; "" for other runs."""
        return mode_label(self.constants) if self.pretrained else ""

    @cached_property
    def kind(self) -> str:
        """The family of the model: "ViT", "Swin" or "CNN"; records without a class are of ViTs."""
        name = str(self.config["model"].get("class", "ViT"))
        if "Swin" in name:
            return "Swin"
        return "ViT" if re.search(_VITS, name) else "CNN"

    @cached_property
    def model(self) -> str:
        """What was trained, such as "vit_64x4", "swin_48x222" or "vit_128x6_cifar10, head"."""
        if self.pretrained:
            return f"{self.pretrained}, {self.mode}"
        if "twin_of" in self.config:
            return f"CNN twin of {self.config['twin_of']['model']}"
        c = self.constants
        if c.get("MODEL", "vit") == "vit":
            return f"vit_{c['EMBED_DIM']}x{c['DEPTH']}"
        if not (arguments := c.get("MODEL_ARGS")):
            return c["MODEL"]
        values = dict(re.findall(r"(\w+)=(\([^)]*\)|\S+)", arguments))
        depth = re.sub(r"\D", "", values.get("depths", values.get("depth", "")))
        if depth and "embed_dim" in values:  # arguments change the model, so its name would mislead
            return f"{c['MODEL'].split('_')[0]}_{values['embed_dim']}x{depth}"
        return f"{c['MODEL']} ({arguments})"

    @cached_property
    def recipe(self) -> str:
        """Recipe details that the name of the model omits, such as "9 epochs, Muon"."""
        c, epochs = self.constants, (self.metrics or {}).get("epochs", len(self.history))
        parts = [f"{epochs} epoch{'' if epochs == 1 else 's'}"]
        if self.share != 1:
            parts.append(f"{100 * self.share:g} % of the training images")
        if c["OPTIMIZER"] != "adamw":
            parts.append(str(c["OPTIMIZER"]).capitalize())
        if c["PROGRESSIVE_RESIZE"]:
            parts.append("progressive resizing")
        if self.script == "train.py" and c.get("MODEL", "vit") == "vit" and "PATCH_SIZE" in c:
            parts.append(f"patches of {c['PATCH_SIZE']} pixels")
        return ", ".join(parts)

    @property
    def test_set(self) -> str:
        """The dataset and its size, such as "pets (37 classes, 111 test images)".

        The name by itself would hide that two runs were tested on different subsets.
        """
        dataset, images = self.config["dataset"], (self.metrics or {}).get("test_images")
        size = f", {images:,} test images" if images else ""
        return f"{dataset['name']} ({len(dataset['classes'])} classes{size})"

    @property
    def label(self) -> str:
        """Task and model, such as "From scratch: vit_64x4"."""
        return self.model if self.model.startswith(self.task) else f"{self.task}: {self.model}"

    @property
    def share(self) -> float:
        """The fraction of the training images that was used."""
        return self.constants["TRAIN_FRACTION"]

    @property
    def timing_is_valid(self) -> bool:
        """Whether the run had the machine to itself, so that its times are meaningful.

        Records that do not contain the load, which are older, count as if nothing else ran.
        """
        threads = self.config.get("hardware", {}).get("threads") or 1
        loads = (self.config.get("load"), (self.metrics or {}).get("load"))
        return all(load is None or load <= threads + 0.5 for load in loads)

    @property
    def comparable_key(self) -> tuple[bool, str]:
        """Equal for runs that may be compared: same test images, both or neither a reference."""
        return self.is_reference, self.predictions.test_set

    @property
    def model_code(self) -> str | None:
        """The hash of the model.py whose model was trained; None if it was not recorded.

        Records of CNNs and timm's models contain it as well, but it did not matter for them.
        """
        code, model = self.config.get("code"), self.config["model"].get("class")
        if model != "VisionTransformer" or self.constants.get("MODEL", "vit") != "vit":
            return None
        return code.get("model.py") if isinstance(code, dict) else None

    def key(self, *excluded: str) -> str:
        """Equal for runs of one script on one dataset that differ only in excluded constants."""
        rest = {k: v for k, v in self.constants.items() if k not in excluded}
        return json.dumps([self.script, self.config["dataset"]["name"], rest], sort_keys=True)


@dataclass
class Found:
    """Everything below the results folder `place`."""

    place: Path
    runs: list[Record] = field(default_factory=list)
    attention_runs: list[Run] = field(default_factory=list)  # of attention_viz.py
    sweeps: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)  # folder and reason

    def is_reference(self, folder: Path) -> bool:
        """Whether a folder came with the project: it is in official/ below the results folder."""
        return folder.relative_to(self.place).parts[:1] == ("official",)


def read_runs(place: Path) -> Found:
    """Reads all runs below a folder, sorted by folder name.

    Damaged files never raise: their folder is listed in `left_out` with the reason.
    """
    found = Found(place)

    def on_error(error: OSError) -> None:
        found.left_out.append((Path(error.filename), f"cannot be opened ({error.strerror})"))

    for root, subfolders, files in os.walk(place, onerror=on_error):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        folder, names = Path(root), set(files)
        try:
            if names & {"study.journal", "sweep.json"}:  # a sweep; its trials are runs below it
                sweep = read_json(folder / "sweep.json")
                check(sweep, SWEEP, "sweep.json")
                found.sweeps.append((folder, sweep))
            elif {"config.json", "model.safetensors", "README.md"} <= names:
                subfolders.clear()  # a model that share.py has written: no run
            elif "config.json" in names:
                subfolders.clear()
                _read_run(folder, found)
            elif run_files := sorted(names & _RUN_FILES):
                raise InvalidRecord(f"config.json is missing, but {run_files[0]} is there")
            elif not subfolders and folder != place:
                content = ", ".join(sorted(names)[:3])
                raise InvalidRecord(f"contains no run, only {content}" if content else "is empty")
        except InvalidRecord as reason:
            subfolders.clear()  # trials of a damaged sweep would count as ordinary runs
            found.left_out.append((folder, str(reason)))
    return found


def _read_run(folder: Path, found: Found) -> None:
    """Adds the run in a folder to `found`. Raises: InvalidRecord."""
    config = read_json(folder / "config.json")
    if (schema := config.get("schema")) != runtime.SCHEMA:
        raise InvalidRecord(
            f"was written by another version of the lab (schema {schema!r}, not {runtime.SCHEMA})"
        )
    check(config, ATTENTION_CONFIG, "config.json")
    finished = (folder / "metrics.json").exists()
    script = _script(config)
    if script == "predict.py":
        return  # predictions of images that need not have labels
    if script == "attention_viz.py":
        _read_attention_run(folder, finished, found)
        return
    check(config, CONFIG, "config.json")
    history = read_history(folder / "history.csv")
    metrics = predictions = None
    if finished:
        metrics = read_json(folder / "metrics.json")
        check(metrics, METRICS, "metrics.json")
        predictions = read_predictions(folder / "predictions.csv", config["dataset"]["classes"])
        _check_agreement(metrics, predictions, history)
    sweep = next((path for path, _ in found.sweeps if path in folder.parents), None)
    is_reference = found.is_reference(folder)
    record = Record(folder, config, history, metrics, predictions, sweep, is_reference)
    try:
        record.key(record.task)
        model = record.model
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidRecord(f"config.json does not say what was trained ({error!r})") from error
    if not isinstance(model, str):
        raise InvalidRecord(f"config.json: MODEL is {reprlib.repr(model)}, which is not text")
    if not finished and not sweep:
        epochs = f"{len(history)} of {config['constants']['EPOCHS']}"
        command = config["command"].replace(" --overwrite", "")  # which would start over
        reason = f"stopped after epoch {epochs}; resume it with: {command}"
        found.left_out.append((folder, reason))
    if finished or history:
        found.runs.append(record)


def _read_attention_run(folder: Path, finished: bool, found: Found) -> None:
    if not finished:
        raise InvalidRecord("stopped before its figures were drawn; run the same command again")
    metrics = read_json(folder / "metrics.json")
    check(metrics, {"title?": TEXT}, "metrics.json")
    if "animal_share" in metrics:  # of --score
        check(metrics, SCORES, "metrics.json")
        try:
            score_report.verdict(metrics)
            for scores in metrics["methods"].values():
                score_report.percent(scores["trained"]["iou"]["mean"])
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise InvalidRecord(f"metrics.json does not contain scores ({error!r})") from error
    found.attention_runs.append(Run(folder))


def _check_agreement(metrics: dict, predictions: Predictions, history: History) -> None:
    """Checks that the three records of a finished run agree. Raises: InvalidRecord."""
    if len(metrics["test_accuracy_95"]) != 2:
        raise InvalidRecord("metrics.json: test_accuracy_95 is not an interval")
    accuracy = float(predictions.correct.mean())
    if abs(accuracy - metrics["test_accuracy"]) > 1e-5:
        raise InvalidRecord(
            f"the test accuracy is {100 * metrics['test_accuracy']:.2f} % in metrics.json, but "
            f"{100 * accuracy:.2f} % in predictions.csv: one of the files was changed"
        )
    if not any(row["epoch"] == metrics["best_epoch"] for row in history):
        raise InvalidRecord("history.csv lacks the best epoch of metrics.json")


def _script(config: dict[str, Any]) -> str:
    """The script in a record's command, such as "train.py", also after torchrun and its flags.

    Raises: InvalidRecord.
    """
    try:
        words = shlex.split(config["command"])
        return next(Path(word).name for word in words if word.endswith(".py"))
    except (ValueError, StopIteration) as error:
        raise InvalidRecord(
            f"config.json: the command {reprlib.repr(config['command'])} does not name a script"
        ) from error
