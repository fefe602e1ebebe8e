"""Scores of maps against outlines: what is measured, against scikit-learn, SciPy and numpy."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import average_precision_score, jaccard_score
from torch import nn
from torchvision.datasets import OxfordIIITPet
from torchvision.transforms import InterpolationMode, v2

from lab.attention.faithfulness import Curves, curves
from lab.attention.localization import (
    ANIMAL,
    BACKGROUND,
    BORDER,
    LEVELS,
    baselines,
    judge,
    summarise,
    trimaps,
)
from lab.attention.score_report import compare, draw, faithful, table, verdict
from lab.attention.scoring import CENTRE, CHANCE, RANDOM, TRAINED, candidates, score
from lab.core.errors import UserError
from lab.core.stats import bootstrap
from lab.data.augment import Augmentation
from lab.data.datasets import Dataset, full_split, load_data
from lab.data.loaders import Loaders
from lab.data.preprocess import Preprocess
from model import VisionTransformer, ViTConfig

RNG = np.random.default_rng(0)


def outlines(count: int = 4, size: int = 24) -> torch.Tensor:
    """Random outlines with a border, each with animal and background."""
    out = torch.from_numpy(RNG.integers(0, 3, (count, size, size), dtype=np.uint8))
    out[:, 0, 0], out[:, 0, 1] = ANIMAL, BACKGROUND
    return out


def test_average_precision_is_scikit_learns():
    maps, masks = torch.rand(4, 6, 6), outlines()
    found = judge(maps, masks).average_precision
    large = F.interpolate(maps[:, None], (24, 24), mode="bilinear")[:, 0]
    for value, one, mask in zip(found, large, masks, strict=True):
        judged = mask != BORDER
        expected = average_precision_score(mask[judged] == ANIMAL, one[judged])
        assert value == pytest.approx(expected, abs=1e-6)


def test_overlap_at_every_threshold_is_scikit_learns():
    maps, masks = torch.rand(3, 24, 24), outlines(3)
    found = judge(maps, masks).overlaps
    for i in range(3):
        judged = masks[i] != BORDER
        values = (maps[i][judged] / maps[i][judged].max()).numpy()
        for level in range(0, LEVELS + 1, 7):
            said = np.floor(values * LEVELS + 1e-4) >= level
            expected = jaccard_score((masks[i][judged] == ANIMAL).numpy(), said)
            assert found[i, level] == pytest.approx(expected)


def test_mass_and_pointing_by_hand():
    masks = torch.full((1, 4, 4), BACKGROUND, dtype=torch.uint8)
    masks[0, :2] = ANIMAL
    masks[0, 1, 3] = BORDER
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 0], maps[0, 1, 3], maps[0, 3, 3] = 3, 100, 1  # the largest value is on the border
    found = judge(maps, masks)
    assert found.mass[0] == pytest.approx(0.75)
    assert found.pointing[0] == 1
    maps[0, 3, 3] = 3  # a tie: half of it is right
    assert judge(maps, masks).pointing[0] == 0.5


def test_a_perfect_map_scores_one_and_its_opposite_little():
    masks = outlines(2)
    perfect = (masks == ANIMAL).float()
    good, bad = judge(perfect, masks), judge(1 - perfect, masks)
    for measure in ("mass", "pointing", "average_precision"):
        assert good.of(measure, 0) == pytest.approx(1)
    assert good.of("iou", good.best_level()) == pytest.approx(1)
    assert (bad.mass < 0.01).all()
    assert (bad.pointing == 0).all()
    assert (bad.average_precision < 0.6).all()


def test_a_uniform_map_scores_the_animals_share_everywhere():
    masks = outlines(5)
    share = [(m == ANIMAL).sum() / (m != BORDER).sum() for m in masks]
    for maps in (torch.ones(5, 3, 3), torch.zeros(5, 3, 3)):
        found = judge(maps, masks)
        for measure in ("mass", "pointing", "average_precision", "iou"):
            assert found.of(measure, LEVELS) == pytest.approx(np.array(share), abs=1e-6), measure


def test_centre_gaussian_has_its_deviation_and_its_centre():
    centre = baselines((8, 8))["centre Gaussian"]
    assert torch.equal(centre, centre.flip(0))
    assert torch.equal(centre, centre.T)
    # The centres of patches 5 and 6 are 1/16 and 3/16 of the side from the middle.
    ratio = np.exp(-((3 / 16) ** 2 - (1 / 16) ** 2) / (2 * 0.25**2))
    assert (centre[4, 5] / centre[4, 4]).item() == pytest.approx(ratio)
    wide = baselines((4, 16))["centre Gaussian"]
    assert wide.shape == (4, 16)
    assert wide.argmax() in (1 * 16 + 7, 1 * 16 + 8)


def test_bootstrap_agrees_with_scipys():
    for values in (RNG.random(60), RNG.integers(0, 2, 111).astype(float), RNG.normal(size=300)):
        theirs = scipy_bootstrap((values,), np.mean, method="percentile").confidence_interval
        spread = values.std() / len(values) ** 0.5
        assert np.abs(np.array(bootstrap(values)) - theirs).max() < 0.15 * spread
        assert bootstrap(values) == bootstrap(values)
    assert bootstrap(np.full(9, 0.25)) == (0.25, 0.25)


def test_differences_are_paired_image_by_image():
    maps, masks = torch.rand(40, 6, 6), outlines(40)
    one, other = judge(maps, masks), judge(maps.flip(1), masks)
    found = summarise(one, 25, {"rival": (other, 20)})
    gain = one.average_precision - other.average_precision
    assert found["average_precision"]["rival"][0] == pytest.approx(gain.mean(), abs=1e-4)
    assert found["average_precision"]["rival"][1:] == pytest.approx(bootstrap(gain), abs=1e-4)
    gain = one.overlaps[:, 25] - other.overlaps[:, 20]
    assert found["iou"]["rival"][0] == pytest.approx(gain.mean(), abs=1e-4)


class Corner(nn.Module):
    """Class 1 by how bright the top left quarter is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = x[:, 0, :8, :8].mean((1, 2))
        return torch.stack([torch.zeros_like(bright), 6 * bright], 1)


def test_deletion_and_insertion_know_what_the_model_uses():
    images, targets = torch.ones(3, 1, 16, 16), torch.ones(3, dtype=torch.long)
    images[:, :, 8:, 8:] = -1  # else blurring changes nothing
    used, unused = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    used[:, 0, 0], unused[:, 1, 1] = 1, 1
    good, bad = (curves(Corner(), images, maps, targets) for maps in (used, unused))
    assert (Curves.area(good.deletion) < Curves.area(bad.deletion) - 0.2).all()
    assert (Curves.area(good.insertion) >= Curves.area(bad.insertion)).all()
    for found in (good, bad):  # both ends are the whole image, and none of it
        whole_image = Corner()(images).softmax(1)[:, 1].numpy()
        assert found.deletion[:, 0] == pytest.approx(whole_image)
        assert found.insertion[:, -1] == pytest.approx(whole_image)
        assert found.deletion[:, -1] == pytest.approx(0.5)  # nothing is left: the mean colour


def test_deletion_takes_pixels_in_the_maps_order():
    seen = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.clone())
            return torch.zeros(len(x), 2)

    maps = torch.arange(16.0).reshape(1, 4, 4)
    curves(Spy(), torch.ones(1, 1, 4, 4), maps, torch.zeros(1, dtype=torch.long), steps=4)
    deleted = [int((x == 0).sum()) for x in seen[::2]]
    assert deleted == [0, 4, 8, 12, 16]
    assert (seen[2][0, 0, 3] == 0).all()
    assert (seen[2][0, 0, :3] == 1).all()


def test_area_is_that_of_the_trapezoids():
    curve = RNG.random((3, 11))
    assert Curves.area(curve) == pytest.approx(np.trapezoid(curve, np.linspace(0, 1, 11), axis=1))


def test_trimaps_are_cut_as_torchvision_cuts_them(pets):
    preprocess = Preprocess(28, [0.5] * 3, [0.5] * 3, crop_pct=0.875)
    data = load_data("pets", str(pets), preprocess.resized)
    found = trimaps(data, data.test, str(pets), preprocess)
    cut = v2.Compose([v2.Resize(32, InterpolationMode.NEAREST), v2.CenterCrop(28)])
    theirs = OxfordIIITPet(str(pets), "test", target_types="segmentation")
    kinds = {1: ANIMAL, 2: BACKGROUND, 3: BORDER}
    for i in range(len(data.test)):
        expected = np.vectorize(kinds.get)(np.asarray(cut(theirs[i][1])))
        assert (found[i].numpy() == expected).mean() > 0.97  # they may round half a pixel otherwise
    assert set(found.unique().tolist()) == {ANIMAL, BACKGROUND, BORDER}


def test_data_without_outlines_ends_in_a_sentence(pets, tmp_path):
    preprocess = Preprocess(8, [0.5], [0.5])
    digits = load_data("digits")
    with pytest.raises(UserError, match=r"digits has no outlines.*--images pets"):
        trimaps(digits, digits.test, "data", preprocess)
    preprocess = Preprocess(32, [0.5] * 3, [0.5] * 3)
    data = load_data("pets", str(pets), 32)
    with pytest.raises(UserError, match=r"12 of 12 outlines are missing"):
        trimaps(data, data.test, str(tmp_path), preprocess)


def toy() -> tuple[Loaders, dict[str, torch.Tensor]]:
    """Bright squares on dark ground: what a model may learn to find, and where they are."""
    store = torch.randint(0, 60, (30, 3, 16, 16), dtype=torch.uint8)
    masks = torch.full((30, 16, 16), BACKGROUND, dtype=torch.uint8)
    for i in range(30):
        y, x = RNG.integers(0, 9, 2)
        store[i, :, y : y + 7, x : x + 7] = 220
        masks[i, y : y + 7, x : x + 7] = ANIMAL
    masks[29] = ANIMAL  # all animal: nothing to find
    labels = torch.arange(30) % 2
    parts = {name: full_split(store[rows], labels[rows], [str(i) for i in rows])
             for name, rows in (("train", range(5)), ("val", range(5, 15)),
                                ("test", range(15, 30)))}  # fmt: skip
    data = Dataset("pets", ["a", "b"], **parts, mean=[0.5] * 3, std=[0.5] * 3, remarks=[])
    loaders = Loaders(data, Preprocess(16, [0.5] * 3, [0.5] * 3), 4, Augmentation())
    return loaders, {"val": masks[5:15], "test": masks[15:]}


@pytest.fixture(scope="module")
def record() -> dict:
    torch.manual_seed(0)
    loaders, masks = toy()
    config = ViTConfig(16, 4, 3, 2, 16, 3, 2)
    models = {TRAINED: VisionTransformer(config).eval(), RANDOM: VisionTransformer(config).eval()}
    with torch.no_grad():  # "trained": its last block looks at bright patches
        models[TRAINED].patch_embed.proj.weight.fill_(0.02)
    targets = {split: torch.zeros(len(m), dtype=torch.long) for split, m in masks.items()}
    found = score(models, loaders, masks, targets, 6)
    return {"title": "toy", "images": "toys, 15 test images", **found}


def test_every_method_and_baseline_is_scored(record):
    assert list(record["methods"]) == ["block 1", "block 2", "block 3", "rollout",
                                       "gradient-rollout"]  # fmt: skip
    assert record["test_images"] == 14
    assert record["left_out"] == 1
    assert record["deletion_images"] == 6
    assert {CENTRE, CHANCE} < set(record["faithfulness"])
    for found in record["methods"].values():
        for weights in (TRAINED, RANDOM):
            for values in found[weights].values():
                mean, low, high = values["mean"]
                assert 0 <= low <= mean <= high <= 1
    rivals = set(record["methods"]["rollout"][TRAINED]["mass"])
    assert rivals == {"mean", RANDOM, CENTRE, "uniform"}
    json.dumps(record)  # plain numbers alone


def test_the_same_weights_are_alike_and_gain_nothing():
    torch.manual_seed(0)
    loaders, masks = toy()
    model = VisionTransformer(ViTConfig(16, 4, 3, 2, 16, 2, 2)).eval()
    targets = {split: torch.zeros(len(m), dtype=torch.long) for split, m in masks.items()}
    found = score({TRAINED: model, RANDOM: model}, loaders, masks, targets, 0)
    for values in found["methods"].values():
        assert values["likeness"] == 1
        assert values[TRAINED]["iou"][RANDOM] == [0, 0, 0]
    assert "faithfulness" not in found


def test_tables_say_what_the_record_says(record):
    text = table(record)
    mean, low, high = record["methods"]["rollout"][TRAINED]["iou"]["mean"]
    assert f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    columns = {line.count("|") for line in rows[:13]}
    assert columns == {8}
    assert sum(line.startswith("| rollout | trained") for line in rows) == 1


def pretend(record: dict, gains: dict[str, tuple[float, float]]) -> dict:
    """The record as if methods had gained so much on centre and random weights (lower ends)."""
    new = json.loads(json.dumps(record))
    for name in new["methods"]:
        centre, random = gains.get(name, (-0.1, -0.1))
        values = new["methods"][name][TRAINED]["average_precision"]
        values[CENTRE], values[RANDOM] = [centre + 0.1, centre, 1], [random + 0.1, random, 1]
    return new


def test_verdict_believes_what_beats_both_the_centre_and_random_weights(record):
    said = verdict(pretend(record, {"rollout": (0.01, 0.02), "gradient-rollout": (0.01, -0.01)}))
    assert re.search(r"believe rollout\.", said[-1])
    lines = {line.split(":")[0]: line for line in said}
    assert "no better than without training" in lines["- gradient-rollout"]
    assert "believe none" in verdict(pretend(record, {}))[-1]


def test_faithful_names_only_what_beats_chance_twice(record):
    def made(deletion: float, insertion: float) -> dict:
        kinds = {"deletion": deletion, "insertion": insertion}
        return {kind: {CHANCE: [gain, gain - 0.02, gain + 0.02]} for kind, gain in kinds.items()}

    areas = {name: made(0.01, -0.01) for name in candidates(record)}
    assert "no map orders" in faithful({**record, "faithfulness": areas})
    areas |= {"rollout": made(-0.03, 0.03), "gradient-rollout": made(-0.03, 0.01)}
    assert re.search(r"by rollout beats a random", faithful({**record, "faithfulness": areas}))


def test_deletion_is_compared_with_chance_on_the_same_images(record):
    for found in record["faithfulness"].values():
        for kind in ("deletion", "insertion"):
            chance = record["faithfulness"][CHANCE][kind]["area"][0]
            gain = found[kind]["area"][0] - chance
            assert found[kind][CHANCE][0] == pytest.approx(gain, abs=2e-4)
            assert len(found[kind]["curve"]) == 11
    assert record["faithfulness"][CHANCE]["deletion"][CHANCE] == [0, 0, 0]


def test_pictures_are_drawn_with_and_without_classes(record, tmp_path):
    bare = {k: v for k, v in record.items() if k != "faithfulness"}
    cnn = {**record, "title": "cnn", "methods": {"grad-cam": record["methods"]["rollout"]}}
    cnn["faithfulness"] = {**record["faithfulness"], "grad-cam": record["faithfulness"]["rollout"]}
    for name, one in (("a", record), ("b", bare), ("c", cnn)):
        draw(tmp_path / f"{name}.png", one)
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 1000
            assert len(image.convert("L").resize((50, 50)).getcolors()) > 9
    compare(tmp_path / "scores", [record, cnn])
    text = (tmp_path / "scores.md").read_text(encoding="utf-8")
    assert text.count("| toy |") == len(candidates(record))
    assert text.count("| cnn |") == 1
