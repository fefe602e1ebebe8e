"""A run's folder: what was asked for, what happened, epoch by epoch, and what came out.

    results/<script>/<run>/config.json  history.csv  metrics.json  predictions.csv  *.png
                           best.safetensors  last.pt  (these two are not committed)

The folder's name is readable. The same constants on the same data find their folder again; other
constants under the same name open a new one (`-2`, `-3`, ...): nothing is overwritten unasked.
"""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.core.checkpoints import write_atomically, write_json, write_rows
from lab.core.errors import UserError
from lab.core.runtime import process_state, provenance

# Constants that change no result:
NOT_IDENTITY = ("NAME", "OVERWRITE", "DATA_DIR", "RESULTS_DIR", "NUM_SEEDS", "TENSORBOARD")


@dataclass(frozen=True)
class Run:
    """The folder of one run and the records in it."""

    folder: Path

    @classmethod
    def open(
        cls, place: Path, name: str, constants: dict[str, Any], facts: dict[str, Any], fresh: bool
    ) -> "Run":
        """Finds the folder of this very run, or makes a new one.

        Args:
            place: `results/<script>`.
            name: what the run is called unless that is taken by another one.
            constants: every constant, as resolved; they and the dataset identify the run.
            facts: what else belongs into config.json: model, dataset, ...
            fresh: start over, replacing the records that are there.
        """
        main = process_state().is_main_process
        asked = {k: v for k, v in constants.items() if k not in NOT_IDENTITY}
        identity = {"constants": asked, "data": facts["dataset"]["fingerprint"]}
        number = 1
        while True:
            folder = place / (name if number == 1 else f"{name}-{number}")
            there = read_identity(folder)
            if there == identity and fresh and main:
                print(f"{folder}: starting over, its earlier records are replaced")
                shutil.rmtree(folder)
                there = None
            elif there == identity:
                return cls(folder)
            if there is None and not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "config.json", {**identity, **facts, **provenance()})
                return cls(folder)
            if there is not None and main:
                print(f"{folder} is another run ({describe_differences(there, identity)})")
            number += 1

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").exists()

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))

    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    def history(self) -> list[dict[str, Any]]:
        """The rows of history.csv, numbers as numbers."""
        with open(self.folder / "history.csv", newline="", encoding="utf-8") as file:
            return [
                {k: json.loads(v or "null") for k, v in row.items()} for row in csv.DictReader(file)
            ]

    def summary(self) -> str:
        """What came out, in two lines."""
        m = self.metrics()
        low, high = (100 * share for share in m["test_accuracy_95"])
        return (
            f"test accuracy {100 * m['test_accuracy']:.2f} % (95 % interval {low:.1f} to "
            f"{high:.1f}, {m['test_images']} images), epoch {m['best_epoch']} of {m['epochs']}, "
            f"{m['training_seconds']:.0f} s of training\n{self.folder / 'curves.png'}"
        )

    def say_finished(self) -> None:
        if process_state().is_main_process:
            print(f"{self.summary()}\nthis run is finished; --overwrite repeats it")

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Replaces history.csv, as when a resumed run takes back an epoch cut short."""
        write_atomically(self.folder / "history.csv", lambda scratch: write_rows(scratch, rows))

    def append_history(self, row: dict[str, Any]) -> None:
        """Adds an epoch's row; the file can be read while the run goes on."""
        path = self.folder / "history.csv"
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    @staticmethod
    def newest(place: Path, advice: str) -> Path:
        """Returns the folder below `place` whose run finished last.

        Args:
            place: `results/<script>`.
            advice: the command that makes a run, for the message.

        Raises: UserError if no run has finished there.
        """
        finished = list(place.glob("*/metrics.json"))
        if not finished:
            raise UserError(f"{place} contains no finished run. Start one with {advice}, or name "
                            "a model: --model weights/vit_128x6_cifar10.safetensors")  # fmt: skip
        return max(finished, key=lambda path: path.stat().st_mtime).parent


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What makes the run in a folder that run; None where there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {"constants": config["constants"], "data": config["data"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe_differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The constants that tell two runs apart, in words."""
    a, b = one["constants"], other["constants"]
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
    told = [f"{k} {a.get(k)} there, {b.get(k)} here" for k in keys[:3]]
    if one["data"] != other["data"]:
        told.append("other data")
    return "; ".join(told + ([f"and {len(keys) - 3} more"] if len(keys) > 3 else []))
