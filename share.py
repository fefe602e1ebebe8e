"""Share a trained model as a folder or as a repository on the Hugging Face hub.

    python share.py                                          # the newest run of train.py
    python share.py --model results/finetune/<run>
    python share.py --model results/finetune/<run> --repository user/name   # upload it, too

Writes a self-contained folder results/share/<name>/ that timm, transformers, ONNX Runtime and this
project can load: model.safetensors, config.json, transformers/, model.onnx, and a model card,
README.md. A small ViT also gets index.html, which runs it in a browser and contains some of your
test images (--no-page leaves it out). Takes about ten seconds, most of them for ONNX; without
`pip install onnx onnxscript onnxruntime`, that format is left out.

The upload needs `hf auth login`. Each upload gets the tag v1, v2, ... and predict.py loads an older
one with --revision v1. If an upload is interrupted, the same command continues it.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from lab.attention import views
from lab.core import Run, UserError, checkpoints, constants, runtime
from lab.data import Augmentation, Loaders, datasets
from lab.models import Pretrained, load_pretrained, registry
from lab.sharing import card, formats, hub

# --- Model ---
MODEL: str | None = None  # run, file, timm name, owner/name; None: newest run of train.py
MODEL_FILE: str | None = None  # your own model.py, if the model was trained with it
LICENSE: str | None = None  # None: MIT if trained from scratch, else that of the base weights
INT8: bool = False  # also an ONNX model with int8 linear layers, and its test accuracy
PAGE: bool = True  # index.html, which runs a small ViT in a browser and shows some test images
DATA_DIR: str = "data"  # folder of downloaded datasets

# --- Upload ---
REPOSITORY: str | None = None  # owner/name on the Hugging Face hub; None: only write the folder
PRIVATE: bool = False  # only you can see the repository

# --- Run ---
RESULTS_DIR: str = "results/share"  # one folder per model
NAME: str | None = None  # name of that folder; None: the name of the run
OVERWRITE: bool = False  # replace another model, in the folder and in the repository

DOWNLOADS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "cifar-10-batches-py",
             "cifar100": "cifar-100-python", "pets": "oxford-iiit-pet"}  # fmt: skip


def main() -> None:
    c = SimpleNamespace(**constants.override(sys.modules[__name__]))
    if c.REPOSITORY:
        hub.check_name(c.REPOSITORY)
    c.MODEL = c.MODEL or Run.newest()
    pretrained = load_pretrained(c.MODEL)
    for remark in pretrained.remarks:
        print(f"note: {remark}")
    if not pretrained.num_classes:
        raise UserError(f"{c.MODEL} has no classification head: fine-tune it first")
    records = card.Records.find(c.MODEL)
    if records is None and registry.recorded_constants(c.MODEL):
        raise UserError(f"{c.MODEL} is not a finished run: finish it first, or share another model")
    license = card.license_of(c.MODEL, records, c.LICENSE)
    name = c.NAME or registry.short_name(c.MODEL)
    if Path(name).name != name:
        raise UserError(f"NAME={name!r} is not the name of a folder")
    folder = Path(c.RESULTS_DIR, name)
    check_source(c.MODEL, folder)
    check_folder(folder, pretrained, c.OVERWRITE)
    loaders, dataset = example_images(pretrained, records, c.DATA_DIR)
    if c.INT8 and dataset is None:
        raise UserError(
            "INT8 needs the test images of the model's dataset, to measure its accuracy: share a "
            "run whose dataset is on this computer"
        )
    images = f"test images of {dataset}" if dataset else "bundled MNIST images"
    release = card.Release(name, c.REPOSITORY, pretrained, records, license, images)
    write_folder(folder, release, loaders, c)
    if c.REPOSITORY:
        version, page = hub.upload(folder, c.REPOSITORY, c.PRIVATE, c.OVERWRITE)
        print(f"{page} is version {version}")
    print(folder)


def write_folder(folder: Path, release: card.Release, loaders: Loaders, c: SimpleNamespace) -> None:
    """Writes everything that others need. An old folder stays until the new one is complete."""
    pretrained = release.pretrained
    _, images, _ = next(loaders.evaluation("test"))
    expected = formats.Expected(pretrained.model, images[: formats.NUM_COMPARED])
    with checkpoints.explain_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="."))
    try:
        scratch.chmod(0o755)  # mkdtemp's folders are private
        formats.write_weights(scratch, pretrained)
        writers = {
            "timm": formats.write_timm,
            "transformers": formats.write_transformers,
            "onnx": formats.write_onnx,
        }
        if c.INT8:
            writers["int8"] = lambda folder, *_: formats.write_int8(folder, loaders)
        for name, write in writers.items():
            try:
                release.formats[name] = str(write(scratch, pretrained, expected))
                print(f"{name}: {release.formats[name]}")
            except formats.NotPossible as reason:
                if name == "timm" and c.MODEL_FILE:
                    raise UserError(
                        f"the ViT in {c.MODEL_FILE} is not timm's, so others could not load it "
                        f"({reason}): share a run of the lab's model.py"
                    ) from reason
                formats.remove(scratch, name)
                release.skipped[name] = str(reason)
                print(f"skipping {name}: {reason}")
        if release.records:
            for name in ("metrics.json", "confusion.png"):
                if (source := release.records.folder / name).is_file():
                    shutil.copyfile(source, scratch / name)
        if c.PAGE:
            add_page(scratch, release, loaders)
        card.write_card(scratch, release)
        with checkpoints.explain_write_errors(folder):
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    Run.announce(folder)  # to python -m lab


def add_page(folder: Path, release: card.Release, loaders: Loaders) -> None:
    """Writes the live page of a small ViT, with which a static Space can host the folder."""
    run = Run(release.records.folder) if release.records else None
    shown = views.Views(release.pretrained, loaders, views.ViewConfig(), run)
    count = shown.write_live_page(folder / "index.html", release.name)
    if count is None:
        print(
            "skipping index.html: the live page shows only ViTs with the layers of the original "
            "model.py and up to 4M parameters"
        )
    else:
        print(f"index.html contains {count} of the {release.images} (--no-page leaves it out)")


def check_source(model: str, target: Path) -> None:
    """Raises: UserError for a model that is already shared, or that `target` would replace."""
    source = registry.folder_of(model)
    if source is None:
        return
    config = source / "config.json"
    if config.is_file() and "vit_lab" in checkpoints.read_json(config):
        raise UserError(
            f"{model} is already shared, and its records are in the folder of its run: name the "
            "run, such as --model results/train/<run> (with --repository, to upload it)"
        )
    if source.resolve() == target.resolve():
        raise UserError(f"{target} is the folder of the model itself: choose another --name")


def check_folder(folder: Path, pretrained: Pretrained, overwrite: bool) -> None:
    """Raises: UserError, if a folder contains anything but this model.

    With `overwrite`, it may contain another model.
    """
    if not folder.exists():
        return
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} exists and contains no model: choose another --name")
    if overwrite:
        return
    try:
        same = load_pretrained(str(folder)).fingerprint() == pretrained.fingerprint()
    except UserError:
        same = False
    if not same:
        raise UserError(
            f"{folder} contains another model: choose another --name, or replace it with "
            "--overwrite"
        )


def example_images(
    pretrained: Pretrained, records: card.Records | None, data_dir: str
) -> tuple[Loaders, str | None]:
    """Real images to compare formats on: of the model's test split if it is on this computer.

    Returns: their batches, and the name of the dataset; without it, mnist-5k images and None.
    """
    preprocess = pretrained.preprocess
    dataset = records.config["constants"].get("DATASET", "") if records else ""
    folder = Path(data_dir, DOWNLOADS[dataset]) if dataset in DOWNLOADS else Path(dataset)
    is_here = dataset in ("digits", "mnist-5k") or (dataset and folder.expanduser().is_dir())
    if is_here:
        data = datasets.load_data(dataset, data_dir, preprocess.resized, skip_unreadable=True,
                                  interpolation=preprocess.interpolation)  # fmt: skip
    else:
        data = datasets.load_data("mnist-5k")
    loaders = Loaders(data, preprocess, formats.NUM_COMPARED, Augmentation())
    return loaders, data.name if is_here else None


if __name__ == "__main__":
    runtime.run_script(main)
