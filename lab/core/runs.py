"""A run's folder: its configuration, its history, and its result.

    results/<script>/<run>/config.json  history.csv  metrics.json  predictions.csv  *.png
                           best.safetensors  last.pt  (these two are not committed)

The constants, the data and the code that determines the result identify a run. The same command
finds its folder again; with other constants or other code it gets a new folder, so that nothing is
overwritten unless the user asks for it.
"""

import csv
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lab.core import identity, run_folders
from lab.core.checkpoints import (
    PARTIAL,
    explain_read_errors,
    explain_write_errors,
    read_json,
    write_atomically,
    write_json,
    write_rows,
)
from lab.core.errors import UserError
from lab.core.runtime import RUN_FOLDERS_VARIABLE, code_hashes, process_state, provenance


@dataclass(frozen=True)
class Run:
    """The folder of one run and the records in it."""

    folder: Path
    NOT_IDENTITY: ClassVar[tuple[str, ...]] = identity.NOT_IDENTITY
    FOLDERS_VARIABLE: ClassVar[str] = RUN_FOLDERS_VARIABLE  # `open` writes to the file it names

    @classmethod
    def open(
        cls,
        results_dir: Path,
        name: str,
        constants: dict[str, Any],
        metadata: dict[str, Any],
        overwrite: bool,
        resume_changed_code: bool = False,
        shared: bool = False,
        scripts: tuple[Path, ...] = (),
    ) -> "Run":
        """Finds the folder of this run, or creates it, and locks it for this process.

        Args:
            results_dir: `results/<script>`.
            name: the run's name, unless another run already has it.
            constants: every constant, as resolved.
            metadata: further entries of config.json, such as the model and the dataset, whose
                fingerprint is part of the identity.
            overwrite: start over, replacing the records of the same run.
            resume_changed_code: a stopped run resumes although the code has changed since; its
                config.json keeps the hashes of the earlier code.
            shared: several processes may work in the folder, so it is not locked.
            scripts: further scripts that determine the result, besides the running one.

        Raises: UserError, for an invalid folder name, a run that another process is training right
            now, or a folder that cannot be written.
        """
        main = process_state().is_main_process
        lock = main and not shared
        ours = {
            "constants": {k: v for k, v in constants.items() if k not in cls.NOT_IDENTITY},
            "data": metadata["dataset"]["fingerprint"],
            "code": code_hashes() | (code_hashes(*scripts) if scripts else {}),
        }
        has_user_name = constants.get("NAME") is not None
        if has_user_name:
            run_folders.check_name(name)
        else:
            name = run_folders.valid_name(name)
        run_folders.prepare_results_dir(results_dir, clean=main)
        while True:
            same_name = identity.runs_named(results_dir, name)
            folder = identity.find_run(same_name, ours, resume_changed_code and not overwrite)
            if folder and not (overwrite and main):
                if lock:
                    _claim(folder)
                if main and same_name[folder].get("code") != ours["code"]:
                    _adopt_code(folder, same_name[folder], ours)
                break
            if folder:
                _discard(folder, lock)
            # A name that the user did not choose shows how the run differs.
            distinguishing = {} if has_user_name else ours["constants"]
            new = folder or run_folders.free_folder(results_dir, name, same_name, distinguishing)
            config = {"name": name, **ours, **metadata, **provenance()}
            if run_folders.create(new, config, lock):
                if main and same_name and not folder:
                    print(identity.explain_new_run(same_name, ours, new))
                folder = new
                break
            overwrite = False  # another process has just taken the folder: look again
        if main:
            cls.announce(folder)
        return cls(folder)

    @classmethod
    def announce(cls, folder: Path) -> None:
        """Tells the program that started this script, if there is one, where its results are."""
        if report := os.environ.get(cls.FOLDERS_VARIABLE):
            with explain_write_errors(Path(report)), open(report, "a", encoding="utf-8") as file:
                file.write(f"{folder}\n")

    @staticmethod
    def newest() -> str:
        """The folder of the run of train.py that finished last, which it prints.

        Raises: UserError, if no run has finished.
        """
        found = list(Path("results/train").glob("*/metrics.json"))
        if not found:
            raise UserError(
                "there is no finished run in results/train: make one with python train.py, or name "
                "a model, such as --model weights/vit_128x6_cifar10.safetensors"
            )
        folder = max(found, key=lambda path: path.stat().st_mtime).parent
        print(f"model: {folder}, the newest run of train.py (another one: --model)")
        return str(folder)

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").exists()

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json. Raises: UserError, if it cannot be read."""
        return read_json(self.folder / "metrics.json")

    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises: UserError, if it cannot be read."""
        return read_json(self.folder / "config.json")

    def history(self) -> list[dict[str, Any]]:
        """The rows of history.csv, with numbers as numbers.

        Raises: UserError, if the file cannot be read.
        """
        path = self.folder / "history.csv"
        with explain_read_errors(path), open(path, newline="", encoding="utf-8") as file:
            return [
                {k: json.loads(v or "null") for k, v in row.items()} for row in csv.DictReader(file)
            ]

    def summary(self) -> str:
        """The result in two lines; the second is the path of the curves."""
        m = self.metrics()
        with explain_read_errors(self.folder / "metrics.json"):
            low, high = (100 * share for share in m["test_accuracy_95"])
            if not 0 <= m["test_accuracy"] <= 1:
                raise ValueError(m["test_accuracy"])
            return (
                f"test accuracy {100 * m['test_accuracy']:.2f} % (95 % interval {low:.1f} to "
                f"{high:.1f}, {m['test_images']} images), epoch {m['best_epoch']} of "
                f"{m['epochs']}, {m['training_seconds']:.0f} s of training\n"
                f"{self.folder / 'curves.png'}"
            )

    def say_finished(self) -> None:
        """Prints the result of a run that need not be trained again."""
        if process_state().is_main_process:
            print(f"{self.summary()}\nthis run is finished; --overwrite repeats it")

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Replaces history.csv, as when a resumed run repeats an epoch."""
        write_atomically(self.folder / "history.csv", lambda scratch: write_rows(scratch, rows))

    def append_history(self, row: dict[str, Any]) -> None:
        """Appends an epoch's row; other programs can read the file during training."""
        path = self.folder / "history.csv"
        with (
            explain_write_errors(path),
            open(path, "a", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def _claim(folder: Path) -> None:
    """Locks a run that is not finished, and removes files that a killed process left in it."""
    if not (folder / "metrics.json").exists():
        run_folders.lock(folder)
        for leftover in folder.rglob(f"*{PARTIAL}"):
            leftover.unlink(missing_ok=True)


def _adopt_code(folder: Path, config: dict[str, Any], ours: identity.Identity) -> None:
    """Records in config.json that a run continues with other code."""
    changed = identity.changed_files(config, ours)
    print(f"{folder} resumes although {changed} changed; config.json records the change")
    entry = {"code": config.get("code"), "until": provenance()["started"]}
    earlier = [*config.get("earlier_code", []), entry]
    write_json(folder / "config.json", {**config, "code": ours["code"], "earlier_code": earlier})


def _discard(folder: Path, lock: bool) -> None:
    """Deletes a run that starts over. Raises: UserError, if another process is working in it."""
    from filelock import FileLock, Timeout

    if lock:
        _claim(folder)
    for path in folder.glob(".locks/*"):  # of the trials of a sweep
        try:
            with FileLock(path, blocking=False):
                pass
        except Timeout:
            raise UserError(
                f"{folder} is in use by another process: wait until it ends, or stop it"
            ) from None
    print(f"{folder}: starting over and replacing the earlier records")
    run_folders.unlock(folder)
    with explain_write_errors(folder):
        shutil.rmtree(folder)
