"""The model card of a shared model, built from the records of its run, and its license."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.core import Run, UserError, checkpoints, runtime
from lab.models import Pretrained, registry

_PROJECT_LICENSE = "mit"  # of models that are trained from scratch
_HUB_DATASETS = {  # names on the hub of the lab's datasets
    "mnist-5k": "ylecun/mnist", "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100", "pets": "timm/oxford-iiit-pet",
}  # fmt: skip
_HUB_LICENSES = (  # other licenses are "other" with a name
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "openrail", "unlicense",
)  # fmt: skip


@dataclass(frozen=True)
class Records:
    """What the run of a model recorded."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]

    @classmethod
    def find(cls, source: str) -> "Records | None":
        """The records of a run's folder or of a file in one; None for a model without them."""
        folder = registry.folder_of(source)
        if folder is None or not (folder / "metrics.json").is_file():
            return None
        run = Run(folder)
        config = run.config()
        return cls(folder, config, run.metrics()) if "constants" in config else None

    @property
    def base(self) -> str | None:
        """The weights that the run was fine-tuned from; None if it started from random weights."""
        if self.config["constants"].get("MODE") == "scratch":
            return None
        return self.config.get("pretrained", {}).get("origin")

    @property
    def command(self) -> str:
        """The command of the run, without the folders of this computer."""
        return runtime.public_command(self.config["command"])


@dataclass
class Release:
    """What the card of a shared model says."""

    name: str
    repository: str | None
    pretrained: Pretrained
    records: Records | None
    license: str
    images: str  # which images the formats were compared on
    formats: dict[str, str] = field(default_factory=dict)  # how each compares with the model
    skipped: dict[str, str] = field(default_factory=dict)  # by format, the reason


# --- License ---


def license_of(source: str, records: Records | None, given: str | None) -> str:
    """The license of a model: that of its base weights, because a fine-tuned model inherits it.

    Args:
        source: the model.
        records: of its run.
        given: LICENSE, which is needed if the license of the base weights is unknown.

    Raises: UserError, if the license is unknown or `given` contradicts it.
    """
    base = records.base if records else source
    known = _PROJECT_LICENSE if base is None else _license_of_weights(base)
    if known is None and not given:
        raise UserError(
            f"the license of {base} is unknown, and the model inherits it: look it up and "
            "pass it, for example with --license apache-2.0"
        )
    if given and known and base and given != known:
        raise UserError(
            f"LICENSE={given!r}, but {base} has the license {known!r}, which the model inherits: "
            f"use --license {known} or leave it out"
        )
    return given or known


def _license_of_weights(source: str, depth: int = 0) -> str | None:
    """The license of a timm name, a run, a shared folder or this project's weights, if known."""
    path = registry.find_path(source)
    if path is None:
        import timm

        name = source.removeprefix("hf-hub:").removeprefix("hf_hub:")
        timm_name = name.partition("@")[0].removeprefix("timm/")
        if timm.is_model(timm_name.split(".")[0]):
            found = timm.get_pretrained_cfg(timm_name).license
            return None if found in (None, "unknown") else found
        return _license_in_card(name) if "/" in name else None
    root = Path(__file__).resolve().parents[2]
    if path.resolve().parent == root / "weights" and path.with_suffix(".md").is_file():
        return _PROJECT_LICENSE  # the weights that come with this project
    folder = path.parent if path.is_file() else path
    if (folder / "README.md").is_file():
        return _license_in_card(folder / "README.md")
    records = Records.find(source)
    if records is None or depth > 10:
        return None
    base = records.base
    return _PROJECT_LICENSE if base is None else _license_of_weights(base, depth + 1)


def _license_in_card(card: Path | str) -> str | None:
    """The license in a model card: a file, or that of a repository (owner/name, or with @version).

    None without a card, without a network, and for a damaged card.
    """
    from huggingface_hub import HfApi, ModelCard

    try:
        if isinstance(card, Path):
            data = ModelCard.load(card, ignore_metadata_errors=True).data
        else:
            name, _, revision = card.partition("@")
            data = HfApi().model_info(name, revision=revision or None, timeout=10).card_data
        found = data.get("license")
        found = data.get("license_name") if found == "other" else found
    except Exception:  # each cause raises a different exception type
        return None
    return found if isinstance(found, str) and found != "unknown" else None


# --- Card ---


def write_card(folder: Path, release: Release) -> None:
    """Writes README.md: metadata for the hub, usage of the model, and what is known about it."""
    from huggingface_hub import ModelCard

    metadata = _metadata(folder, release).to_yaml()
    card = ModelCard(f"---\n{metadata}\n---\n\n{_body(folder, release)}")
    checkpoints.write_atomically(folder / "README.md", card.save)


def _metadata(folder: Path, release: Release) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    is_known = release.license in _HUB_LICENSES
    data: dict[str, Any] = {
        "license": release.license if is_known else "other",
        "license_name": None if is_known else release.license,
        "library_name": "timm" if "timm" in release.formats else "vit-lab",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "vit-lab", *sorted(release.formats)],
        "metrics": ["accuracy"],
    }
    if (folder / "index.html").is_file():
        data["sdk"] = "static"  # makes the folder a Space
    records = release.records
    if records:
        name = records.config["dataset"]["name"]
        hub_name = _HUB_DATASETS.get(records.config["constants"].get("DATASET"))
        data["datasets"] = [hub_name] if hub_name else None
        repository = (records.base or "").partition("@")[0]
        if repository.count("/") == 1 and registry.find_path(repository) is None:
            data["base_model"] = repository
        low, high = records.metrics["test_accuracy_95"]
        data["model_name"] = release.name
        data["eval_results"] = [
            EvalResult(
                task_type="image-classification", dataset_type=hub_name or name, dataset_name=name,
                dataset_split="test", metric_type="accuracy",
                metric_value=records.metrics["test_accuracy"],
                metric_name=f"Test accuracy (95 % interval {low:.3f} to {high:.3f})",
                metric_args={"confidence_interval_95": [low, high]},
            )
        ]  # fmt: skip
    return ModelCardData(**data)


def _body(folder: Path, release: Release) -> str:
    pretrained, records = release.pretrained, release.records
    model, preprocess, names = pretrained.model, pretrained.preprocess, pretrained.class_names
    size = preprocess.img_size
    count = sum(p.numel() for p in model.parameters())
    listed = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    color = "color" if len(preprocess.mean) == 3 else "grayscale"
    parts = [
        f"# {release.name}",
        f"A {type(model).__name__} with {count:,} parameters that classifies {color} images of "
        f"{size} x {size} pixels into {len(names)} classes: {listed}.",
        f"**Test accuracy {accuracy(records.metrics)}.**" if records else "",
        "## How to use it",
        _usage(folder, release),
        "## Formats",
        _formats(release),
        "## Training",
        training_table(records)
        if records
        else f"The weights come from {_public(pretrained.origin)}. No records of their training "
        "were available, so their accuracy is not stated here.",
    ]
    if (folder / "confusion.png").is_file():
        parts += ["## Errors", "![Confusion matrix of the test images](confusion.png)"]
    parts += [
        "## Preprocessing",
        f"Resize the shorter side to {preprocess.resized} pixels ({preprocess.interpolation}), "
        f"crop the central {size} x {size} pixels, scale to [0, 1], subtract the mean "
        f"{_rounded(preprocess.mean)} and divide by the standard deviation "
        f"{_rounded(preprocess.std)}, per channel. For ONNX, do this yourself; the other formats "
        f"need only {'an RGB' if color == 'color' else 'a grayscale'} image.",
        "## Limitations",
        _limitations(records, names),
        "## License",
        _license_text(release),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def accuracy(metrics: dict[str, Any]) -> str:
    """The test accuracy of a run with its interval, for a sentence."""
    low, high = (100 * bound for bound in metrics["test_accuracy_95"])
    return (
        f"{100 * metrics['test_accuracy']:.2f} % (95 % interval {low:.1f} to {high:.1f}, "
        f"{metrics['test_images']:,} images, in the precision used for training)"
    )


def _usage(folder: Path, release: Release) -> str:
    repository = release.repository
    place = repository or release.name
    timm_name = f"hf-hub:{repository}" if repository else f"local-dir:{place}"
    onnx_file, download = f'"{place}/model.onnx"', ""
    if repository:
        onnx_file = f'hf_hub_download("{repository}", "model.onnx")'
        download = "from huggingface_hub import hf_hub_download\n"
    blocks = {
        "timm": f"""\
With timm:

```python
import timm

model = timm.create_model("{timm_name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

With transformers and timm:

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{place}")
model = AutoModelForImageClassification.from_pretrained("{place}")
```""",
        "transformers": f"""\
With transformers, without timm:

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

place = "{place}"
processor = AutoImageProcessor.from_pretrained(place, subfolder="transformers")
model = AutoModelForImageClassification.from_pretrained(place, subfolder="transformers")
```""",
        "onnx": f"""\
With ONNX Runtime; `images` is a float32 array (batch, channels, height, width), preprocessed as
described below:

```python
import onnxruntime
{download}
session = onnxruntime.InferenceSession({onnx_file})
(logits,) = session.run(None, {{"images": images}})
```""",
        "vit-lab": f"""\
With ViT Lab:

```python
from lab.models import load_model

model, preprocess, classes = load_model("{place}")
logits = model(preprocess("photo.jpg")[None])
print(classes[logits.argmax()])
```""",
    }
    parts = [text for name, text in blocks.items() if name not in release.skipped]
    if repository:
        parts.append(
            "Every upload is a version: v1, v2, and so on. To load an older version, use "
            f'`"hf-hub:{repository}@v1"` in timm, `revision="v1"` in transformers, and '
            f'`"{repository}@v1"` in ViT Lab.'
        )
    else:
        parts.append(f"Run the code in the folder that contains `{place}`.")
    if (folder / "index.html").is_file():
        parts.append(
            "`index.html` runs the model in a browser. Upload this folder to a static Hugging Face "
            "Space to host the page."
        )
    return "\n\n".join(parts)


def _formats(release: Release) -> str:
    rows = ["| format | compared with the original model |", "|---|---|"]
    rows += [f"| {name} | {found} |" for name, found in release.formats.items()]
    text = "\n".join(rows) + f"\n\nThe comparison used {release.images}."
    missing = [f"- {name}: {reason}." for name, reason in release.skipped.items()]
    return text + ("\n\nNot included:\n\n" + "\n".join(missing) if missing else "")


def training_table(records: Records) -> str:
    """Data, recipe, command and versions of a run, as a Markdown table."""
    config, metrics = records.config, records.metrics
    data, hardware = config["dataset"], config["hardware"]
    off = (None, "", 0, False, "none")
    hidden = {*Run.NOT_IDENTITY, "DATASET", "PRETRAINED", "MODEL_FILE"}  # may be local paths
    recipe = {k: v for k, v in config["constants"].items() if v not in off and k not in hidden}
    changed = ", with uncommitted changes" if config.get("uncommitted_changes") else ""
    start = f"fine-tuned from {_public(records.base)}" if records.base else "trained from scratch"
    machine = hardware.get("gpu") or "{threads} of {cores} cores of {cpu}".format(**hardware)
    if processes := hardware.get("processes"):
        machine += f", {processes} processes"
    rows = {
        "data": f"{data['name']}: {_train_images(records):,} training, {data['val']:,} validation "
                f"and {data['test']:,} test images",
        "start": start,
        "duration": f"{metrics['epochs']} epochs, {metrics['training_seconds']:,.0f} s on "
                    f"{machine}",
        "selection": f"epoch {metrics['best_epoch']}, which had the best validation accuracy",
        "command": f"`{records.command}`",
        "constants": f"`{json.dumps(recipe)}`",
        "commit": f"{config.get('commit') or 'unknown'}{changed}",
        "versions": ", ".join(f"{k} {v}" for k, v in config["versions"].items()),
    }  # fmt: skip
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows.items())
    return f"| | |\n|---|---|\n{table}"


def _train_images(records: Records) -> int:
    """The number of different training images; an epoch may repeat them."""
    data = records.config["dataset"]
    return data.get("train_images", data["train"])


def _limitations(records: Records | None, names: list[str]) -> str:
    text = (
        f"The model always chooses one of its {len(names)} classes, also for images that show "
        "something else, and its probabilities are then meaningless. It sees only the central "
        "square of an image."
    )
    if records:
        per_class = {k: v for k, v in records.metrics.get("per_class_accuracy", {}).items()
                     if v is not None}  # fmt: skip
        text += (
            f" It was trained on {_train_images(records):,} images of "
            f"{records.config['dataset']['name']}; expect a lower accuracy on images from other "
            "sources."
        )
        if per_class:
            worst = min(per_class, key=per_class.__getitem__)
            text += f" It is least accurate on {worst}: {100 * per_class[worst]:.0f} % correct."
        if error := records.metrics.get("calibration_error"):
            text += (
                f" Its confidence differs from its accuracy by {100 * error:.1f} percentage points "
                "on average (expected calibration error)."
            )
    return text


def _license_text(release: Release) -> str:
    base = release.records.base if release.records else release.pretrained.origin
    inherited = f", inherited from the base weights {_public(base)}" if base else ""
    return f"The license is {release.license}{inherited}. The data has its own license."


def _public(source: str) -> str:
    """The name of weights, without the folders of this computer."""
    return f"`{registry.short_name(source) if registry.find_path(source) else shlex.quote(source)}`"


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _rounded(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
