"""Grading: a submission only loses its own points, whatever it does."""

import csv
import json
import zipfile

import pytest

from exercise import POINTS
from lab.core import UserError, runtime
from lab.exercise import grading
from lab.exercise.grading import check_runs, grade
from lab.exercise.processes import Job
from lab.exercise.submissions import HandIn, read_submissions
from tests.exercise.conftest import ROOT, STUDENT, WEIGHTS, edited, pasted

PARTS = ("PatchEmbed", "MLP")  # fewer parts make the test faster
TABLE = {part: POINTS[part] for part in PARTS}
FULL = {part: sum(checks.values()) for part, checks in TABLE.items()}


def run(folder):
    job = Job(ROOT, None, PARTS, 1, WEIGHTS, 2.0, 1000)
    totals = {}
    path = grade(folder, TABLE, job, lambda name, points: totals.update({name: points}))
    with open(folder / "grades.csv", newline="", encoding="utf-8-sig") as file:
        rows = {(row["student"], row["part"]): row for row in csv.DictReader(file)}
    return totals, rows, path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("submissions")
    good = pasted(STUDENT)
    relu = pasted(edited("MLP", [("F.gelu(h)", "F.relu(h)")]))
    (folder / "good.py").write_text(good, encoding="utf-8")
    (folder / "relu.py").write_text(relu, encoding="utf-8")
    (folder / "folder").mkdir()
    (folder / "folder" / "model.py").write_text(good, encoding="utf-8")
    (folder / "loops.py").write_text(good + "\nwhile True: pass\n", encoding="utf-8")
    (folder / "kills itself.py").write_text(
        good + "\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", encoding="utf-8"
    )
    (folder / "prints.py").write_text(good + "\nprint('\\x00\\xff{]}' * 1000)\n", encoding="utf-8")
    (folder / "syntax.py").write_text("def f(:\n", encoding="utf-8")
    (folder / "writes.py").write_text(
        good + f"\nopen({str(folder / 'zoe.py')!r}, 'w').write('broken(')\n", encoding="utf-8"
    )
    (folder / "zoe.py").write_text(good, encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "list.xlsx").write_text("no submission")
    (folder / "not a zip.zip").write_text("no")
    with zipfile.ZipFile(folder / "zipped.zip", "w") as archive:
        archive.writestr("hand-in/model.py", good)
        archive.writestr("../../escape.py", "raise SystemExit")
        digest = runtime.source_hash(good.encode())
        for name, code in (("mine", {"model.py": digest}), ("other", {"model.py": "0" * 64}),
                           ("old", None)):  # fmt: skip
            archive.writestr(
                f"hand-in/results/{name}/config.json",
                json.dumps({"code": code, "command": "python train.py"}),
            )
    return folder, *run(folder)


def test_points_and_diagnosis_of_each_part(graded):
    _, totals, rows, _ = graded
    assert (
        totals["good"] == totals["folder"] == totals["zipped"] == pytest.approx(sum(FULL.values()))
    )
    assert float(rows["good", "MLP"]["points"]) == pytest.approx(FULL["MLP"])
    assert float(rows["relu", "MLP"]["points"]) == pytest.approx(TABLE["MLP"]["shapes"])
    assert "ReLU" in rows["relu", "MLP"]["diagnosis"]
    assert float(rows["relu", "PatchEmbed"]["points"]) == pytest.approx(FULL["PatchEmbed"])


@pytest.mark.parametrize(("student", "says"), [
    ("loops", "still running"), ("kills itself", "SIGKILL"), ("syntax", "line 1"),
    ("empty", "no model.py"), ("not a zip", "cannot be read"),
])  # fmt: skip
def test_a_submission_only_loses_its_own_points(graded, student, says):
    _, totals, rows, _ = graded
    assert totals[student] == 0
    assert says in rows[student, "MLP"]["diagnosis"]
    assert totals["zoe"] == pytest.approx(sum(FULL.values()))


def test_printing_garbage_changes_nothing(graded):
    assert graded[1]["prints"] == pytest.approx(sum(FULL.values()))


def test_a_submission_that_writes_to_others_is_named(graded):
    """All submissions were read before, so it changes nothing; a teacher may have changed it."""
    _, totals, rows, _ = graded
    assert totals["writes"] == totals["zoe"] == pytest.approx(sum(FULL.values()))
    assert (
        "zoe.py changed while this submission was checked" in rows["writes", "files"]["diagnosis"]
    )


def test_totals_have_a_row_per_student(graded):
    folder, totals, _, _ = graded
    with open(folder / "totals.csv", newline="", encoding="utf-8-sig") as file:
        found = {row["student"]: float(row["points"]) for row in csv.DictReader(file)}
    assert found == pytest.approx(totals)


def test_files_that_are_no_submissions_are_listed(graded):
    assert "because they are not submissions: list.xlsx." in graded[3]


def test_a_zip_of_a_learning_platform_is_found_in_its_folder(tmp_path):
    (tmp_path / "Anna Müller_123").mkdir()
    with zipfile.ZipFile(tmp_path / "Anna Müller_123" / "anna.zip", "w") as archive:
        archive.writestr("lab/model.py", pasted(STUDENT))
    with zipfile.ZipFile(tmp_path / "bob.zip", "w") as archive:
        archive.writestr("hand-in.zip", "")
    totals, rows, _ = run(tmp_path)
    assert totals["Anna Müller_123"] == pytest.approx(sum(FULL.values()))
    assert "hand-in.zip is inside: unpack it" in rows["bob", "MLP"]["diagnosis"]


def test_a_hand_in_beside_a_model_is_read(tmp_path):
    named = json.dumps({"model": "my.py", "steps": "exercise/my_steps.py"})
    for name, manifest in (("ada", named), ("bob", "{}"), ("eve", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text("a = 1")
        with zipfile.ZipFile(tmp_path / name / "hand-in.zip", "w") as archive:
            archive.writestr("my.py", "a = 2")
            archive.writestr("model.py", "a = 1")
            archive.writestr("exercise/my_steps.py", "")
            if manifest:
                archive.writestr("hand_in.json", manifest)
    (tmp_path / "bob" / "two.zip").touch()
    ada, bob, eve = read_submissions(tmp_path, ())[0]
    assert (ada.model, ada.steps) == ("my.py", "exercise/my_steps.py")
    assert ada.skipped == ["model.py is not graded, because it differs from my.py in hand-in.zip"]
    assert bob.skipped == ["hand-in.zip was not read", "two.zip was not read"]
    assert eve.skipped == ["hand-in.zip was not read"]
    assert list(eve.files) == ["model.py"]


def test_the_grades_before_are_kept_until_all_are_graded(tmp_path, monkeypatch):
    (tmp_path / "ada.py").write_text(pasted(STUDENT), encoding="utf-8")
    run(tmp_path)
    first = (tmp_path / "grades.csv").read_text()
    (tmp_path / "bob.py").write_text("x = ", encoding="utf-8")
    check = grading._run_submission

    def interrupted(hand_in, job):
        if hand_in.student == "bob":
            raise KeyboardInterrupt
        return check(hand_in, job)

    with monkeypatch.context() as patch:
        patch.setattr(grading, "_run_submission", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert (tmp_path / "grades.csv").read_text() == first
    assert "ada" in (tmp_path / "grades.part.csv").read_text()
    run(tmp_path)
    assert "bob" in (tmp_path / "grades.csv").read_text()
    assert (tmp_path / "grades-previous.csv").read_text() == first
    assert not (tmp_path / "grades.part.csv").exists()


def test_shared_models_and_official_runs_are_no_runs_of_a_student():
    files = {"model.py": b"", "results/share/a/config.json": b'{"architecture": "vit"}',
             "results/official/train/b/config.json": b'{"command": "python train.py"}',
             "theory/patch_size/c/config.json": b'{"command": "python train.py"}'}  # fmt: skip
    assert check_runs(HandIn("ada", files)) == []


def test_runs_are_compared_with_the_submitted_model(graded):
    _, _, rows, _ = graded
    assert ("zipped", "run hand-in/results/mine") not in rows
    assert "different model.py" in rows["zipped", "run hand-in/results/other"]["diagnosis"]
    assert "cannot be verified" in rows["zipped", "run hand-in/results/old"]["diagnosis"]


def test_summary_names_mistakes_and_what_the_limits_are_not(graded):
    summary = graded[3]
    assert "| MLP | ReLU instead of GELU | 1 |" in summary
    assert "not a sandbox" in summary
    assert "seed 1" in summary


def test_grading_again_ignores_its_own_files(graded):
    folder, totals, _, _ = graded
    for path in folder.iterdir():
        if path.name not in ("good.py", "grades.csv", "totals.csv", "summary.md"):
            path.rename(folder.parent / f"away {path.name}")
    again, _, _ = run(folder)
    assert again == {"good": totals["good"]}


def test_a_run_without_a_readable_config_is_reported():
    hand_in = HandIn("ada", {"model.py": b"", "results/run/config.json": b"{"})
    assert check_runs(hand_in) == [("run results/run", "config.json cannot be read")]


def test_a_diagnosis_is_no_formula(tmp_path):
    (tmp_path / "=cmd.py").write_text("x = ", encoding="utf-8")
    run(tmp_path)
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8-sig") as file:
        assert all(not cell.startswith("=") for row in csv.reader(file) for cell in row)


def test_an_empty_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no submissions"):
        run(tmp_path)


def test_unsafe_files_of_a_zip_are_not_read(tmp_path):
    link = zipfile.ZipInfo("exercise/steps.py")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "ada.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.py", pasted(STUDENT))
        archive.writestr(link, "/etc/passwd")
        for name in ("../up.py", "/root.py", "C:/drive.py", "..\\b.py"):
            archive.writestr(name, "raise SystemExit")
        archive.writestr("large.py", b" " * 10**8)
    (hand_in,) = read_submissions(tmp_path, ())[0]
    assert list(hand_in.files) == ["model.py"]
    assert len(hand_in.skipped) == 6
    assert any("symbolic link" in says for says in hand_in.skipped)
    assert any("large.py is too large" in says for says in hand_in.skipped)


def test_a_zip_with_the_paths_of_windows_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "Ada.ZIP", "w") as archive:
        archive.writestr("exercise\\model.py", "a = 1")
    (hand_in,) = read_submissions(tmp_path, ())[0]
    assert hand_in.model == "exercise/model.py"
    assert not hand_in.skipped


def test_a_damaged_zip_does_not_stop_the_grading(tmp_path):
    for name in ("ada", "eve"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model.py", "".join(map(str, range(10_000))))
    content = bytearray((tmp_path / "ada.zip").read_bytes())
    content[200:300] = bytes(100)  # inside the compressed data
    (tmp_path / "ada.zip").write_bytes(content)
    ada, eve = read_submissions(tmp_path, ())[0]
    assert "cannot be read" in ada.problem
    assert not eve.problem


def test_files_of_other_kinds_are_named_and_two_of_one_student_refused(tmp_path):
    (tmp_path / "ada.7z").touch()
    (tmp_path / "list.xlsx").touch()
    (hand_in,), ignored = read_submissions(tmp_path, ())
    assert hand_in.problem == ".7z files are not read: hand in a .py file, a folder or a .zip"
    assert ignored == ["list.xlsx"]
    for name in ("eve.py", "eve.zip"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="several submissions of eve"):
        read_submissions(tmp_path, ())


def test_only_changes_of_submissions_that_were_there_count(tmp_path, monkeypatch):
    """Not a lock file of a program that shows grades.csv, nor a submission that arrives late."""
    (tmp_path / "ada.py").write_text(pasted(STUDENT), encoding="utf-8")
    check = grading._run_submission

    def check_while_others_write(*arguments):
        (tmp_path / ".~lock.grades.csv#").touch()
        (tmp_path / "late.py").touch()
        return check(*arguments)

    monkeypatch.setattr(grading, "_run_submission", check_while_others_write)
    assert ("ada", "files") not in run(tmp_path)[1]


def test_symbolic_links_are_not_followed(tmp_path):
    (tmp_path / "secret.py").write_text("secret = 1")
    (tmp_path / "in" / "ada").mkdir(parents=True)
    (tmp_path / "in" / "ada" / "model.py").symlink_to(tmp_path / "secret.py")
    (tmp_path / "in" / "bob.py").symlink_to(tmp_path / "secret.py")
    ada, bob = read_submissions(tmp_path / "in", ())[0]
    assert ada.files == bob.files == {}
    assert ada.skipped == ["model.py is a symbolic link"]
    assert "symbolic link" in bob.problem


def test_the_model_is_the_one_that_the_hand_in_names():
    files = {"model.py": b"1", "exercise/model.py": b"2", "hand_in.json": b"{}"}
    assert HandIn("ada", files).model == "model.py"
    files["hand_in.json"] = json.dumps({"model": "exercise/model.py"}).encode()
    assert HandIn("ada", files).model == "exercise/model.py"


def test_the_steps_are_those_that_the_hand_in_names():
    files = {"model.py": b"1", "steps.py": b"", "my_steps.py": b"", "hand_in.json": b"{}"}
    assert HandIn("ada", files).steps == "steps.py"
    files["hand_in.json"] = json.dumps({"steps": "my_steps.py"}).encode()
    assert HandIn("ada", files).steps == "my_steps.py"
