"""Every map of a model scored against outlines and baselines, and what the scores mean in words."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from lab.attention.faithfulness import Curves, curves
from lab.attention.localization import (
    ANIMAL,
    BACKGROUND,
    CENTRE,
    LEVELS,
    Judged,
    baselines,
    judge,
    summarise,
)
from lab.attention.saliency import map_of, methods_of, raw
from lab.core import stats
from lab.data.loaders import Loaders

CHANCE = "random order"  # of the pixels
GRID = (32, 32)  # of the baselines' maps
TRAINED, RANDOM = "trained", "random weights"


@dataclass(frozen=True)
class Scored:
    """One method on the test images, with what the validation images chose for it."""

    test: Judged
    level: int  # number of the threshold
    validation: float  # average precision there


def scored(maps: dict[str, Tensor], masks: dict[str, Tensor]) -> Scored:
    """Judges a method's maps (N, rows, columns) of "val" and "test" by the outlines (N, S, S)."""
    val, test = (judge(maps[split], masks[split]) for split in ("val", "test"))
    return Scored(test, val.best_level(), float(val.average_precision.mean()))


def every_map(
    model: nn.Module, images: Tensor, targets: Tensor | None, methods: list[str]
) -> dict[str, Tensor]:
    """Maps of images by all these methods: raw ones, mean of the heads, as "block 1", ..."""
    out = {}
    for name in methods:
        if name == "raw":
            every = enumerate(raw(model, images), 1)
            out |= {f"block {i}": heads.mean(1) for i, heads in every}
        else:
            out[name] = map_of(name, model, images, targets)
    return out


def maps_of(
    model: nn.Module, loaders: Loaders, split: str, methods: list[str], targets: Tensor
) -> dict[str, Tensor]:
    """Maps of a whole split, by method, (N, rows, columns); `targets` (N,) are explained."""
    parts = []
    size = len(getattr(loaders.data, split))
    with tqdm(total=size, desc=f"maps, {split}", unit=" images", disable=None) as bar:
        for index, images, _ in loaders.evaluation(split):
            found = every_map(model, images, targets[index].to(images.device), methods)
            parts.append({name: maps.cpu() for name, maps in found.items()})
            bar.update(len(index))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def score(
    models: dict[str, nn.Module],
    loaders: Loaders,
    outlines: dict[str, Tensor],
    targets: dict[str, Tensor],
    deletion_images: int,
) -> dict[str, Any]:
    """Scores every method on the test images; validation chooses thresholds and the best block.

    Args:
        models: TRAINED, and RANDOM, the same architecture with random weights (Adebayo et al.
            2018: a map that looks as good without training shows the picture, not the model).
        outlines: of "val" and "test", (N, S, S), from lab/trimaps.
        targets: the classes that are explained, (N,), of the same splits.
        deletion_images: how many test images, spread evenly, deletion and insertion take; 0: the
            model has no classes.

    Returns: the record, as metrics.json has it.
    """
    first = next(loaders.evaluation("test"))[1]
    methods = [name for name, reason in methods_of(models[TRAINED], first).items() if not reason]
    # An image that is all animal, or shows none, tells nothing.
    keep = {split: (masks == ANIMAL).any(-1).any(-1) & (masks == BACKGROUND).any(-1).any(-1)
            for split, masks in outlines.items()}  # fmt: skip
    masks = {split: outlines[split][keep[split]] for split in outlines}

    maps: dict[str, dict[str, dict[str, Tensor]]] = {}  # by weights, split and method
    found: dict[str, dict[str, Scored]] = {}  # by weights and method
    for weights, model in models.items():
        maps[weights] = {}
        for split in masks:
            every = maps_of(model, loaders, split, methods, targets[split])
            maps[weights][split] = {name: values[keep[split]] for name, values in every.items()}
        found[weights] = {
            name: scored({split: maps[weights][split][name] for split in masks}, masks)
            for name in tqdm(maps[weights]["test"], desc=f"scores, {weights}", disable=None)
        }
    for name, values in baselines(GRID).items():
        same = {split: values.expand(len(its), -1, -1) for split, its in masks.items()}
        found.setdefault("baselines", {})[name] = scored(same, masks)

    record: dict[str, Any] = {
        "test_images": len(masks["test"]),
        "left_out": int((~keep["test"]).sum()),
        "animal_share": round(float(found["baselines"]["uniform"].test.mass.mean()), 4),
        "methods": {},
        "baselines": {name: summarise(its.test, its.level, {})
                      for name, its in found["baselines"].items()},
    }  # fmt: skip
    for name, its in found[TRAINED].items():
        rivals = {RANDOM: found[RANDOM][name], **found["baselines"]}
        both = (maps[weights]["test"][name] for weights in models)
        record["methods"][name] = {
            "validation": round(its.validation, 4),
            "threshold": its.level / LEVELS,
            TRAINED: summarise(
                its.test, its.level, {n: (r.test, r.level) for n, r in rivals.items()}
            ),
            RANDOM: summarise(rivals[RANDOM].test, rivals[RANDOM].level, {}),
            "likeness": likeness(*both),
        }
    if deletion_images:
        tried = {name: maps[TRAINED]["test"][name] for name in candidates(record)}
        kept = keep["test"].nonzero()[:, 0]
        sample = torch.linspace(0, len(kept) - 1, min(deletion_images, len(kept))).round().long()
        record["deletion_images"] = len(sample)
        record["faithfulness"] = faithfulness(
            models[TRAINED], loaders, kept[sample], {n: m[sample] for n, m in tried.items()},
            targets["test"][kept[sample]],
        )  # fmt: skip
    return record


def faithfulness(
    model: nn.Module,
    loaders: Loaders,
    rows: Tensor,
    maps: dict[str, Tensor],
    targets: Tensor,
) -> dict[str, Any]:
    """Deletion and insertion of the test images `rows`, beside a random order and the centre's."""
    rng = torch.Generator().manual_seed(0)
    centre = baselines(GRID)[CENTRE]
    every = {**maps, CENTRE: centre.expand(len(rows), -1, -1),
             CHANCE: torch.rand(len(rows), *GRID, generator=rng)}  # fmt: skip
    normalised = loaders.normalised(loaders.data.test.images(rows))
    starts = range(0, len(rows), loaders.batch_size)
    parts = [slice(start, start + loaders.batch_size) for start in starts]
    found = {kind: {} for kind in ("deletion", "insertion")}
    for name, its in tqdm(every.items(), desc="deletion, insertion", disable=None):
        done = [curves(model, normalised[p], its[p], targets[p]) for p in parts]
        for kind, by_name in found.items():
            by_name[name] = np.concatenate([getattr(d, kind) for d in done])

    out: dict[str, Any] = {name: {} for name in every}
    for kind, by_name in found.items():
        chance = Curves.area(by_name[CHANCE])
        for name, curve in by_name.items():
            area = Curves.area(curve)
            out[name][kind] = {"area": stats.mean_interval(area),
                               CHANCE: stats.mean_interval(area - chance),
                               "curve": curve.mean(0).round(4).tolist()}  # fmt: skip
    return out


def likeness(one: Tensor, other: Tensor) -> float:
    """Mean rank correlation (Spearman) of maps of the same images; zero for constant maps."""
    pairs = zip(one.flatten(1).numpy(), other.flatten(1).numpy(), strict=True)
    found = [spearmanr(a, b).statistic if np.ptp(a) and np.ptp(b) else 0.0 for a, b in pairs]
    return round(float(np.mean(found)), 3)


def candidates(record: dict[str, Any]) -> list[str]:
    """The methods that a user would choose from: of the blocks, validation's best and the last."""
    methods = record["methods"]
    blocks = [name for name in methods if name.startswith("block ")]
    chosen = [name for name in methods if name not in blocks]
    if blocks:
        best = max(blocks, key=lambda name: methods[name]["validation"])
        chosen = [best, *([blocks[-1]] if best != blocks[-1] else []), *chosen]
    return chosen
