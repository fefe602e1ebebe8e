"""Scores every map of a model: the work of attention_viz.py --score.

The same architecture with random weights and two maps that ignore the image serve as baselines.
Validation images choose thresholds and the best block; all reported scores are on test images.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lab.attention import metrics, saliency, score_report
from lab.attention.score_report import CENTER, CHANCE, RANDOM, TRAINED
from lab.core import Run, checkpoints, stats
from lab.data import Loaders
from lab.models import Pretrained

_GRID_SIZE = (32, 32)  # of the maps that ignore the image


class Scoring:
    """Scores a model's maps against the segmentation masks of its images.

    Raises: UserError for a dataset without outlines, before a run folder exists.
    """

    def __init__(
        self, pretrained: Pretrained, loaders: Loaders, data_dir: str, deletion_images: int,
        seed: int,
    ):  # fmt: skip
        self.pretrained, self.model = pretrained, pretrained.model
        self.loaders, self.seed = loaders, seed
        self.deletion_images = deletion_images if saliency.count_classes(self.model) else 0
        data = loaders.data
        self.outlines = {
            split: metrics.load_outlines(
                data, getattr(data, split), data_dir, pretrained.preprocess
            )
            for split in ("val", "test")
        }

    def write(self, run: Run) -> None:
        """Writes score.md, score.png and metrics.json, and compares all models scored so far."""
        torch.manual_seed(self.seed)
        untrained = self.pretrained.reinitialized().to(self.loaders.device).eval()
        models = {TRAINED: self.model, RANDOM: untrained}
        targets = _predicted_classes(self.model, self.loaders)
        data = self.loaders.data
        record = {
            "title": run.folder.name.removesuffix("-score"),
            "images": f"{data.name}, {len(data.test)} test images",
            **score_maps(models, self.loaders, self.outlines, targets, self.deletion_images),
            "open": "score.png",
        }
        score_report.write(run.folder, record)
        checkpoints.write_json(run.folder / "metrics.json", record)
        print(f"{score_report.to_markdown(record)}\n{run.folder / 'score.png'}")

        others = map(_read_record, sorted(run.folder.parent.glob("*/metrics.json")))
        records = [other for other in others if other.get("images") == record["images"]]
        comparison = run.folder.parent / f"scores-{data.name}-{len(data.test)}"
        score_report.compare(comparison, records)
        print(f"{comparison}.png")


def score_maps(
    models: dict[str, nn.Module],
    loaders: Loaders,
    outlines: dict[str, Tensor],
    targets: dict[str, Tensor],
    deletion_images: int,
) -> dict[str, Any]:
    """Scores every method that works for a model.

    Args:
        models: TRAINED, and RANDOM with random weights (Adebayo et al. 2018: a map that looks as
            good without training shows the image, not the model).
        outlines: of "val" and "test", (N, S, S), from `load_outlines`.
        targets: the classes to explain, (N,), of the same splits.
        deletion_images: number of test images, evenly spaced, for deletion and insertion. 0 skips
            them, for a model without classes.

    Returns: the record that metrics.json holds.
    """
    first_images = next(_batches(loaders, "test"))[1]
    unavailable = saliency.unavailable_methods(models[TRAINED], first_images)
    methods = [name for name in saliency.METHODS if name not in unavailable]
    # An image that shows only animal or only background cannot tell a good map from a bad one.
    usable = {
        split: (labels == metrics.ANIMAL).flatten(1).any(1)
        & (labels == metrics.BACKGROUND).flatten(1).any(1)
        for split, labels in outlines.items()
    }
    outlines = {split: outlines[split][usable[split]] for split in outlines}

    test_maps: dict[str, dict[str, Tensor]] = {}  # by weights and method
    scores: dict[str, dict[str, _MethodScores]] = {"baselines": {}}  # by weights and method
    for weights, model in models.items():
        val, test = (_maps_of_split(model, loaders, split, methods, targets[split], usable[split])
                     for split in ("val", "test"))  # fmt: skip
        progress = tqdm(test, desc=f"scores, {weights}", disable=None)
        scores[weights] = {m: _score_method(val[m], test[m], outlines) for m in progress}
        test_maps[weights] = test
    for name, values in metrics.baseline_maps(_GRID_SIZE).items():
        val, test = (values.expand(len(outlines[split]), -1, -1) for split in ("val", "test"))
        scores["baselines"][name] = _score_method(val, test, outlines)

    record: dict[str, Any] = {
        "test_images": len(outlines["test"]),
        "left_out": int((~usable["test"]).sum()),
        "animal_share": round(float(scores["baselines"]["uniform"].test.mass.mean()), 4),
        "methods": {},
        "baselines": {name: metrics.summarize(its.test, its.level, {})
                      for name, its in scores["baselines"].items()},
    }  # fmt: skip
    for name, its in scores[TRAINED].items():
        untrained = scores[RANDOM][name]
        references = {RANDOM: untrained, **scores["baselines"]}
        pairs = {other: (s.test, s.level) for other, s in references.items()}
        record["methods"][name] = {
            "validation": round(its.validation, 4),
            "threshold": its.level / metrics.LEVELS,
            TRAINED: metrics.summarize(its.test, its.level, pairs),
            RANDOM: metrics.summarize(untrained.test, untrained.level, {}),
            "rank_correlation": _rank_correlation(*(m[name] for m in test_maps.values())),
        }
    if deletion_images:
        test_rows = usable["test"].nonzero()[:, 0]
        count = min(deletion_images, len(test_rows))
        sample = torch.linspace(0, len(test_rows) - 1, count).round().long()
        chosen_maps = {
            name: test_maps[TRAINED][name][sample] for name in score_report.candidates(record)
        }
        rows = test_rows[sample]
        record["deletion_images"] = count
        record["faithfulness"] = _faithfulness(
            models[TRAINED], loaders, rows, chosen_maps, targets["test"][rows]
        )
    return record


def _batches(loaders: Loaders, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and normalized images of a split, BATCH_SIZE at a time.

    The batches of `Loaders.evaluation` are twice as large, because it needs no gradients.
    """
    size = loaders.batch_size
    for index, images, _ in loaders.evaluation(split):
        yield from zip(index.split(size), images.split(size), strict=True)


def _read_record(path: Path) -> dict[str, Any]:
    """The scores of another model; {} for a record that is damaged or has no scores."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        score_report.to_markdown(record)
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {}


@dataclass(frozen=True)
class _MethodScores:
    """Test scores of one method, with its threshold and score on the validation images."""

    test: metrics.LocalizationScores
    level: int  # number of the best threshold on the validation images
    validation: float  # mean average precision on the validation images


def _score_method(val: Tensor, test: Tensor, outlines: dict[str, Tensor]) -> _MethodScores:
    """Scores the maps (N, rows, columns) of both splits by their outlines (N, S, S)."""
    val_scores = metrics.localization_scores(val, outlines["val"])
    test_scores = metrics.localization_scores(test, outlines["test"])
    validation = float(val_scores.average_precision.mean())
    return _MethodScores(test_scores, val_scores.best_level(), validation)


def _maps_of_split(
    model: nn.Module, loaders: Loaders, split: str, methods: list[str], targets: Tensor,
    usable: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """The maps (N, rows, columns) of the usable images of a split, for the classes `targets`.

    Raw attention, averaged over heads, counts as one method per block: "block 1", "block 2", ...
    """
    batches: list[dict[str, Tensor]] = []
    size = len(getattr(loaders.data, split))
    with tqdm(total=size, desc=f"maps, {split}", unit=" images", disable=None) as bar:
        for index, images in _batches(loaders, split):
            maps = {}
            for method in methods:
                if method == "raw":
                    for i, heads in enumerate(saliency.raw_attention(model, images), 1):
                        maps[f"block {i}"] = heads.mean(1).cpu()
                else:
                    target = targets[index].to(images.device)
                    maps[method] = saliency.compute_map(method, model, images, target).cpu()
            batches.append(maps)
            bar.update(len(index))
    return {name: torch.cat([maps[name] for maps in batches])[usable] for name in batches[0]}


def _faithfulness(
    model: nn.Module,
    loaders: Loaders,
    rows: Tensor,
    maps: dict[str, Tensor],
    targets: Tensor,
) -> dict[str, Any]:
    """Deletion and insertion on the test images `rows`.

    Two references join the maps: pixels in random order, and from the center outwards.
    """
    rng = torch.Generator().manual_seed(0)
    maps = {
        **maps,
        CENTER: metrics.baseline_maps(_GRID_SIZE)[CENTER].expand(len(rows), -1, -1),
        CHANCE: torch.rand(len(rows), *_GRID_SIZE, generator=rng),
    }
    images = loaders.normalize(loaders.data.test.images(rows))
    batches = torch.arange(len(rows)).split(loaders.batch_size)
    curves: dict[str, dict[str, np.ndarray]] = {}  # by map and kind, (N, steps + 1)
    for name, values in tqdm(maps.items(), desc="deletion, insertion", disable=None):
        parts = [
            metrics.deletion_insertion(model, images[b], values[b], targets[b]) for b in batches
        ]
        curves[name] = {
            kind: np.concatenate([part[kind] for part in parts])
            for kind in ("deletion", "insertion")
        }
    chance = {kind: metrics.area_under(values) for kind, values in curves[CHANCE].items()}
    return {
        name: {
            kind: {
                "area": stats.mean_interval(metrics.area_under(values)),
                CHANCE: stats.mean_interval(metrics.area_under(values) - chance[kind]),
                "curve": values.mean(0).round(4).tolist(),
            }
            for kind, values in kinds.items()
        }
        for name, kinds in curves.items()
    }


def _rank_correlation(maps: Tensor, other_maps: Tensor) -> float:
    """Mean Spearman correlation of two maps of the same image; 0 where a map is constant."""
    from scipy.stats import spearmanr

    pairs = zip(maps.flatten(1).numpy(), other_maps.flatten(1).numpy(), strict=True)
    values = [spearmanr(a, b).statistic if np.ptp(a) and np.ptp(b) else 0.0 for a, b in pairs]
    return round(float(np.mean(values)), 3)


def _predicted_classes(model: nn.Module, loaders: Loaders) -> dict[str, Tensor]:
    """The predicted classes (N,) of both scored splits; zeros for a model without classes."""
    predicted = {}
    for split in ("val", "test"):
        predicted[split] = torch.zeros(len(getattr(loaders.data, split)), dtype=torch.long)
        if saliency.count_classes(model):
            with torch.no_grad():
                for index, images in _batches(loaders, split):
                    predicted[split][index] = model(images).argmax(1).cpu()
    return predicted
