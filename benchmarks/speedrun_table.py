"""What a race showed: a table and a picture, made from the records of its runs alone."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.table import in_markdown
from lab.core import checkpoints, plots

TARGETS = (0.90, 0.93, 0.95)
CHOSEN = "chosen"
Group = tuple[float, str, str]  # budget in seconds, the machine in words, variant


def read(folder: Path) -> dict[Group, list[dict[str, Any]]]:
    """The records of a folder, by what they have in common; seeds in order."""
    groups = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        groups[record["budget"], machine(record), record["variant"]].append(record)
    return dict(sorted(groups.items(), key=lambda item: (item[0][:2], item[0][2] != CHOSEN)))


def machine(record: dict[str, Any]) -> str:
    """Where a run was, and by which clock."""
    found = record["hardware"]
    threads = found["threads"]
    where = found.get("gpu") or f"{found['cpu']}, {threads} thread{'s' * (threads > 1)}"
    clock = {"wall": "wall clock", "cpu": "processor time"}[record["constants"]["CLOCK"]]
    return f"{where}, {clock}"


def spread(values: list[float], sign: str = "") -> str:
    """In percent: mean and standard deviation, the latter from two values on."""
    middle = f"{100 * mean(values):{sign}.2f}"
    return middle + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def reached(records: list[dict[str, Any]], target: float) -> str:
    """Seconds until validation first showed the target, where every seed showed it."""
    times = []
    for record in records:
        times.append(next((at for at, accuracy in record["curve"] if accuracy >= target), None))
    if None in times:
        return "-"
    return f"{mean(times):.0f}" + (f" ± {stdev(times):.0f}" if len(times) > 1 else "")


def table(folder: Path) -> str:
    """The races of a folder in Markdown; writes it there as table.md."""
    groups = read(folder)
    lines = []
    for budget, where in dict.fromkeys(key[:2] for key in groups):
        own = {key[2]: found for key, found in groups.items() if key[:2] == (budget, where)}
        one = next(iter(own.values()))[0]
        versions = ", ".join(f"{k} {one['versions'][k]}" for k in ("torch", "timm"))
        base = {r["seed"]: r["test_accuracy"] for r in own.get(CHOSEN, [])}
        lines += [
            f"{budget:g} seconds of training on {one['data']}; {where}; {versions}.", "",
        ]  # fmt: skip
        cells = []
        for name, records in own.items():
            pairs = [r["test_accuracy"] - base[r["seed"]] for r in records if r["seed"] in base]
            apart = spread(pairs, "+") if pairs and name != CHOSEN else ""
            cells.append([
                name, str(len(records)), f"{records[0]['parameters']:,}",
                f"{mean(r['images'] for r in records):,.0f}",
                spread([r["test_accuracy"] for r in records]), apart,
                *(reached(records, t) for t in TARGETS),
            ])  # fmt: skip
        commands = dict.fromkeys(r["command"] for records in own.values() for r in records)
        heads = ["recipe", "seeds", "parameters", "images", "test accuracy (%)",
                 "to chosen (points)", *(f"s to {t:.0%}" for t in TARGETS)]  # fmt: skip
        lines += [*in_markdown(heads, cells), "", *(f"`{command}`  " for command in commands), ""]
    text = "\n".join(lines)
    checkpoints.write_atomically(
        folder / "table.md", lambda scratch: scratch.write_text(text, encoding="utf-8")
    )
    return text


def picture(folder: Path) -> list[Path]:
    """Validation accuracy against the clock: one picture a budget, a line a recipe."""
    groups, paths = read(folder), []
    for budget, where in dict.fromkeys(key[:2] for key in groups):
        figure, axis = plots.plt.subplots(figsize=(9.5, 5), layout="constrained")
        for number, ((*place, name), records) in enumerate(groups.items()):
            if tuple(place) != (budget, where):
                continue
            for record in records:
                seconds, accuracy = zip(*record["curve"], strict=True)
                axis.plot(
                    seconds, [100 * a for a in accuracy], marker="o", ms=3,
                    color=f"C{number % 10}", lw=2.4 if name == CHOSEN else 1.2,
                    label=name if record is records[0] else None,
                )  # fmt: skip
        axis.set(xlabel="seconds of training", ylabel="validation accuracy (%)", xlim=(0, None))
        axis.set_title(f"{budget:g} s on {where}", fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
        clock = "-processor-time" if "processor" in where else ""
        paths.append(folder / f"curves-{budget:g}s{clock}.png")
        plots.save_figure(figure, paths[-1])
    return paths
