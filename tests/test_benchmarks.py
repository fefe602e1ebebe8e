"""The benchmarks of speed: how numbers are computed, and `python -m benchmarks` as a script."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as script
from benchmarks import decoding, finetune_head, libraries, model_speed, table
from benchmarks.timing import alternate, synchronize
from lab.core import UserError
from lab.data import images
from model import VisionTransformer, ViTConfig

CONFIG = ViTConfig(img_size=32, patch_size=8, num_classes=10, embed_dim=128, depth=2, num_heads=2)


def random_times(*names: str) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    return {name: list(rng.uniform(0.5, 2, 7)) for name in names}


def test_ratio_is_the_median_of_the_ratios_of_single_repeats():
    times = random_times("ours", "timm", "transformers")
    rows = table.compare("training", times, "ours", ["timm", "transformers"], images=64)
    for row in rows:
        ratios = np.array(times[row.library]) / np.array(times["ours"])
        assert row.ratio == pytest.approx(np.median(ratios))
        assert (row.lowest, row.highest) == pytest.approx((ratios.min(), ratios.max()))
        assert row.ours == pytest.approx(64 / np.median(times["ours"]))
        assert row.theirs == pytest.approx(64 / np.median(times[row.library]))
        assert row.unit == "images/s"


@pytest.mark.parametrize("images", [0, 64])
def test_ratio_above_one_means_that_ours_is_faster(images):
    times = {"ours": [1.0, 1.1, 0.9], "timm": [2.0, 2.2, 1.8]}
    (row,) = table.compare("training", times, "ours", ["timm"], images, {"ours": 1, "timm": 2})
    assert row.ratio == pytest.approx(2)
    assert (row.ours > row.theirs) == bool(images)  # images/s, or seconds
    assert (row.ours_mb, row.theirs_mb) == (1, 2)


def test_utilization_is_relative_to_the_product_of_the_same_repeat():
    times = random_times("ours", "product")
    (found,) = table.utilization("training", times, "product", flop=3e9, product_flop=5e9)
    ours, product = (np.array(times[name]) for name in ("ours", "product"))
    fractions = (3e9 / ours) / (5e9 / product)
    assert found.fraction == pytest.approx(np.median(fractions))
    assert (found.lowest, found.highest) == pytest.approx((fractions.min(), fractions.max()))
    assert found.product_rate == pytest.approx(5e9 / np.median(product))


def test_workloads_alternate_in_random_order_and_warm_up_does_not_count():
    calls = []

    def workload(name: str) -> float:
        calls.append(name)
        return len(calls)

    workloads = {name: lambda name=name: workload(name) for name in "abcd"}
    times = alternate(workloads, repeats=20, warmup=1)
    repeats = ["".join(calls[i : i + 4]) for i in range(0, 84, 4)]
    assert all(sorted(repeat) == list("abcd") for repeat in repeats)
    assert len(set(repeats)) > 8
    for name in "abcd":
        assert times[name] == [i + 1 for i, own in enumerate(calls) if own == name and i >= 4]


def test_every_gpu_is_waited_for(monkeypatch):
    """A Mac's GPU queues its kernels as well."""
    calls = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append("waited"))
    for device in ("cpu", "cuda", "mps"):
        synchronize(device)
    assert len(calls) == 2


@pytest.mark.parametrize("images", [0, 1])
def test_fastest_library_is_marked(images):
    times = {"ours": [1.0], "timm": [2.0], "transformers": [1.5]}
    rows = table.compare("training", times, "ours", ["timm", "transformers"], images)
    marked = [line for line in table._comparison_table(rows) if "fastest" in line]
    assert len(marked) == 1
    assert "transformers (fastest)" in marked[0]


@pytest.mark.parametrize("library", libraries.MODELS)
def test_models_of_other_libraries_have_the_expected_size(library):
    pytest.importorskip(library.replace("-", "_"))
    ours = VisionTransformer(CONFIG)
    theirs = libraries.MODELS[library](CONFIG, ours.state_dict())
    more = sum(p.numel() for p in theirs.parameters()) - sum(p.numel() for p in ours.parameters())
    assert more == libraries.extra_parameters(CONFIG, library)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_models_of_other_libraries_give_our_logits(library):
    pytest.importorskip(library)
    torch.manual_seed(0)
    ours = VisionTransformer(CONFIG).eval()
    torch.nn.init.normal_(ours.head.weight)
    theirs = libraries.MODELS[library](CONFIG, ours.state_dict()).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        out = theirs(images)
        torch.testing.assert_close(getattr(out, "logits", out), ours(images), rtol=1e-4, atol=1e-4)


def test_our_step_trains_like_a_plain_step(monkeypatch):
    for name, value in {"EMBED_DIM": 128, "DEPTH": 1, "PATCH_SIZE": 8, "STEPS": 1}.items():
        monkeypatch.setattr(model_speed, name, value)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    ours, plain = model_speed.build("ours"), model_speed.build("ours")
    plain.load_state_dict(ours.state_dict())
    before = torch.nn.functional.cross_entropy(ours(images), labels).item()
    our_step = model_speed.our_steps(ours, images, labels, "fp32", compiled=False)
    plain_step = libraries.plain_step(plain, images, labels, "fp32")
    for _ in range(20):
        our_step()
        plain_step()
    losses = [torch.nn.functional.cross_entropy(m(images), labels).item() for m in (ours, plain)]
    assert max(losses) < before
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # weight decay differs


def test_library_that_is_not_installed_is_skipped_with_a_note(monkeypatch):
    monkeypatch.setattr(table, "_version", lambda name: None if name == "vit-pytorch" else "1")
    assert table.installed_libraries(["ours", "timm", "vit-pytorch"]) == (
        ["ours", "timm"], ["vit-pytorch is not installed and was skipped."],
    )  # fmt: skip


def test_unknown_library_and_workload_are_named(monkeypatch):
    with pytest.raises(UserError, match="'tim' is none of ours, timm"):
        table.installed_libraries(["ours", "tim"])
    with pytest.raises(UserError, match="'torchvision' is none of ours, timm, transformers"):
        table.installed_libraries(["torchvision"], finetune_head.PREPARE)
    monkeypatch.setattr(model_speed, "WORKLOADS", "training with data, fp32, compiled")
    with pytest.raises(UserError, match="'training with data, fp32, compiled' is none of"):
        model_speed.parse_workloads()


def run_all(monkeypatch, capsys, parts: str, folder: Path) -> tuple[int | str, list[str]]:
    """`python -m benchmarks` in this process: its exit status, and what it printed."""
    for name in ("PARTS", "QUICK", "REPEATS", "OUT"):
        monkeypatch.setattr(script, name, getattr(script, name))  # to be put back
    argv = ["__main__.py", "--quick", "--parts", parts, "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", argv)
    status = 0
    try:
        script.main()
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out.splitlines()


def test_run_ends_with_the_table_and_its_path(tmp_path, monkeypatch, capsys):
    small = " --libraries ours,timm --workloads 'training with data, fp32'"
    small = script.QUICK_FLAGS["model_speed"] + small
    monkeypatch.setitem(script.QUICK_FLAGS, "model_speed", small)
    status, printed = run_all(monkeypatch, capsys, "limits,model_speed,data_feeding", tmp_path)
    assert status == 0, printed
    (path,) = tmp_path.glob("table-*.md")
    text = path.read_text(encoding="utf-8")
    assert printed[-1] == str(path)
    assert text.strip() in "\n".join(printed)
    expected = ["| training with data, fp32 | timm |",
                "| data feeding, digits |", "GB/s", "torch "]  # fmt: skip
    assert [words for words in expected if words not in text] == []
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert not record["failures"]
    assert {"commit", "versions", "hardware", "command"} <= record.keys()
    limits, speed, feeding = record["parts"]
    assert speed["rows"][0]["ours_mb"] > 0
    assert {row["library"] for row in speed["utilization"]} == {"ours", "timm"}
    names = ("limits", "model_speed", "data_feeding")
    for name, part in zip(names, (limits, speed, feeding), strict=True):
        (own,) = tmp_path.glob(f"{name}-*.json")
        assert json.loads(own.read_text(encoding="utf-8")) == part
        assert part["command"].startswith(f"python -m benchmarks.{name} ")
        assert f"--out {own.with_suffix('.md')}" in part["command"]


def test_part_that_fails_is_named_and_the_table_is_still_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(script.QUICK_FLAGS, "startup", "--repeats many")
    status, printed = run_all(monkeypatch, capsys, "startup,limits", tmp_path)
    assert status == 1
    (path,) = tmp_path.glob("table-*.md")
    assert printed[-1] == str(path)
    text = path.read_text(encoding="utf-8")
    assert "startup failed with status 2: " in text
    assert "GB/s" in text
    assert len(json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["failures"]) == 1


def test_unknown_part_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="'speed' is none of limits, model_speed"):
        run_all(monkeypatch, capsys, "limits,speed", tmp_path)


def test_decoding_compares_equal_images_and_lists_the_size_of_the_cache(pets, monkeypatch, capsys):
    paths = sorted((pets / "oxford-iiit-pet" / "images").glob("*.jpg"))
    for path in paths[:6]:  # all three ways give the same pixels, up to rounding
        ours = torch.from_numpy(images.read_image(path, images.Reading(32, "bicubic"))[0].copy())
        for read in (decoding.read_pillow, decoding.read_torchvision):
            (theirs,) = decoding.Photographs([path], read, 32)
            assert (ours.int() - theirs.int()).abs().max() <= 1
    flags = ["--images", str(pets), "--workers", "0", "--repeats", "1", "--out", ""]
    monkeypatch.setattr(sys, "argv", ["decoding.py", *flags])
    decoding.main()
    printed = capsys.readouterr().out
    assert "24 photographs to squares of 256 pixels" in printed
    assert "The cache takes 197 kB per image" in printed
    assert "from 30% of the area add 502 kB" in printed
