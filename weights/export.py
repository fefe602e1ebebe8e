"""Export a finished run: its weights in fp16, with a model card that says how they were trained.

python weights/export.py results/official/train/<run> weights/<name>.safetensors
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab.core import Run, UserError, checkpoints, run_script

LIMIT_MB = 8  # weights in the repository are downloaded together with the code


def main() -> None:
    if len(sys.argv) != 3 or Path(sys.argv[2]).suffix != ".safetensors":
        raise UserError("usage: python weights/export.py <folder of a run> <file>.safetensors")
    run, target = Run(Path(sys.argv[1])), Path(sys.argv[2])
    if not run.finished:
        raise UserError(f"{run.folder} is not a finished run: it has no metrics.json")
    state, header = checkpoints.load_weights(run.folder / "best.safetensors")
    checkpoints.save_weights(target, {name: value.half() for name, value in state.items()}, header)
    if target.stat().st_size > LIMIT_MB * 1e6:
        size = target.stat().st_size / 1e6
        target.unlink()
        raise UserError(f"{target} would have {size:.1f} MB; the limit is {LIMIT_MB} MB")
    text = card(target, run, header)
    checkpoints.write_atomically(
        target.with_suffix(".md"), lambda path: path.write_text(text, encoding="utf-8")
    )
    print(target.with_suffix(".md"))


def card(target: Path, run: Run, header: dict[str, Any]) -> str:
    """The model card: what somebody needs to trust the weights, or to train them again."""
    config, metrics = run.config(), run.metrics()
    data, constants, hardware = config["dataset"], config["constants"], config["hardware"]
    low, high = (100 * bound for bound in metrics["test_accuracy_95"])
    off = (None, "", 0, False, "none")
    recipe = {name: value for name, value in constants.items() if value not in off}
    return f"""# {target.stem}

{config["model"]["class"]}, {config["model"]["parameters"]:,} parameters, {target.stat().st_size / 1e6:.1f} MB in fp16.
{origin(config)}

| | |
|---|---|
| data | {data["name"]}: {data["train"]:,} training, {data["val"]:,} validation, {data["test"]:,} test images; {", ".join(data["classes"])} |
| test accuracy | {100 * metrics["test_accuracy"]:.2f} % (95 % interval {low:.1f} to {high:.1f}), epoch {metrics["best_epoch"]} of {metrics["epochs"]}, in the precision used for training |
| training | {metrics["training_seconds"]:,.0f} s on {hardware["threads"]} of {hardware["cores"]} cores of {hardware["cpu"]}{", " + hardware["gpu"] if "gpu" in hardware else ""} |
| input | {json.dumps(header.get("preprocess"))} |
| model | `{json.dumps(header["config"])}` |
| recipe | `{json.dumps(recipe)}` |
| versions | {", ".join(f"{k} {v}" for k, v in config["versions"].items())}, Python {config["python"]} |
| commit | {config["commit"]}{", with uncommitted changes" if config["uncommitted_changes"] else ""} |
| records | [{run.folder.as_posix()}](../{run.folder.as_posix()}/) |

    {config["command"]}
"""  # noqa: E501


def origin(config: dict[str, Any]) -> str:
    """A sentence on what the run started from."""
    mode = config["constants"].get("MODE", "scratch")
    if mode == "scratch":
        return "Trained from scratch, on these images only."
    pretrained = config["pretrained"]
    return (
        f"Fine-tuned (mode {mode}) from {pretrained['origin']}, "
        f"whose weights have the fingerprint {pretrained['weights']}."
    )


if __name__ == "__main__":
    run_script(main)
