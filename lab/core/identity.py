"""What identifies a run: its constants, its data and its code; and how two runs differ.

An identity is a dict of these three parts, "constants", "data" and "code". A run records it in its
config.json, so a config is an identity as well. Old records have no "code".
"""

import json
import os
import re
from pathlib import Path
from typing import Any

Identity = dict[str, Any]

NOT_IDENTITY = (  # constants that do not change the result
    "NAME", "OVERWRITE", "DATA_DIR", "RESULTS_DIR", "NUM_SEEDS", "TENSORBOARD", "SNAPSHOTS",
    "RESUME_CHANGED_CODE",
)  # fmt: skip


def runs_named(results_dir: Path, name: str) -> dict[Path, Identity]:
    """The configs of all runs with this name, by folder: first `name`, then `name-2`, ..."""
    numbered = re.compile(re.escape(name) + r"(-\d+)?")
    found = {}
    for path in results_dir.glob("*/config.json"):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.get("name") == name or numbered.fullmatch(path.parent.name):
                _ = config["constants"].items(), config["data"]
                found[path.parent] = config
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # not a run, or damaged; the folder name counts as taken
    return dict(sorted(found.items(), key=lambda item: (len(item[0].name), item[0].name)))


def find_run(
    runs: dict[Path, Identity], identity: Identity, with_other_code: bool = False
) -> Path | None:
    """The folder of the run with this identity, or None.

    Args:
        runs: the recorded identities, by folder.
        identity: the identity to find.
        with_other_code: if there is none, take the newest unfinished run that differs only in its
            code.
    """
    for folder, recorded in runs.items():
        if recorded.get("code") == identity["code"] and _same_inputs(recorded, identity):
            return folder
    for folder, recorded in reversed(runs.items()) if with_other_code else ():
        if not (folder / "metrics.json").exists() and _same_inputs(recorded, identity):
            return folder
    return None


def _same_inputs(one: Identity, other: Identity) -> bool:
    """Whether the data and all constants are equal; a folder of images may have moved."""
    different = set(different_constants(one["constants"], other["constants"]))
    names = {Path(str(each["constants"].get("DATASET"))).name for each in (one, other)}
    if one["data"] and len(names) == 1:
        different.discard("DATASET")
    return one["data"] == other["data"] and not different


def different_constants(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The constants that differ; `pets`, `pets/` and `./pets` are one folder."""

    def plain(value: Any) -> Any:
        if isinstance(value, str) and value and "\0" not in value and os.path.exists(value):
            return os.path.realpath(value)
        return list(value) if isinstance(value, tuple) else value  # as JSON stores it

    return [k for k in {**one, **other} if plain(one.get(k)) != plain(other.get(k))]


def _differing_files(one: Identity, other: Identity) -> list[str]:
    """The files whose code differs, model.py and the script first."""
    a, b = ((x["code"] if isinstance(x.get("code"), dict) else {}) for x in (one, other))
    files = (file for file in {**b, **a} if a.get(file) != b.get(file))
    return sorted(files, key=lambda file: (file.count("/"), file))


def changed_files(recorded: Identity, identity: Identity) -> str:
    """The files that changed since a run, for a sentence: "model.py has" or "a.py, b.py have"."""
    if not isinstance(recorded.get("code"), dict):
        return "the code (which that run did not record) may have"
    files = _differing_files(recorded, identity)
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    have = "has" if len(files) == 1 else "have"
    return f"{', '.join(files[:3])}{more} {have}"


def explain_new_run(runs: dict[Path, Identity], identity: Identity, folder: Path) -> str:
    """One line that says why a run gets a new folder, by comparison with the most similar run.

    Args:
        runs: the earlier runs of the same name, by folder; at least one.
        identity: the identity of the new run.
        folder: its folder.
    """

    def distance(earlier: Path) -> tuple[int, int]:
        recorded = runs[earlier]
        inputs = len(different_constants(recorded["constants"], identity["constants"]))
        inputs += recorded["data"] != identity["data"]
        return inputs, len(_differing_files(recorded, identity))

    closest = min(reversed(runs), key=distance)  # the newest of equally close ones
    recorded = runs[closest]
    new = f"starting a new run, {folder}"
    if distance(closest)[0]:
        differences = _differences(recorded, identity)
        if len(runs) > 1:
            more = f"{closest} and {len(runs) - 1} other runs have different settings"
            return f"{more} ({closest.name}: {differences}): {new}"
        return f"{closest} has different settings ({differences}): {new}"
    since = f" since {recorded['started']}" if recorded.get("started") else ""
    line = f"{changed_files(recorded, identity)} changed{since}: {new}"
    if not (closest / "metrics.json").exists():
        line += (
            f" ({closest} was stopped: undo the change to resume it, or resume it with the changed "
            "code by adding --resume-changed-code)"
        )
    return line


def _differences(recorded: Identity, identity: Identity) -> str:
    """What distinguishes an earlier run from this one: constants, data and code."""
    there, here = recorded["constants"], identity["constants"]
    keys = different_constants(there, here)
    found = [f"{k}: {there.get(k)} there, {here.get(k)} in this run" for k in keys[:3]]
    if len(keys) > 3:
        found.append(f"and {len(keys) - 3} more")
    if recorded["data"] != identity["data"]:
        found.append("different data")
    if recorded.get("code") != identity["code"]:
        found.append(f"{changed_files(recorded, identity)} changed")
    return "; ".join(found)
