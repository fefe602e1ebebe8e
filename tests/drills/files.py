"""Drills on what a user or an attacker passes in: constants, weights, names, images, records."""

import ast
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from lab.core import constants
from lab.data import load_data
from lab.models import load_pretrained
from lab.sweep import Sweep
from lab.training import trainer
from tests.drills.harness import Attempt, Lost, end_with_a_sentence, trap
from tests.drills.training import ROOT, damage, reference

SCRIPTS = ("train", "cnn_baseline", "finetune", "finetune_swin", "sweep", "attention_viz")
TEXTS = (
    "", " ", "none", "nan", "inf", "-inf", "1e400", "0", "-1", "0.5", "1e-3,", "(1, 2)", "True",
    "x" * 300, "x" * 5000, "é", "\ud800", "a\0b", "\x1b[2J", "a\nb", "..", "../..", "/", "no",
    "/dev/zero", "/dev/null", "~", "~nobody/x", "-", "--", "--help", "%s%n", "{0}",
    "'", '"', "C:\\x", "a/b/c",
    "owner/model", "hf-hub:owner/model", "vit_tiny_patch16_224", "vgg11", "digits", "None",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 10**400, -(10**400))
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"))
OTHERS = (None, True, False, (), (1,), (0, 1), [], {}, b"x", "64", "1e-3", 1.5, "False")


def any_value(draw: random.Random, annotation: str) -> object:
    """A value for a constant, mostly of its own type."""
    own = [values for kind, values in (("int", NUMBERS), ("float", FLOATS + NUMBERS[:7]),
                                       ("bool", (True, False)), ("str", TEXTS))
           if kind in annotation]  # fmt: skip
    return draw.choice(draw.choice((*own * 4, TEXTS, NUMBERS, FLOATS, OTHERS)))


class _Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _stop_after_a_step(self) -> None:
    """In place of resuming: one step shows that the constants fit together."""
    images, targets = next(self.batches())
    for x, y, _ in self.split_batch(images, targets):
        torch.nn.functional.cross_entropy(self.train_model(x), y).backward()
    self.optimizer.step()
    sys.exit(0)


def fuzzed_constants(attempt: Attempt) -> None:
    """One to three constants of a script, edited or as flags, with values of any kind."""
    draw = attempt.random
    reference()  # before the process is forked
    script = draw.choice(SCRIPTS)
    own = ("RESULTS_DIR", "DATA_DIR")
    types = _constants(script)
    names = [name for name in types if name not in own]
    chosen = {
        name: any_value(draw, types[name])
        for name in draw.sample(names, min(len(names), draw.choice((1, 1, 2, 3))))
    }
    flags = [] if draw.random() < 0.5 else constants.as_flags(chosen)

    def start() -> None:
        module = __import__(script)
        _prepare(module, attempt.folder)
        for name, value in {} if flags else chosen.items():
            setattr(module if hasattr(module, name) else sys.modules["train"], name, value)
        sys.argv = [f"{script}.py", *flags]
        module.main()

    try:
        end_with_a_sentence(start, attempt.folder)
    except Lost as lost:
        raise Lost(f"{script}.py {flags or chosen}: {lost}") from None


def _prepare(module: ModuleType, folder: Path) -> None:
    """Makes a script write into a folder, use no network, and stop after one step."""
    trainer.Trainer.resume = _stop_after_a_step
    Sweep.run = sys.exit
    base = sys.modules.get("train")  # cnn_baseline.py has its constants
    for owner in filter(None, (module, base)):
        owner.RESULTS_DIR, owner.DATA_DIR = str(folder / "results"), str(folder / "data")
    if module.__name__ == "attention_viz":
        module.MODEL = str(next((reference()[2] / "runs").iterdir()))


def _constants(script: str) -> dict[str, str]:
    """The constants of a script, with their types as text."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: ast.unparse(node.annotation) for node in nodes}


# --- Weights and names ---


def hostile_weights(attempt: Attempt) -> None:
    """A damaged or malicious file or folder of weights."""
    draw, folder = attempt.random, attempt.folder
    _, _, finished = reference()
    original = next((finished / "runs").glob("*/best.safetensors"))
    with trap(folder) as executed:
        kind = draw.choice(("damaged", "header", "pickle", "npz", "folder"))
        path = folder / {"pickle": "x.pth", "npz": "x.npz"}.get(kind, "x.safetensors")
        if kind == "damaged":
            shutil.copy(original, path)
            damage(path, draw)
        elif kind == "header":
            content = original.read_bytes()
            (size,) = struct.unpack("<Q", content[:8])
            header = json.loads(content[8 : 8 + size])
            ours = json.loads(header["__metadata__"]["vit-lab"])
            _replace_something(ours, draw, executed)
            header["__metadata__"]["vit-lab"] = json.dumps(ours)
            text = json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
        elif kind == "pickle":
            state = {"model": {"pos_embed": torch.zeros(1, 5, 8), "code": _Code(executed)}}
            if draw.random() < 0.5:
                path.write_bytes(pickle.dumps(state))
            else:
                torch.save(state, path, _use_new_zipfile_serialization=draw.random() < 0.5)
        elif kind == "npz":
            np.savez(path, x=np.array([_Code(executed)], dtype=object))
        else:
            path = folder / "model"
            path.mkdir()
            config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": {}}
            _replace_something(config, draw, executed)
            (path / "config.json").write_text(json.dumps(config))
            shutil.copy(original, path / "model.safetensors")
        end_with_a_sentence(lambda: load_pretrained(str(path)), folder)


def _replace_something(tree: dict, draw: random.Random, executed: Path) -> None:
    """Replaces a random value in JSON, or adds an argument that would run code."""
    nodes = [tree]
    for node in nodes:
        nodes += [child for child in node.values() if isinstance(child, dict)]
    node = draw.choice(nodes)
    values = [
        x for x in (*TEXTS, *NUMBERS, *FLOATS, *OTHERS, {"a": {}}) if not isinstance(x, bytes)
    ]
    if draw.random() < 0.2 or not node:
        torch.save({"code": _Code(executed)}, executed.with_name("evil.pth"))
        node[draw.choice(("checkpoint_path", "pretrained"))] = str(executed.with_name("evil.pth"))
    else:
        node[draw.choice(sorted(node))] = draw.choice(values)


def hostile_names(attempt: Attempt) -> None:
    """A name of weights, of a dataset or of a run; nothing is written outside of the folder."""
    draw, folder = attempt.random, attempt.folder
    name = draw.choice(TEXTS) + draw.choice(("", "", draw.choice(TEXTS)))
    kind = draw.choice(("pretrained", "dataset", "name"))
    inside = folder / "outer" / "outer" / "inside"  # ../.. is not a folder of somebody else
    inside.mkdir(parents=True)

    def start() -> None:
        os.chdir(inside)
        if kind == "pretrained":
            load_pretrained(name)
        elif kind == "dataset":
            load_data(name, str(inside))
        else:
            module = __import__("train")
            _prepare(module, inside)
            module.NAME = name
            sys.argv = ["train.py"]
            module.main()

    end_with_a_sentence(start, folder)
    own = (inside, *inside.parents)
    if strangers := [p.name for p in folder.rglob("*") if p not in own and inside not in p.parents]:
        raise Lost(f"NAME {name!r} wrote {strangers}")


# --- Images ---


def hostile_images(attempt: Attempt) -> None:
    """A folder of photographs in which one file is damaged, malicious or not a file."""
    draw, folder = attempt.random, attempt.folder
    with trap(folder) as executed:
        programs = folder / "programs"  # Ghostscript, if anything should call it
        programs.mkdir()
        (programs / "gs").write_text(f"#!/bin/sh\nmkdir {executed}\n")
        (programs / "gs").chmod(0o755)
        for name in "ab":
            (folder / "data" / name).mkdir(parents=True)
            for number in range(4):
                image = Image.fromarray(np.full((90, 120, 3), 50 * number, np.uint8))
                image.save(folder / "data" / name / f"{number}.png")
        _write_hostile_image(
            folder / "data" / "a" / f"x{draw.choice(('.jpg', '.png', '.tif'))}", draw
        )

        def start() -> None:
            os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
            skip = draw.random() < 0.5
            load_data(str(folder / "data"), size=64, skip_unreadable=skip, crop_size=80)

        end_with_a_sentence(start, folder)


def _write_hostile_image(path: Path, draw: random.Random) -> None:
    kind = draw.choice(
        ("damaged", "damaged", "damaged", "postscript", "pipe", "socket", "link", "text")
    )
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            here = os.getcwd()
            os.chdir(path.parent)  # the path of a socket has at most 100 characters
            opened.bind(path.name)
            os.chdir(here)
    elif kind == "link":
        path.symlink_to(draw.choice(("/dev/zero", "/dev/random", path.name, "/", "gone")))
    elif kind == "postscript":
        path.write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\nshowpage\n"
        )
    elif kind == "text":
        path.write_bytes(os.fsencode(draw.choice(TEXTS)) + draw.randbytes(99))
    else:
        file = io.BytesIO()
        pixels = np.frombuffer(draw.randbytes(90 * 120), np.uint8).reshape(90, 120)
        formats = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "PPM", "BMP")
        Image.fromarray(pixels).save(file, format=draw.choice(formats))
        content = bytearray(file.getvalue())
        for _ in range(draw.choice((1, 3, 30))):  # mostly in the header
            at = draw.randrange(draw.choice((64, len(content))))
            content[at] = draw.randrange(256)
        path.write_bytes(content[: draw.choice((len(content), draw.randrange(len(content))))])


# --- Records ---


def damaged_records(attempt: Attempt) -> None:
    """report.py on two runs, of which one is damaged."""
    draw, folder = attempt.random, attempt.folder
    _, _, finished = reference()
    run = next((finished / "runs").iterdir())
    for name in ("whole", "damaged"):
        shutil.copytree(run, folder / "results" / "train" / name)
    places = folder / "results" / "train" / "damaged"
    for _ in range(draw.choice((1, 1, 2))):
        damage(draw.choice(sorted(path for path in places.iterdir() if path.is_file())), draw)

    def start() -> None:
        sys.argv = ["report.py", "--results", str(folder / "results"), "--data-dir", str(folder)]
        __import__("report").main()

    end_with_a_sentence(start, folder)
    if not (folder / "results" / "report.html").exists():
        raise Lost("there is no report of the other run")
