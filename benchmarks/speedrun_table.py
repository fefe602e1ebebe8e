"""The table and the figures of speedrun.py, from the records of its runs."""

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.table import to_markdown
from lab.core import checkpoints, plots

TARGETS = (0.90, 0.93, 0.95)
CHOSEN = "chosen"
Records = list[dict[str, Any]]


def read(folder: Path) -> dict[tuple[float, str], dict[str, Records]]:
    """The records by (budget in seconds, machine and clock), then by variant, `chosen` first."""
    groups: dict = defaultdict(lambda: defaultdict(list))
    records = [checkpoints.read_json(path) for path in sorted(folder.glob("*.json"))]
    for record in sorted(records, key=lambda r: (r["budget"], r["variant"] != CHOSEN)):
        hardware = record["hardware"]
        where = hardware.get("gpu") or f"{hardware['cpu']}, threads: {hardware['threads']}"
        clock = {"wall": "wall clock", "cpu": "processor time"}[record["constants"]["CLOCK"]]
        groups[record["budget"], f"{where}, {clock}"][record["variant"]].append(record)
    return groups


def write_table(folder: Path) -> str:
    """The runs of a folder in Markdown, which is also written to table.md."""
    lines = []
    for (budget, where), variants in read(folder).items():
        first = next(iter(variants.values()))[0]
        versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("torch", "timm"))
        chosen = {r["seed"]: r["test_accuracy"] for r in variants.get(CHOSEN, [])}
        cells = []
        for name, records in variants.items():
            pairs = [r["test_accuracy"] - chosen[r["seed"]] for r in records if r["seed"] in chosen]
            cells.append([
                name, str(len(records)), f"{records[0]['parameters']:,}",
                f"{mean(r['images'] for r in records):,.0f}",
                _percent([r["test_accuracy"] for r in records]),
                _percent(pairs, "+") if pairs and name != CHOSEN else "",
                *(_seconds_to(records, target) for target in TARGETS),
            ])  # fmt: skip
        commands = dict.fromkeys(r["command"] for records in variants.values() for r in records)
        heads = ["recipe", "seeds", "parameters", "images", "test accuracy (%)",
                 "difference (points)", *(f"s to {t:.0%}" for t in TARGETS)]  # fmt: skip
        lines += [
            f"{budget:g} seconds of training on {first['data']}; {where}; {versions}.", "",
            *to_markdown(heads, cells), "", *(f"`{command}`  " for command in commands), "",
        ]  # fmt: skip
    text = "\n".join(lines)
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text


def _percent(values: list[float], sign: str = "") -> str:
    """Mean and, for two or more values, standard deviation, in percent."""
    text = f"{100 * mean(values):{sign}.2f}"
    return text + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def _seconds_to(records: Records, target: float) -> str:
    """Seconds until the validation accuracy reached a target, if it did for every seed."""
    times = [next((at for at, acc in r["curve"] if acc >= target), None) for r in records]
    if None in times:
        return "-"
    return f"{mean(times):.0f}" + (f" ± {stdev(times):.0f}" if len(times) > 1 else "")


def plot(folder: Path) -> list[Path]:
    """Validation accuracy against training time: one figure per budget, one color per recipe."""
    paths = []
    for (budget, where), variants in read(folder).items():
        figure, axis = plots.plt.subplots(figsize=(9.5, 5), layout="constrained")
        for number, (name, records) in enumerate(variants.items()):
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
