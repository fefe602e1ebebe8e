"""The zip of report.py --hand-in: what is in it, and what it says is missing."""

import hashlib
import json
import os
import subprocess
import zipfile

from lab.core import code, runtime
from lab.report import hand_in, read_runs
from tests.report.json_files import change_json


def items(content, task):
    return {item["what"]: item["found"] for item in next(
        entry for entry in content["tasks"] if entry["task"] == task)["items"]}  # fmt: skip


def test_zip_holds_records_images_code_and_no_weights(place, run_report, capsys):
    run_report("--hand-in", "--results", place)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(place / "hand-in.zip")
    assert any(line.startswith("task 1.V: missing: a fine-tuned Swin") for line in printed)
    with zipfile.ZipFile(place / "hand-in.zip") as archive:
        names = set(archive.namelist())
        content = json.loads(archive.read("hand_in.json"))
        page = archive.read("hand_in.md").decode()
    run = "results/train/digits-vit_16x2-s0"
    assert {f"{run}/config.json", f"{run}/curves.png", "results/report.html", "model.py"} <= names
    assert not any(name.endswith((".safetensors", ".pt", ".zip")) for name in names)
    assert not any("official" in name for name in names)
    assert "| `python finetune_swin.py` |" in page
    assert content["code"]["model.py"] == runtime.source_hash(
        (hand_in.ROOT / "model.py").read_bytes()
    )


def test_tasks_are_done_by_finished_runs_of_the_user(place):
    content = hand_in._content(read_runs(place), {})
    assert items(content, "1.IV")["fine-tuning, mode head"]
    assert items(content, "1.IV")["fine-tuning, mode top-k"] == []
    assert len(items(content, "2.1")["a CNN to compare with the ViT"]) == 2
    assert items(content, "1.III")["a ViT trained on CIFAR-10"] == []
    for path in (place / "train").glob("*/config.json"):
        change_json(path, lambda record: record["constants"].update(MODEL_FILE="mine.py"))
    assert "mine.py" in hand_in._content(read_runs(place), {})["model_files"]


def test_items_are_not_done_by_other_models_or_runs_of_the_project(place):
    """A ResNet is no ViT, and neither a sweep of the project nor one without a result counts."""
    trained = "a ViT trained on CIFAR-10"
    path = place / "train" / "digits-vit_16x2-s0" / "config.json"
    change_json(path, lambda record: record["constants"].update(DATASET="cifar10", PATCH_SIZE=2))
    sweeps = {"official/sweep/theirs": 1, "sweep/failed": None, "sweep/mine": 1}
    for name, best in sweeps.items():
        (place / name).mkdir(parents=True)
        sweep = {"says": "", "best": best, "trials": []}
        (place / name / "sweep.json").write_text(json.dumps(sweep))
    content = hand_in._content(read_runs(place), {})
    assert items(content, "1.III")[trained] == ["digits-vit_16x2-s0"]
    assert items(content, "1.I")["runs with two patch sizes"]
    assert items(content, "1.VI")["a sweep"] == ["mine"]
    change_json(path, lambda record: record["model"].update({"class": "ResNet"}))
    content = hand_in._content(read_runs(place), {})
    assert items(content, "1.III")[trained] == []
    assert items(content, "1.I")["runs with two patch sizes"] == []


def test_a_part_counts_while_its_file_is_the_one_that_passed(tmp_path):
    file, path = tmp_path / "model.py", tmp_path / "report.json"
    file.write_text("x = 1\n")
    part = {"points": 0.13, "of": 0.13, "file": str(file), "code": runtime.source_hash(b"x = 1\n")}
    path.write_text(json.dumps({"parts": {"MLP": part}}))
    assert hand_in._read_exercise(path)["parts"]["MLP"]["current"]
    file.write_text("x = 2\n")
    assert not hand_in._read_exercise(path)["parts"]["MLP"]["current"]
    path.write_text('{"parts": {"MLP": 3}}')
    assert hand_in._read_exercise(path) == {}


def test_the_file_with_the_most_points_is_graded(place):
    parts = {
        name: {"points": points, "of": 0.2, "file": file, "code": "", "current": True}
        for name, points, file in (
            ("PatchEmbed", 0.13, "draft.py"), ("Attention", 0.2, "model.py"),
            ("evaluate", 0.0, "draft.py"), ("training_step", 0.04, "exercise/steps.py"),
        )
    }  # fmt: skip
    content = hand_in._content(read_runs(place), {"parts": parts})
    assert content["model"] == "model.py"
    assert content["steps"] == "exercise/steps.py"
    notes = hand_in.mismatched(content)
    assert [note.split("with ")[1] for note in notes] == [
        "python exercise.py --model-file model.py",
        "python exercise.py --steps-file exercise/steps.py",
    ]
    assert all("not draft.py" in note and note in page for note in notes
               for page in [hand_in._page(content | {"sha256": {}})])  # fmt: skip


def test_a_package_that_the_model_imports_is_included(tmp_path, monkeypatch):
    monkeypatch.setattr(hand_in, "ROOT", tmp_path)
    monkeypatch.setattr(code, "_ROOT", tmp_path)
    (tmp_path / "vit").mkdir()
    (tmp_path / "model.py").write_text("from vit.attention import Attention")
    package = [tmp_path / "vit" / name for name in ("__init__.py", "attention.py", "mask.py")]
    for path in (*package, tmp_path / "other.py"):
        path.touch()
    assert hand_in._imported([tmp_path / "model.py"]) == [tmp_path / "model.py", *package]


def test_edited_files_differ_from_what_was_handed_out(tmp_path):
    (tmp_path / "exercise").mkdir()
    (tmp_path / "same.py").write_text("1")
    (tmp_path / "new.py").write_text("2")
    given = {"same.py": hashlib.sha256(b"1").hexdigest()}
    (tmp_path / hand_in.HANDED_OUT).write_text(json.dumps(given))
    assert hand_in.edited_files(tmp_path) == [tmp_path / "new.py"]


def test_edited_files_are_found_in_a_subfolder_of_a_repository(tmp_path):
    lab = tmp_path / "week 3" / "lab"
    lab.mkdir(parents=True)
    (lab / "same.py").write_text("1")
    (lab / "edited.py").write_text("2")
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for words in (("init", "-q"), ("add", "."), (*name, "commit", "-q", "-m", "handed out")):
        subprocess.run(("git", *words), cwd=tmp_path, check=True, env=environment)
    (lab / "edited.py").write_text("3")
    (lab / "new.py").write_text("4")
    assert hand_in.edited_files(lab) == [lab / "edited.py", lab / "new.py"]


def test_only_a_pretrained_swin_counts_as_a_fine_tuned_swin(place):
    swin = place / "finetune_swin" / "swin"
    swin.parent.mkdir()
    (full,) = (place / "finetune").glob("*-full-*")
    full.rename(swin)

    def found(mode, name):
        def change(record):
            record["command"] = "python finetune_swin.py"
            record["constants"]["MODE"] = mode
            record["model"]["class"] = name

        change_json(swin / "config.json", change)
        return items(hand_in._content(read_runs(place), {}), "1.V")["a fine-tuned Swin"]

    assert found("full", "SwinTransformerV2") == ["swin"]
    assert found("scratch", "SwinTransformerV2") == []
    assert found("full", "ConvNeXt") == []


def test_runs_of_another_model_py_are_named(place):
    content = hand_in._content(read_runs(place), {})
    assert hand_in.mismatched(content) == []
    (run, *_) = sorted((place / "train").glob("*-s0"))
    change_json(run / "config.json", lambda record: record["code"].update({"model.py": "0"}))
    (line,) = hand_in.mismatched(hand_in._content(read_runs(place), {}))
    assert line.startswith("Note: 1 of ")
    assert run.name in line
