"""Make a small checkpoint of a finished run, with its card: fp16 weights and how they came about.

python weights/export.py results/official/train/<run> weights/<name>.safetensors
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab.core import Run, UserError, checkpoints, run_script

MOST_MB = 8  # a checkpoint that everybody downloads with the code stays small


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("usage: python weights/export.py <run's folder> <file>.safetensors")
    run, target = Run(Path(sys.argv[1])), Path(sys.argv[2])
    if not run.finished:
        raise UserError(f"{run.folder} is no finished run: it has no metrics.json")
    state, header = checkpoints.load_weights(run.folder / "best.safetensors")
    checkpoints.save_weights(target, {name: value.half() for name, value in state.items()}, header)
    size = target.stat().st_size / 1e6
    if size > MOST_MB:
        target.unlink()
        raise UserError(f"{size:.1f} MB are more than {MOST_MB}: train a smaller model")
    text = card(target.stem, run, header, size)
    checkpoints.write_atomically(
        target.with_suffix(".md"), lambda path: path.write_text(text, encoding="utf-8")
    )
    print(target.with_suffix(".md"))


def card(name: str, run: Run, header: dict, size: float) -> str:
    """What somebody needs to trust the weights, or to make them again."""
    config, metrics = run.config(), run.metrics()
    data, asked, hardware = config["dataset"], config["constants"], config["hardware"]
    low, high = (100 * share for share in metrics["test_accuracy_95"])
    recipe = {
        name: value for name, value in asked.items() if value not in (None, "", 0, False, "none")
    }
    return f"""# {name}

{config["model"]["class"]}, {config["model"]["parameters"]:,} parameters, {size:.1f} MB in fp16.
Trained from scratch by train.py on these images alone.

| | |
|---|---|
| data | {data["name"]}: {data["train"]:,} training, {data["val"]:,} validation, {data["test"]:,} test images; {", ".join(data["classes"])} |
| test accuracy | {100 * metrics["test_accuracy"]:.2f} % (95 % interval {low:.1f} to {high:.1f}), epoch {metrics["best_epoch"]} of {metrics["epochs"]}, in the precision that it was trained in |
| training | {metrics["training_seconds"]:,.0f} s on {hardware["threads"]} of {hardware["cores"]} cores of {hardware["cpu"]}{", " + hardware["gpu"] if "gpu" in hardware else ""} |
| input | {json.dumps(header.get("preprocess"))} |
| model | `{json.dumps(header["config"])}` |
| recipe | `{json.dumps(recipe)}` |
| versions | {", ".join(f"{k} {v}" for k, v in config["versions"].items())}, Python {config["python"]} |
| commit | {config["commit"]}{", with uncommitted changes" if config["uncommitted_changes"] else ""} |
| records | [{run.folder.as_posix()}](../{run.folder.as_posix()}/) |

    {config["command"]}
"""  # noqa: E501


if __name__ == "__main__":
    run_script(main)
