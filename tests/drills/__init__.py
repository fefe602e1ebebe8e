"""Stress tests: `python -m tests.drills` runs them, test_drills.py runs a few attempts of each."""

from tests.drills import files, training

DRILLS = {
    drill.__name__: drill
    for drill in (
        training.kill,
        training.interrupt,
        training.two_processes,
        training.no_space,
        training.damaged_run,
        files.fuzzed_constants,
        files.hostile_weights,
        files.hostile_names,
        files.hostile_images,
        files.damaged_records,
    )
}
