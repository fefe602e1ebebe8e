"""The benchmarks: what their figures mean, and that the one command ends well; no time decides."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as whole
from benchmarks import model_speed, peers, table
from benchmarks.timing import alternate
from model import VisionTransformer, ViTConfig

CONFIG = ViTConfig(img_size=32, patch_size=8, num_classes=10, embed_dim=128, depth=2, num_heads=2)


def random_times(*names: str) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    return {name: list(rng.uniform(0.5, 2, 7)) for name in names}


def test_a_row_is_the_median_of_the_ratios_of_each_turn():
    times = random_times("ours", "timm", "transformers")
    rows = table.compared("work", times, "ours", ["timm", "transformers"], images=64)
    for row in rows:
        found = np.array(times[row.peer]) / np.array(times["ours"])
        assert row.ratio == pytest.approx(np.median(found))
        assert (row.low, row.high) == pytest.approx((found.min(), found.max()))
        assert row.ours == pytest.approx(64 / np.median(times["ours"]))
        assert row.theirs == pytest.approx(64 / np.median(times[row.peer]))
        assert row.unit == "images/s"


@pytest.mark.parametrize("images", [0, 64])
def test_a_ratio_above_one_means_that_ours_is_faster(images):
    times = {"ours": [1.0, 1.1, 0.9], "timm": [2.0, 2.2, 1.8]}
    (row,) = table.compared("work", times, "ours", ["timm"], images, {"ours": 1, "timm": 2})
    assert row.ratio == pytest.approx(2)
    assert (row.ours > row.theirs) == bool(images)  # images/s, or seconds
    assert (row.ours_mb, row.theirs_mb) == (1, 2)


def test_a_share_is_that_of_the_products_rate_in_the_same_turn():
    times = random_times("ours", "product")
    (share,) = table.shares("work", times, "product", flop=3e9, product_flop=5e9)
    ours, product = (np.array(times[name]) for name in ("ours", "product"))
    found = (3e9 / ours) / (5e9 / product)
    assert share.share == pytest.approx(np.median(found))
    assert (share.low, share.high) == pytest.approx((found.min(), found.max()))
    assert share.product == pytest.approx(5e9 / np.median(product))


def test_works_alternate_and_the_warm_up_does_not_count():
    calls = []

    def work(name: str) -> float:
        calls.append(name)
        return len(calls)

    works = {name: lambda name=name: work(name) for name in "abcd"}
    times = alternate(works, repeats=20, warmup=1)
    turns = ["".join(calls[i : i + 4]) for i in range(0, 84, 4)]
    assert all(sorted(turn) == list("abcd") for turn in turns)
    assert len(set(turns)) > 8  # in another order at every turn
    for name in "abcd":
        assert times[name] == [i + 1 for i, own in enumerate(calls) if own == name and i >= 4]


def test_the_fastest_of_several_peers_is_marked():
    times = {"ours": [1.0], "timm": [2.0], "transformers": [1.5]}
    rows = table.compared("work", times, "ours", ["timm", "transformers"])
    marked = [line for line in table.row_lines(rows) if "the fastest" in line]
    assert len(marked) == 1
    assert "transformers (the fastest)" in marked[0]


@pytest.mark.parametrize("library", peers.IN)
def test_the_libraries_models_have_as_many_parameters_as_ours(library):
    pytest.importorskip(library.replace("-", "_"))
    ours = VisionTransformer(CONFIG)
    theirs = peers.IN[library](CONFIG, ours.state_dict())
    more = sum(p.numel() for p in theirs.parameters()) - sum(p.numel() for p in ours.parameters())
    assert more == peers.parameters_beside(CONFIG, library)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_libraries_models_give_our_logits(library):
    pytest.importorskip(library)
    torch.manual_seed(0)
    ours = VisionTransformer(CONFIG).eval()
    torch.nn.init.normal_(ours.head.weight)
    theirs = peers.IN[library](CONFIG, ours.state_dict()).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        out = theirs(images)
        torch.testing.assert_close(getattr(out, "logits", out), ours(images), rtol=1e-4, atol=1e-4)


def test_our_step_and_the_usual_step_do_the_same(monkeypatch):
    """The step that is timed as ours trains, as a plain loop with the same optimizer would."""
    for name, value in {"EMBED_DIM": 128, "DEPTH": 1, "PATCH_SIZE": 8}.items():
        monkeypatch.setattr(model_speed, name, value)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    models = []
    build = model_speed.built
    monkeypatch.setattr(model_speed, "built", lambda name: models.append(build(name)) or models[-1])
    monkeypatch.setattr(model_speed, "STEPS", 1)
    step = model_speed.loop_steps(images, labels, bf16=False, compiled=False)
    (ours,) = models
    usual = VisionTransformer(model_speed.config())
    usual.load_state_dict(ours.state_dict())
    before = torch.nn.functional.cross_entropy(ours(images), labels).item()
    plain = model_speed.usual_step(usual, images, labels, bf16=False)
    for _ in range(20):
        step()
        plain()
    losses = [torch.nn.functional.cross_entropy(m(images), labels).item() for m in (ours, usual)]
    assert max(losses) < before
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # weights decay differently


def test_a_peer_that_is_not_installed_is_skipped_with_a_remark(monkeypatch):
    monkeypatch.setattr(table, "installed", lambda name: None if name == "vit-pytorch" else "1")
    assert table.present(["ours", "timm", "vit-pytorch"]) == (
        ["ours", "timm"], ["vit-pytorch is not installed: skipped."],
    )  # fmt: skip


def test_a_peer_that_nobody_knows_is_named():
    with pytest.raises(SystemExit, match="'tim' is none of ours, timm"):
        table.present(["ours", "tim"])


def run_all(monkeypatch, capsys, parts: str, folder: Path) -> tuple[int | str, list[str]]:
    """`python -m benchmarks` in this process: its exit status, and what it printed."""
    for name in ("PARTS", "QUICK", "REPEATS", "OUT"):
        monkeypatch.setattr(whole, name, getattr(whole, name))  # to be put back
    argv = ["__main__.py", "--quick", "--parts", parts, "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", argv)
    status = 0
    try:
        whole.main()
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out.splitlines()


def test_a_whole_run_ends_with_the_table_and_its_path(tmp_path, monkeypatch, capsys):
    few = whole.QUICK_FLAGS["model_speed"] + " --libraries ours,timm --works 'training, fp32'"
    monkeypatch.setitem(whole.QUICK_FLAGS, "model_speed", few)
    status, printed = run_all(monkeypatch, capsys, "limits,model_speed,data_feeding", tmp_path)
    assert status == 0, printed
    (path,) = tmp_path.glob("table-*.md")
    text = path.read_text(encoding="utf-8")
    assert printed[-1] == str(path)
    assert text.strip() in "\n".join(printed)
    for words in ("| training, fp32 | timm |", "| data feeding, digits |", "GB/s", "torch "):
        assert words in text
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert [part["part"] for part in record["parts"]] == ["limits", "model_speed", "data_feeding"]
    assert not record["failed"]
    assert {"commit", "versions", "hardware", "command"} <= record.keys()
    _, speed, _ = record["parts"]
    assert speed["rows"][0]["ours_mb"] > 0
    assert {share["name"] for share in speed["shares"]} == {"ours", "timm"}
    for part in record["parts"]:  # each left its own, with the command that makes it again
        kept = next(tmp_path.glob(f"{part['part']}-*.json"))
        assert json.loads(kept.read_text(encoding="utf-8")) == part
        assert f"--out {kept.with_suffix('.md')}" in part["command"]


def test_a_part_that_fails_is_named_and_the_table_still_comes(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(whole.QUICK_FLAGS, "startup", "--repeats many")
    status, printed = run_all(monkeypatch, capsys, "startup,limits", tmp_path)
    assert status == 1
    (path,) = tmp_path.glob("table-*.md")
    assert printed[-1] == str(path)
    text = path.read_text(encoding="utf-8")
    assert "startup failed with status 2: " in text
    assert "GB/s" in text
    assert len(json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["failed"]) == 1


def test_a_part_that_does_not_exist_is_refused_at_once(tmp_path, monkeypatch, capsys):
    refusal, _ = run_all(monkeypatch, capsys, "limits,speed", tmp_path)
    assert "'speed' is none of limits, model_speed" in refusal
