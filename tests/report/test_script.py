"""report.py as a user runs it."""

import os
import pickle

import pytest
from PIL import Image

import report
from lab.core import UserError
from lab.report import build_content, read_runs
from lab.report.folders import plot, thumbnail
from tests.report.json_files import change_json


def test_page_and_tables_are_written_into_the_results_folder(place, run_report, capsys):
    run_report("--results", place)
    assert (place / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (place / "README.md").read_text(encoding="utf-8").startswith("# Results\n")
    assert capsys.readouterr().out.splitlines()[-1] == str(place / "report.html")


def test_missing_folder_is_an_error_with_advice(tmp_path, run_report):
    with pytest.raises(UserError, match="train a model first"):
        run_report("--results", tmp_path / "nowhere")


def test_single_run_is_an_error_that_names_the_folder_to_pass(place, run_report, monkeypatch):
    run = place / "train" / "digits-vit_16x2-s0"
    with pytest.raises(UserError, match=f"is a single run.*--results {place / 'train'}$"):
        run_report("--results", run)
    monkeypatch.chdir(run)
    with pytest.raises(UserError, match=f"--results {place / 'train'}$"):
        run_report("--results", ".")
    assert not (run / "report.html").exists()
    run_report("--results", place / "train")


def test_a_readme_of_somebody_else_is_not_replaced(place, run_report, monkeypatch):
    run_report("--results", place)
    run_report("--results", place)  # its own file
    (place / "README.md").write_text("# My project\n")
    with pytest.raises(UserError, match=r"README.md would be replaced, but .* pass another folder"):
        run_report("--results", place)
    assert (place / "README.md").read_text() == "# My project\n"
    monkeypatch.setattr(report, "_OFFICIAL", place.resolve())
    with pytest.raises(UserError, match="the project's own runs: use --official"):
        run_report("--results", place)


def test_control_characters_are_not_printed(place, run_report, capsys):
    path = place / "train" / "digits-vit_16x2-s0" / "config.json"
    change_json(path, lambda record: record["dataset"].update(name="\x1b]0;title\x07\ud800"))
    (place / "train" / "empty\x1b[31m").mkdir()
    run_report("--results", place)
    printed = capsys.readouterr().out
    assert "empty?[31m" in printed
    assert "\x1b" not in printed
    assert "\ud800" not in printed


def test_incomplete_cifar10_is_not_downloaded(place, tmp_path, monkeypatch):
    """Runs on CIFAR-10 and an empty data folder, where torchvision would download."""
    from torchvision.datasets import CIFAR10

    downloads = []
    monkeypatch.setattr(CIFAR10, "download", lambda self: downloads.append(self.root))
    for path in place.rglob("config.json"):
        change_json(path, lambda record: record["constants"].update(DATASET="cifar10"))
    data = tmp_path / "data"
    (data / "cifar-10-batches-py").mkdir(parents=True)
    content = build_content(read_runs(place), data)
    assert thumbnail("cifar10", "test/3", data) is None
    assert thumbnail("fashion-mnist", "test/3", data) is None
    hardest = [image for group in content["comparisons"] for image in group["hardest"]]
    assert hardest
    assert all(image["thumbnail"] is None for image in hardest)
    assert downloads == []


def test_only_image_files_of_listed_formats_are_opened(tmp_path, monkeypatch):
    """PostScript would be passed on to Ghostscript, which can run programs."""
    from PIL import EpsImagePlugin

    def ghostscript(*_, **__):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    Image.new("RGB", (8, 8)).save(tmp_path / "page.eps", "EPS")
    postscript = (tmp_path / "page.eps").read_bytes()
    assert postscript.startswith(b"%!PS")
    (tmp_path / "score.png").write_bytes(postscript)
    (tmp_path / "pickle.png").write_bytes(pickle.dumps("not an image"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("score.png", "pickle.png", "pipe.png", "loop.png", "folder.png"):
        assert plot(tmp_path, name) is None
        assert thumbnail(str(tmp_path), name, tmp_path) is None
    Image.new("RGB", (8, 8)).save(tmp_path / "score.png")
    assert plot(tmp_path, "score.png").startswith("data:image/jpeg;base64,")
