"""Runs the trials of a sweep: Optuna's queue, and a training process for each trial.

Several terminals, or machines that share a file system, may work on the same sweep. A trial belongs
to the process that holds its file lock, and the operating system releases the lock when that
process ends, even after `kill -9`. A trial that is running according to Optuna but whose lock is
free was therefore interrupted. The next process takes it over, and its run resumes.

Optuna's heartbeat would not help: it needs RDBStorage and `Study.optimize`, which starts too many
trials when several processes share a study. It also notices an interrupted trial only after a grace
period, and retries it as a new trial.
"""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optuna
import torch
from filelock import FileLock, Timeout
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from lab.core import Run, UserError, runtime
from lab.sweep.search_space import MAX_TRIALS, Script, Space, format_value, next_point, num_points
from lab.sweep.summary import Record, draw_plots, percent, write_summary

POLL_SECONDS = 0.5
_MAX_FAILURES = 3  # abort if this many trials fail before any trial has finished an epoch
TRIAL_PROCESS = Path(__file__).with_name("trial_process.py")
# Constants that a sweep may vary although they change the pixels or the images in use.
_DATA_CONSTANTS = ("IMG_SIZE", "MODEL", "PRETRAINED", "TRAIN_FRACTION")
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class SweepConfig:
    """How a space is searched."""

    sampler: Literal["grid", "random", "tpe"]
    seed: int
    trials: int | None  # None: every point of a grid, otherwise 20
    processes: int  # trials to run in parallel
    prune_after: tuple[int, int] | None  # epochs of a trial, and finished trials; None: never

    def __post_init__(self) -> None:
        epochs, trials = self.prune_after or (1, 1)
        limits = {"TRIALS": self.trials, "PROCESSES": self.processes,
                  "PRUNE_AFTER_EPOCHS": epochs, "PRUNE_AFTER_TRIALS": trials}  # fmt: skip
        for name, value in limits.items():
            if value is not None and not 1 <= value <= MAX_TRIALS:
                raise UserError(f"{name}={value} must be between 1 and {MAX_TRIALS:,}")


class Sweep:
    """The trials in a sweep's folder."""

    def __init__(self, folder: Path, script: Script, space: Space, config: SweepConfig):
        self.folder, self.script, self.space, self.config = folder, script, space, config
        default = num_points(space) if config.sampler == "grid" else 20
        self.num_trials = int(min(config.trials or default, num_points(space)))
        pruner = optuna.pruners.NopPruner()
        if config.prune_after:
            epochs, trials = config.prune_after
            pruner = optuna.pruners.MedianPruner(trials, epochs)
        self._code = self._read_code()
        (folder / ".locks").mkdir(exist_ok=True)
        self.lock = self._file_lock("sweep")  # held while claiming a trial or writing the summary
        journal_lock = self._file_lock("journal")  # Optuna's own lock would outlive a kill
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.lock:
            with journal_lock:
                _remove_partial_line(folder / "study.journal")
            backend = JournalFileBackend(str(folder / "study.journal"), journal_lock)
            self.storage = optuna.storages.JournalStorage(backend)
            self.study = optuna.create_study(
                storage=self.storage, study_name="sweep", direction="maximize", pruner=pruner,
                sampler=optuna.samplers.RandomSampler(), load_if_exists=True,
            )  # fmt: skip

    def run(self) -> Record:
        """Runs the remaining trials, `config.processes` at a time. Returns: sweep.json.

        Raises: Stopped after Ctrl-C or SIGTERM, when the runs have saved; UserError if the first
            trials all fail, or if the code or the data changes meanwhile.
        """
        running: list[Iterator[None]] = []
        self._summarize()
        try:
            with (
                runtime.handle_signals() as stop,
                tqdm(desc="trials", disable=None, leave=False) as bar,
            ):
                while True:
                    bar.total, bar.n = self.num_trials, self._num_finished()
                    bar.refresh()
                    # The first run may have to download the data, and the others wait for that.
                    has_data = any(self.folder.glob("*/config.json"))
                    while not stop and len(running) < (self.config.processes if has_data else 1):
                        if (trial := self._claim_trial(stop)) is None:
                            break
                        running.append(trial)
                    if not running:
                        break
                    running = [trial for trial in running if next(trial, "ended") != "ended"]
                    time.sleep(POLL_SECONDS)
        finally:
            for trial in running:  # after an error or a second Ctrl-C
                trial.close()
            record = self._summarize()
            draw_plots(self.folder, record, self.space)
        if stop:
            progress = f"{self._num_finished()} of {self.num_trials} trials"
            raise runtime.Stopped(stop[0], f"{progress}: {self.folder}")
        return record

    def _read_code(self) -> dict[str, str]:
        """Hashes of the files that each trial reads again."""
        code = runtime.code_hashes(Path(self.script.path))
        model_file = Path(str(self.script.values.get("MODEL_FILE")))
        if model_file.is_file():
            code["model.py"] = runtime.source_hash(model_file.read_bytes())
        return code

    def _file_lock(self, name: str) -> FileLock:
        return FileLock(self.folder / ".locks" / name)

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _num_finished(self) -> int:
        return sum(trial.state.is_finished() for trial in self._trials())

    def _summarize(self) -> Record:
        with self.lock:
            self.num_trials = max(self.num_trials, len(self._trials()))  # may be more than TRIALS
            return write_summary(self.folder, self.study, self.space, self.num_trials)

    def _claim_trial(self, stop: list[int]) -> Iterator[None] | None:
        """An interrupted trial or a new one, for `_run_trial`; None if there are no more."""
        with self.lock:
            self._check_failures()
            if self._read_code() != self._code:
                raise UserError(
                    f"{Path(self.script.path).name} or code that it uses has changed since this "
                    "sweep started: undo the change and repeat the command, which resumes, or "
                    "start a new sweep"
                )
            for trial in self._trials():
                if trial.state == TrialState.RUNNING:
                    lock = self._file_lock(f"trial-{trial.number}")
                    with suppress(Timeout), lock.acquire(blocking=False):
                        self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
            trials = self._trials()
            if not any(trial.state == TrialState.WAITING for trial in trials):
                if len(trials) >= self.num_trials:
                    return None
                point = next_point(self.space, self.config.sampler, self.config.seed, trials)
                if point is None:
                    self.num_trials = len(trials)
                    return None
                self.study.enqueue_trial(point)
            trial = self.study.ask(self.space)
            lock = self._file_lock(f"trial-{trial.number}")
            lock.acquire()
            return self._run_trial(trial, lock, stop)

    def _check_failures(self) -> None:
        """Raises: UserError if the first trials all failed."""
        failed = [trial for trial in self._trials() if trial.state == TrialState.FAIL]
        others = [trial for trial in self._trials() if trial.state != TrialState.FAIL]
        hopeful = any(t.intermediate_values or t.state == TrialState.RUNNING for t in others)
        if len(failed) >= _MAX_FAILURES and not hopeful:
            raise UserError(
                f"the first {len(failed)} trials all failed. Trial {failed[-1].number}: "
                f"{failed[-1].user_attrs['result']['error']}\nSee {self._log(failed[-1].number)}, "
                "fix the cause and start over with --overwrite"
            )

    def _check_data(self, trial: optuna.Trial, folder: Path) -> str | None:
        """The fingerprint of a trial's data; None if its script does not record it.

        Raises: UserError if the data is not the same as in finished trials.
        """
        data = Run(folder).config().get("data")
        for other in self._trials():
            theirs = other.user_attrs.get("result", {}).get("data")
            same = all(other.params.get(n) == trial.params.get(n) for n in _DATA_CONSTANTS)
            if same and None not in (data, theirs) and data != theirs:
                raise UserError(
                    f"trial {trial.number} has different data than trial {other.number}, so their "
                    "accuracies cannot be compared: restore the data and repeat the command, which "
                    "resumes, or start a new sweep with --overwrite or another --name"
                )
        return data

    def _log(self, number: int) -> Path:
        return self.folder / f"trial-{number}.log"

    def _run_trial(self, trial: optuna.Trial, lock: FileLock, stop: list[int]) -> Iterator[None]:
        """Runs a trial from start to end, and yields whenever it has to wait.

        An interrupted trial stays as it is. Closing the generator kills the process.
        """
        process = self._start_process(trial, f"{lock.lock_file}-process")
        reported = set(self._trials()[trial.number].intermediate_values)
        is_pruned, status = False, None
        try:
            while status is None:
                yield
                status = process.poll()  # read before the history, so that no epoch is missed
                folder, rows = self._read_run(trial.number)
                accuracies = [row["val_accuracy"] for row in rows]
                for i, row in enumerate(rows):
                    if row["epoch"] not in reported:
                        reported.add(row["epoch"])
                        trial.report(max(accuracies[: i + 1]), int(row["epoch"]))
                        is_pruned = is_pruned or trial.should_prune()
                if stop or is_pruned:
                    process.stdin.close()  # the process saves and exits
            result = {
                "val_accuracy": max(accuracies, default=None),
                "epochs": len(rows),
                "seconds": round(sum(row["seconds"] for row in rows), 1),
                "folder": folder.name if folder else None,
                "error": None,
            }
            if status == 0 and folder and Run(folder).finished:
                state, note = TrialState.COMPLETE, ""
                result["seconds"] = Run(folder).metrics()["training_seconds"]
            elif is_pruned:
                state, note = TrialState.PRUNED, f"  pruned after epoch {len(rows)}"
            elif stop or status in _INTERRUPTED:
                return
            else:
                # For display only; nothing parses what a script prints.
                lines = self._log(trial.number).read_text(errors="replace").split("\n")
                lines = [line.strip() for line in lines if line.strip()] or ["no output"]
                result["error"] = f"{lines[-1].removeprefix('error: ')} (exit status {status})"
                state, note = TrialState.FAIL, f"  failed: {result['error']}"
            if folder and state != TrialState.FAIL:
                result["data"] = self._check_data(trial, folder)
            trial.set_user_attr("result", result)
            value = result["val_accuracy"]
            self.study.tell(trial, value if state == TrialState.COMPLETE else None, state)
        finally:
            process.kill()
            lock.release()
        point = "  ".join(f"{name} {format_value(value)}" for name, value in trial.params.items())
        accuracy = "" if value is None else f"  validation accuracy {percent(value)}"
        tqdm.write(f"trial {trial.number}  {point}{accuracy}  {result['seconds']:.0f} s{note}")
        self._summarize()

    def _start_process(self, trial: optuna.Trial, lock: str) -> subprocess.Popen:
        point = "-".join(f"{key.lower()}{format_value(v)}" for key, v in trial.params.items())
        name = f"{trial.number:03}-{re.sub(r'[^a-zA-Z0-9_.=+-]+', '_', point)[:100]}"
        flags = self.script.flags({**trial.params, "RESULTS_DIR": self.folder, "NAME": name})
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.config.processes > 1:
            threads = max(1, torch.get_num_threads() // self.config.processes)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        with open(self._log(trial.number), "ab") as log:
            return subprocess.Popen(
                [sys.executable, TRIAL_PROCESS, lock, self.script.path, *flags], env=environment,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only the sweep, which stops the trials
            )  # fmt: skip

    def _read_run(self, number: int) -> tuple[Path | None, list[dict[str, float]]]:
        """The folder of a trial's run and its complete epochs; none before the first one."""
        histories = self.folder.glob(f"{number:03}-*/history.csv")
        path = max(histories, key=lambda path: path.stat().st_mtime, default=None)
        return (path.parent, read_history(path)) if path else (None, [])


def read_history(path: Path) -> list[dict[str, float]]:
    """The complete rows of a history.csv, to which a run may be adding one."""
    text = path.read_text(encoding="utf-8")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [{key: float(row[key]) for key in ("epoch", "val_accuracy", "seconds")} for row in rows]


def _remove_partial_line(journal: Path) -> None:
    """Removes a last line that a kill or a full disk cut short; Optuna would stop reading there."""
    if journal.exists() and not (content := journal.read_bytes()).endswith(b"\n"):
        journal.write_bytes(content[: content.rfind(b"\n") + 1])
