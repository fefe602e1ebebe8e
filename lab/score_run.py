"""What attention_viz.py --score does: one model's scores, and all models' side by side."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from lab.attention_score import RANDOM, TRAINED, score
from lab.checkpoints import write_json, write_whole
from lab.loaders import Loaders
from lab.runs import Run
from lab.saliency import classes_of
from lab.score_tables import compare, draw, table
from lab.trimaps import trimaps
from lab.weights import Pretrained, with_random_weights


def scoring(pretrained: Pretrained, loaders: Loaders, c: SimpleNamespace) -> Callable[[Run], None]:
    """What attention_viz.py --score does, once a run's folder is open.

    Raises: UserError, for data without outlines.
    """
    data, model = loaders.data, pretrained.model
    outlines = {split: trimaps(data, getattr(data, split), c.DATA_DIR, pretrained.preprocess)
                for split in ("val", "test")}  # fmt: skip

    def score_it(run: Run) -> None:
        torch.manual_seed(c.SEED)
        models = {TRAINED: model, RANDOM: with_random_weights(model).to(loaders.device).eval()}
        count = c.DELETION_IMAGES if classes_of(model) else 0
        record = {
            "title": run.folder.name.removesuffix("-score"),
            "images": f"{data.name}, {len(data.test)} test images",
            **score(models, loaders, outlines, predictions(model, loaders), count),
            "open": "score.png",
        }
        draw(run.folder / "score.png", record)
        text = table(record)
        write_whole(run.folder / "score.md", lambda scratch: scratch.write_text(text, "utf-8"))
        write_json(run.folder / "metrics.json", record)
        print(f"{text}\n{run.folder / 'score.png'}")

        paths = sorted(Path(c.RESULTS_DIR).glob("*/metrics.json"))
        others = [json.loads(path.read_text("utf-8")) for path in paths]
        same = [other for other in others if other.get("images") == record["images"]]
        place = Path(c.RESULTS_DIR, f"scores-{data.name}-{len(data.test)}")
        compare(place, same)
        print(f"{place}.png")

    return score_it


def predictions(model: torch.nn.Module, loaders: Loaders) -> dict[str, torch.Tensor]:
    """The classes that are explained, (N,): the predicted ones; zeros where there are none."""
    found = {}
    for split in ("val", "test"):
        found[split] = torch.zeros(len(getattr(loaders.data, split)), dtype=torch.long)
        if classes_of(model):
            with torch.no_grad():
                for index, images, _ in loaders.evaluation(split):
                    found[split][index] = model(images).argmax(1).cpu()
    return found
