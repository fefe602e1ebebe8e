"""The trials of a sweep: a queue in Optuna's storage, and a process for each trial, watched.

Any number of sweeps, in several terminals or on machines with a common file system, work on the
same queue. A trial whose sweep was killed goes back into it, and its run goes on where it was.
"""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from filelock import FileLock
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from lab.core.errors import Stopped, UserError, handle_signals
from lab.sweep_process import HOST, RunProcess, end, name_of, process_of, rows_of, run_name, summary
from lab.sweep_script import Script
from lab.sweep_space import Parameter, show, suggest, walk

POLL = 0.5  # seconds between looks at a trial
SILENT = 600  # seconds without a sign of another machine after which its trial is taken over
HOPELESS = 3  # trials that fail before any other has finished an epoch
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class SweepConfig:
    """How a space is searched; checks itself."""

    sampler: Literal["grid", "random", "tpe"]
    seed: int
    trials: int | None  # None: all of a grid, else 20
    processes: int  # trials at once
    prune_after: tuple[int, int] | None  # epochs of a trial, and finished trials; None: never

    def __post_init__(self) -> None:
        epochs, trials = self.prune_after or (1, 1)
        for name, value in (
            ("TRIALS", self.trials), ("PROCESSES", self.processes),
            ("PRUNE_AFTER_EPOCHS", epochs), ("PRUNE_AFTER_TRIALS", trials),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


class Trials:
    """The queue in a sweep's folder, and what works it off."""

    def __init__(self, folder: Path, script: Script, space: list[Parameter], how: SweepConfig):
        """Opens the queue, or makes it."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.script, self.space, self.how = folder, script, space, how
        journal, lock = folder / "study.journal", folder / "study.lock"
        # Unlike Optuna's own locks, this one ends with a process that is killed.
        backend = JournalFileBackend(str(journal), FileLock(lock))
        pruner = optuna.pruners.NopPruner()
        if how.prune_after:
            pruner = optuna.pruners.MedianPruner(how.prune_after[1], how.prune_after[0])
        self.lock = FileLock(folder / "sweep.lock")
        with self.lock:
            with FileLock(lock):
                cut_torn_line(journal)
            self.storage = optuna.storages.JournalStorage(backend)
            self.study = optuna.create_study(
                storage=self.storage, study_name="sweep", direction="maximize", pruner=pruner,
                sampler=optuna.samplers.RandomSampler(), load_if_exists=True,
            )  # fmt: skip
            self.asked = how.trials or 20
            if how.sampler != "tpe":
                some = how.trials or (None if how.sampler == "grid" else 20)
                plan = list(islice(walk(space, how.sampler, how.seed), some))
                self.asked = len(plan)
                for params in plan[len(self.all()) :]:
                    self.study.enqueue_trial(params)

    def all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def finished(self) -> list[FrozenTrial]:
        return [trial for trial in self.all() if trial.state.is_finished()]

    def work(self, after: Callable[[], object]) -> None:
        """Works off the queue, `how.processes` trials at once, and calls `after` behind each.

        Raises: Stopped after Ctrl-C or SIGTERM, when the runs have saved themselves; UserError, if
            the first trials all fail.
        """
        self.after = after
        self.bar = tqdm(desc="trials", total=self.asked, disable=None, leave=False)
        self.bar.update(len(self.finished()))
        told: list[int] = []
        with self.bar, handle_signals() as stop, ThreadPoolExecutor(self.how.processes) as pool:
            workers = [pool.submit(self.worker, i, stop) for i in range(self.how.processes)]
            try:
                while wait(workers, POLL, FIRST_EXCEPTION).not_done:
                    if any(w.done() and w.exception() for w in workers):
                        break
            finally:  # after an error, or a second Ctrl-C, nothing may be left running
                told = list(stop)
                stop.append(signal.SIGTERM)
        for worker in workers:
            worker.result()
        if told:
            raise Stopped(told[0], f"{len(self.finished())} of {self.asked} trials: {self.folder}")

    def worker(self, index: int, stop: list[int]) -> None:
        # The first trial may have to download and decode the data; the others wait for that.
        while index and not stop and not self.finished():
            if any(self.folder.glob("*/config.json")):
                break
            time.sleep(POLL)
        while not stop and (trial := self.next()):
            self.conduct(trial, stop)

    def next(self) -> optuna.Trial | None:
        """The next trial of the queue, now this process's; None when all that were asked for are.

        Raises: UserError, if it is no use to go on.
        """
        with self.lock:
            for trial in self.all():
                if trial.state == TrialState.RUNNING and not self.lives(trial):
                    end(trial.user_attrs.get("process"))
                    self.put_back(trial.number)
            trials = self.all()
            failed = [t for t in trials if t.state == TrialState.FAIL]
            if len(failed) >= HOPELESS and all(
                t in failed for t in trials if t.intermediate_values
            ):
                last = failed[-1]
                raise UserError(
                    f"the first {len(failed)} trials all failed; trial {last.number}: "
                    f"{last.user_attrs['result']['error']}\nAll that it said is in "
                    f"{self.log(last.number)}. Mend that and start over with --fresh"
                )
            waiting = [t for t in trials if t.state == TrialState.WAITING]
            if len(trials) - len(waiting) >= self.asked:
                return None
            if not waiting:  # TPE's queue is filled one by one
                params = suggest(self.space, self.how.seed, trials)
                if params is None:
                    return None
                self.study.enqueue_trial(params)
            trial = self.study.ask({p.name: p.distribution for p in self.space})
            trial.set_user_attr("owner", name_of(os.getpid()))
            return trial

    def lives(self, trial: FrozenTrial) -> bool:
        """Whether the sweep that took a trial is still there."""
        owner = trial.user_attrs.get("owner")
        if owner is None or owner[0] == HOST:
            return process_of(owner) is not None
        log = self.log(trial.number)
        seen = max(trial.datetime_start.timestamp(), log.stat().st_mtime if log.exists() else 0)
        return time.time() - seen < SILENT

    def put_back(self, number: int) -> None:
        """A trial that was begun waits again; its parameters stay, its run goes on."""
        study = self.storage.get_study_id_from_name("sweep")
        trial = self.storage.get_trial_id_from_study_id_trial_number(study, number)
        self.storage.set_trial_state_values(trial, TrialState.WAITING)

    def log(self, number: int) -> Path:
        return self.folder / f"trial-{number}.log"

    def conduct(self, trial: optuna.Trial, stop: list[int]) -> None:
        """Runs a trial and tells the study what came out, or puts it back if it was stopped."""
        command = [str(self.script.path), *self.script.flags(trial.params)]
        threads = max(1, torch.get_num_threads() // self.how.processes)
        run = RunProcess(command, self.folder, run_name(trial.params), self.log(trial.number),
                         threads if self.how.processes > 1 else None)  # fmt: skip
        trial.set_user_attr("process", name_of(run.process.pid))
        reported = set(self.all()[trial.number].intermediate_values)  # before it was interrupted
        hopeless = told = False
        try:
            while run.process.poll() is None:
                time.sleep(POLL)
                os.utime(run.log)  # a sign of life for other machines
                hopeless = self.report(trial, run.rows(), reported) or hopeless
                if (stop or hopeless) and not told:
                    run.process.terminate()  # it saves itself
                    told = True
                if len(stop) > 1:
                    run.process.kill()
        finally:
            if run.process.poll() is None:
                run.process.terminate()
        folder, error = run.result()
        self.report(trial, rows_of(run.path), reported)
        if run.process.returncode != 0 and hopeless:
            self.tell(trial, TrialState.PRUNED, summary(folder, None))
        elif run.process.returncode != 0 and (stop or run.process.returncode in STOPPED):
            self.put_back(trial.number)
        else:
            state = TrialState.FAIL if error else TrialState.COMPLETE
            self.tell(trial, state, summary(folder, error))

    def report(self, trial: optuna.Trial, rows: list[dict], reported: set[int]) -> bool:
        """Tells Optuna of new epochs, the best accuracy so far at each; True: prune the trial."""
        best, new = 0.0, False
        for row in rows:
            best = max(best, row["val_accuracy"])
            if row["epoch"] not in reported:
                trial.report(best, row["epoch"])
                reported.add(row["epoch"])
                new = True
        return new and trial.should_prune()

    def tell(self, trial: optuna.Trial, state: TrialState, result: dict[str, Any]) -> None:
        """Ends a trial in the study, and on the terminal."""
        best = result["val_accuracy"]
        trial.set_user_attr("result", result)
        self.study.tell(trial, best if state == TrialState.COMPLETE else None, state)
        points = "  ".join(f"{name.lower()} {show(value)}" for name, value in trial.params.items())
        ending = {
            TrialState.COMPLETE: "",
            TrialState.PRUNED: f"  pruned after epoch {result['epochs']}",
            TrialState.FAIL: f"  failed: {result['error']}",
        }
        reached = "" if best is None else f"  validation {100 * best:.2f} %"
        line = f"trial {trial.number}  {points}{reached}  {result['seconds']:.0f} s{ending[state]}"
        with self.lock:
            tqdm.write(line)
            self.bar.update(len(self.finished()) - self.bar.n)
            self.after()


def cut_torn_line(journal: Path) -> None:
    """Takes away a last line that a full disk cut short; Optuna would read nothing behind it."""
    if journal.exists() and not (text := journal.read_bytes()).endswith(b"\n"):
        journal.write_bytes(text[: text.rfind(b"\n") + 1])
