"""Export a finished run: its weights in fp16, with a model card that says how they were trained.

python weights/export.py results/official/train/<run> weights/<name>.safetensors
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab.core import UserError, checkpoints, runtime
from lab.sharing import card

LIMIT_MB = 8  # weights in the repository are downloaded together with the code


def main() -> None:
    if len(sys.argv) != 3 or Path(sys.argv[2]).suffix != ".safetensors":
        raise UserError("usage: python weights/export.py <folder of a run> <file>.safetensors")
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    records = card.Records.find(str(folder))
    if records is None:
        raise UserError(f"{folder} is not a finished run: it has no metrics.json")
    state, header = checkpoints.load_weights(folder / "best.safetensors")
    halves = {name: value.half() for name, value in state.items()}
    if (size := sum(value.nbytes for value in halves.values()) / 1e6) > LIMIT_MB:
        raise UserError(f"{target} would have {size:.1f} MB; the limit is {LIMIT_MB} MB")
    checkpoints.save_weights(target, halves, header)
    text = describe(target, records)
    checkpoints.write_atomically(
        target.with_suffix(".md"), lambda path: path.write_text(text, encoding="utf-8")
    )
    print(target.with_suffix(".md"))


def describe(target: Path, records: card.Records) -> str:
    """The model card: what somebody needs to trust the weights, or to train them again."""
    model, folder = records.config["model"], records.folder.as_posix()
    if records.config.get("uncommitted_changes"):
        note = "The code had uncommitted changes, so this commit may not reproduce the weights"
    else:
        note = "The command gives these weights at this commit; flags may have changed since"
    return f"""# {target.stem}

{model["class"]}, {model["parameters"]:,} parameters, {target.stat().st_size / 1e6:.1f} MB in fp16.
Test accuracy {card.accuracy(records.metrics)}.
Classes: {", ".join(records.config["dataset"]["classes"])}.

{card.training_table(records)}

{note}.

Records: [{folder}](../{folder}/)
"""


if __name__ == "__main__":
    runtime.run_script(main)
