"""finetune.py and finetune_swin.py from the command line."""

import dataclasses
import io
import json
import re
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import timm
import torch

import finetune
import finetune_swin
from lab.core import Run, UserError
from lab.core.checkpoints import save_weights
from lab.data import Preprocess
from lab.finetuning import comparison
from lab.models import Pretrained, load_model, load_pretrained, registry
from lab.models.registry import TimmConfig, build_timm_model, model_header
from tests.finetuning.small import CONFIG, vit

ROOT = Path(__file__).resolve().parents[2]


def test_image_size_is_accepted_if_windows_tile_every_stage():
    for patch, window, stages in ((4, 7, 4), (4, 16, 4), (2, 4, 3), (4, 8, 4)):
        for size in range(8, 600, 4):
            fine = True
            for stage in range(stages):
                patches, rest = divmod(size, patch * 2**stage)
                fine &= rest == 0 and (patches % window == 0 or patches < window)
            if fine:
                finetune_swin.check_size(size, patch, window, stages)
            else:
                with pytest.raises(UserError, match=r"nearest sizes that work: \d") as error:
                    finetune_swin.check_size(size, patch, window, stages)
                for near in re.findall(r"\d+", str(error.value).split("work:")[1]):
                    finetune_swin.check_size(int(near), patch, window, stages)


@pytest.mark.parametrize(("name", "expected"), [
    ("swin_tiny_patch4_window7_224", (4, 7, 4)), ("swinv2_tiny_window8_256", (4, 8, 4)),
    ("resnet18", None),
])  # fmt: skip
def test_window_size_is_read_from_the_model(name, expected):
    assert finetune_swin.windows(timm.create_model(name)) == expected


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained weights: what is tested is the machinery."""
    place = tmp_path_factory.mktemp("weights")
    classes = [f"class {i}" for i in range(10)]
    tall = dataclasses.replace(CONFIG, img_size=16)
    header = model_header(vit(config=tall), classes, Preprocess(16, [0.5] * 3, [0.5] * 3))
    save_weights(place / "vit.safetensors", vit(config=tall).state_dict(), header)
    return place / "vit.safetensors"


def run_script(script, place, *words):
    """Runs a script in this process, because starting one takes seconds."""
    argv = [str(ROOT / script), "--data-dir", str(place / "data"), "--results-dir",
            str(place / "results"), "--epochs", "2", "--precision", "fp32",
            "--dataset", "digits", *words]  # fmt: skip
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", argv)
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as exit:
            status = exit.code
    return status, out.getvalue(), err.getvalue()


def test_all_modes_run_and_are_compared(weights, tmp_path, monkeypatch):
    words = ("--pretrained", str(weights), "--mode", "all", "--name", "mine")

    def run_mode_here(flags, where):  # test_comparison.py starts processes
        monkeypatch.setenv(Run.FOLDERS_VARIABLE, str(tmp_path / "folders"))
        (tmp_path / "folders").unlink(missing_ok=True)
        status, _, err = run_script("finetune.py", tmp_path, *words, *flags)
        assert status == 0, err
        monkeypatch.delenv(Run.FOLDERS_VARIABLE)
        return [Run(Path(line)) for line in (tmp_path / "folders").read_text().splitlines()]

    monkeypatch.setattr(comparison, "_run_mode", run_mode_here)
    status, out, err = run_script("finetune.py", tmp_path, *words)
    assert status == 0, err
    figure = Path(out.splitlines()[-1])
    assert figure.name == "mine-modes.png"
    assert figure.stat().st_size > 20_000
    table = figure.with_suffix(".md").read_text()
    modes = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert modes == ["scratch", "head", "top 1", "top 2", "LoRA 8", "full, layer decay 0.7", "full"]
    records = {}
    for path in (tmp_path / "results").glob("*/config.json"):
        config = json.loads(path.read_text())
        metrics = json.loads(path.with_name("metrics.json").read_text())
        assert f"{config['model']['trainable_parameters']:,} | " in table
        assert f"{100 * metrics['test_accuracy']:.1f} % (" in table
        assert config["pretrained"]["notes"]
        records[path.parent.name] = config
    names = ["scratch", "head", "top1", "top2", "lora8", "full-decay0.7", "full"]
    assert records.keys() == {f"mine-{name}" for name in names}
    assert records["mine-head"]["model"]["trainable_parameters"] == 330
    kept = tmp_path / "results" / "mine-head" / "best.safetensors"
    before = kept.stat().st_mtime_ns
    status, out, _ = run_script("finetune.py", tmp_path, *words[:2], "--mode", "head", "--name",
                                "mine-head")  # fmt: skip
    assert status == 0
    assert "this run is finished" in out
    assert kept.stat().st_mtime_ns == before


def test_run_is_fine_tuned_further_and_keeps_its_head(weights, tmp_path):
    words = ("--pretrained", str(weights), "--mode", "top-k", "--top-k", "1")
    status, _, err = run_script("finetune.py", tmp_path, *words)
    assert status == 0, err
    (folder,) = (tmp_path / "results").iterdir()
    status, out, err = run_script("finetune.py", tmp_path, "--pretrained", str(folder),
                                  "--learning-rate", "0.5")  # fmt: skip
    assert status == 0, err
    assert "is kept: it was trained for these 10 classes" in out
    assert "warning: LEARNING_RATE=0.5 is unusual for full" in out


def test_comparisons_with_different_options_have_different_names(weights, monkeypatch):
    """Most modes ignore these options, so their runs have the same names."""
    values = {"PRETRAINED": str(weights), "IMG_SIZE": None, "MODE": "all", "TOP_K": 3,
              "LORA_RANK": 8, "AUGMENT_VIEWS": 0, "LAYER_DECAY": 1.0, "NAME": None,
              "RESULTS_DIR": "x"}  # fmt: skip
    suffixes = []
    monkeypatch.setattr(finetune, "compare_modes", lambda *args: suffixes.append(args[-1]))
    finetune.run_modes(values, plain_only=True)
    finetune.run_modes({**values, "LORA_RANK": 4, "AUGMENT_VIEWS": 2}, plain_only=True)
    assert suffixes == ["", "-lora-rank4-augment-views2"]


@pytest.mark.parametrize(("folder", "title"), [
    ("surface-scratches-vit-scratch-s0", "surface-scratches-vit-s0"), ("mine-scratch", "mine"),
])  # fmt: skip
def test_comparison_is_named_like_its_runs_without_the_mode(folder, title):
    assert comparison._without_mode(folder, "scratch") == title


def test_usual_values_of_other_modes_are_those_of_the_script():
    usual = {name: value for name, (_, value) in finetune.ONLY_IN.items()}
    assert usual == {name: getattr(finetune, name) for name in usual}


def test_options_of_other_modes_change_nothing_and_say_so(weights, tmp_path):
    words = ("--pretrained", str(weights), "--mode", "full")
    assert run_script("finetune.py", tmp_path, *words)[0] == 0
    _, out, _ = run_script("finetune.py", tmp_path, *words, "--top-k", "1", "--lora-rank", "2")
    assert "TOP_K affects only MODE=top-k; it is ignored here" in out
    assert "LORA_RANK affects only MODE=lora; it is ignored here" in out
    assert "this run is finished" in out


def test_layer_decay_changes_only_full_fine_tuning(weights, tmp_path):
    words = ("--pretrained", str(weights), "--mode", "top-k", "--top-k", "1")
    assert run_script("finetune.py", tmp_path, *words)[0] == 0
    _, out, _ = run_script("finetune.py", tmp_path, *words, "--layer-decay", "0.7")
    assert "LAYER_DECAY affects only MODE=full" in out
    assert "this run is finished" in out


def test_all_modes_leave_out_lora_where_it_does_not_fit(tmp_path, monkeypatch, capsys):
    modes = []
    monkeypatch.setattr(finetune, "compare_modes", lambda named, *_: modes.extend(named))
    values = {"PRETRAINED": "convnext_atto", "IMG_SIZE": 32, "MODE": "all", "TOP_K": 2,
              "LORA_RANK": 8, "AUGMENT_VIEWS": 0, "LAYER_DECAY": 1.0, "NAME": None,
              "RESULTS_DIR": "x"}  # fmt: skip
    model = build_timm_model(TimmConfig("convnext_atto", {"num_classes": 3}))
    found = Pretrained(model, Preprocess(32, [0.5] * 3, [0.5] * 3), None, "x", [])
    monkeypatch.setattr(finetune, "load_pretrained", lambda *_, **__: found)
    finetune.run_modes(values, plain_only=False)
    assert "skipping lora: " in capsys.readouterr().out
    assert modes[:2] == ["scratch", "head"]
    assert "full" in modes
    assert not any(name.startswith("lora") for name in modes)


@pytest.mark.parametrize(("words", "said"), [
    (("--mode", "top-k", "--top-k", "9"), "TOP_K=9 must lie between 1 and 3"),
    (("--mode", "lora", "--lora-rank", "0"), "LORA_RANK=0 must lie between 1 and 32"),
    (("--mode", "head", "--augment-views", "-1"), "AUGMENT_VIEWS=-1"),
    (("--layer-decay", "0"), r"LAYER_DECAY=0.0 must lie in (0, 1]"),
    (("--img-size", "18"), "patch_size=4 must divide img_size=18"),
    (("--head-lr-mult", "0"), "HEAD_LR_MULT=0.0"),
    (("--mode", "half"), "'half' is not one of full, head"),
])  # fmt: skip
def test_mistakes_end_with_a_message(words, said, weights, tmp_path):
    status, _, err = run_script("finetune.py", tmp_path, "--pretrained", str(weights), *words)
    assert status == 2
    assert said in err


def test_finetune_swin_trains_timm_models_and_suggests_sizes(tmp_path):
    torch.manual_seed(0)
    arguments = {"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 8,
                 "depths": [1, 1], "num_heads": [1, 2], "num_classes": 3}  # fmt: skip
    model = build_timm_model(TimmConfig("swin_tiny_patch4_window7_224", arguments))
    path = tmp_path / "swin.safetensors"
    header = model_header(model, ["a", "b", "c"], Preprocess(64, [0.5] * 3, [0.5] * 3))
    save_weights(path, model.state_dict(), header)
    status, _, err = run_script("finetune_swin.py", tmp_path, "--model", str(path),
                                "--img-size", "36")  # fmt: skip
    assert status == 2
    assert "IMG_SIZE=36 does not fit: windows of 4 x 4" in err
    status, out, err = run_script("finetune_swin.py", tmp_path, "--model", str(path),
                                  "--img-size", "32", "--mode", "head")  # fmt: skip
    assert status == 0, err
    assert "(head.fc.weight, head.fc.bias) replaces the pretrained head (3 outputs)" in out
    kept, preprocess, _ = load_model(next((tmp_path / "results").glob("*/best.safetensors")))
    assert type(kept).__name__ == "SwinTransformer"
    assert preprocess.img_size == 32
    assert "--pretrained" not in run_script("finetune_swin.py", tmp_path, "--help")[1]


def test_default_weights_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script in (finetune, finetune_swin):
        source = getattr(script, "PRETRAINED", None) or script.MODEL
        assert load_pretrained(source).classes[3] == "cat"
        assert registry.short_name(source) == Path(source).stem
        assert load_pretrained(source).origin == source
