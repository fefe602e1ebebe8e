"""Scores of maps, compared with scikit-learn, SciPy, numpy and torchvision."""

import json
import re
import shutil
from pathlib import Path

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

from lab.attention.metrics import (
    ANIMAL,
    BACKGROUND,
    BORDER,
    LEVELS,
    area_under,
    average_precision,
    baseline_maps,
    deletion_insertion,
    load_outlines,
    localization_scores,
    summarize,
)
from lab.attention.score_report import (
    CENTER,
    CHANCE,
    RANDOM,
    TRAINED,
    candidates,
    compare,
    to_markdown,
    verdict,
    write,
)
from lab.attention.scoring import score_maps
from lab.core import UserError
from lab.core.stats import bootstrap
from lab.data.augment import Augmentation
from lab.data.datasets import Dataset, full_split, load_data
from lab.data.loaders import Loaders
from lab.data.preprocess import Preprocess
from model import VisionTransformer, ViTConfig


def outlines(count: int = 4, size: int = 24) -> torch.Tensor:
    """Random outlines with animal, background and border."""
    rng = np.random.default_rng(0)
    out = torch.from_numpy(rng.integers(0, 3, (count, size, size), dtype=np.uint8))
    out[:, 0, 0], out[:, 0, 1] = ANIMAL, BACKGROUND
    return out


@pytest.mark.parametrize("levels", [2, 7, 10**6])
def test_average_precision_equals_scikit_learn_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    for share in (0.05, 0.5, 1.0):
        values = (rng.integers(levels, size=500) / levels).astype(np.float32)
        is_animal = rng.random(500) < share
        expected = average_precision_score(is_animal, values)
        assert average_precision(values, is_animal) == pytest.approx(expected, abs=1e-9)
    assert average_precision(values, np.zeros(500, bool)) == 0


def test_average_precision_of_maps_equals_scikit_learn():
    maps, masks = torch.rand(4, 6, 6), outlines()
    found = localization_scores(maps, masks).average_precision
    large = F.interpolate(maps[:, None], (24, 24), mode="bilinear")[:, 0]
    for value, one, mask in zip(found, large, masks, strict=True):
        counted = mask != BORDER
        expected = average_precision_score(mask[counted] == ANIMAL, one[counted])
        assert value == pytest.approx(expected, abs=1e-6)


def test_iou_at_every_threshold_equals_scikit_learn():
    maps, masks = torch.rand(3, 24, 24), outlines(3)
    found = localization_scores(maps, masks).ious
    for i in range(3):
        counted = masks[i] != BORDER
        values = (maps[i][counted] / maps[i][counted].max()).numpy()
        for level in range(0, LEVELS + 1, 7):
            reached = np.floor(values * LEVELS + 1e-4) >= level
            expected = jaccard_score((masks[i][counted] == ANIMAL).numpy(), reached)
            assert found[i, level] == pytest.approx(expected)


def test_mass_and_pointing_by_hand():
    masks = torch.full((1, 4, 4), BACKGROUND, dtype=torch.uint8)
    masks[0, :2] = ANIMAL
    masks[0, 1, 3] = BORDER
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 0], maps[0, 1, 3], maps[0, 3, 3] = 3, 100, 1  # the maximum lies on the border
    found = localization_scores(maps, masks)
    assert found.mass[0] == pytest.approx(0.75)
    assert found.pointing[0] == 1
    maps[0, 3, 3] = 3  # a tie, half of it on the animal
    assert localization_scores(maps, masks).pointing[0] == 0.5


def test_perfect_map_scores_one_and_its_inverse_scores_low():
    masks = outlines(2)
    perfect = (masks == ANIMAL).float()
    good, bad = localization_scores(perfect, masks), localization_scores(1 - perfect, masks)
    for measure in ("mass", "pointing", "average_precision"):
        assert good.values(measure, 0) == pytest.approx(1)
    assert good.values("iou", good.best_level()) == pytest.approx(1)
    assert (bad.mass < 0.01).all()
    assert (bad.pointing == 0).all()
    assert (bad.average_precision < 0.6).all()


def test_uniform_map_scores_the_fraction_of_animal_pixels():
    masks = outlines(5)
    share = [(m == ANIMAL).sum() / (m != BORDER).sum() for m in masks]
    for maps in (torch.ones(5, 3, 3), torch.zeros(5, 3, 3)):
        found = localization_scores(maps, masks)
        for measure in ("mass", "pointing", "average_precision", "iou"):
            assert found.values(measure, LEVELS) == pytest.approx(np.array(share), abs=1e-6), (
                measure
            )


def test_center_gaussian_has_the_documented_width_and_center():
    center = baseline_maps((8, 8))["center Gaussian"]
    assert torch.equal(center, center.flip(0))
    assert torch.equal(center, center.T)
    # The centers of patches 5 and 6 are 1/16 and 3/16 of the side from the center.
    ratio = np.exp(-((3 / 16) ** 2 - (1 / 16) ** 2) / (2 * 0.25**2))
    assert (center[4, 5] / center[4, 4]).item() == pytest.approx(ratio)
    wide = baseline_maps((4, 16))["center Gaussian"]
    assert wide.shape == (4, 16)
    assert wide.argmax() in (1 * 16 + 7, 1 * 16 + 8)


def test_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(0)
    for values in (rng.random(60), rng.integers(0, 2, 111).astype(float), rng.normal(size=300)):
        reference = scipy_bootstrap((values,), np.mean, method="percentile", random_state=0)
        theirs = reference.confidence_interval
        spread = values.std() / len(values) ** 0.5  # a wrong percentile is off by 0.3 of it
        assert np.abs(np.array(bootstrap(values)) - theirs).max() < 0.25 * spread
        assert bootstrap(values) == bootstrap(values)
    assert bootstrap(np.full(9, 0.25)) == (0.25, 0.25)


def test_differences_are_paired_by_image():
    maps, masks = torch.rand(40, 6, 6), outlines(40)
    one, other = localization_scores(maps, masks), localization_scores(maps.flip(1), masks)
    found = summarize(one, 25, {"rival": (other, 20)})
    gain = one.average_precision - other.average_precision
    assert found["average_precision"]["rival"][0] == pytest.approx(gain.mean(), abs=1e-4)
    assert found["average_precision"]["rival"][1:] == pytest.approx(bootstrap(gain), abs=1e-4)
    gain = one.ious[:, 25] - other.ious[:, 20]
    assert found["iou"]["rival"][0] == pytest.approx(gain.mean(), abs=1e-4)


class Corner(nn.Module):
    """The logit of class 1 is the brightness of the top left quarter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = x[:, 0, :8, :8].mean((1, 2))
        return torch.stack([torch.zeros_like(bright), 6 * bright], 1)


def test_deletion_and_insertion_prefer_the_map_that_the_model_uses():
    images, targets = torch.ones(3, 1, 16, 16), torch.ones(3, dtype=torch.long)
    images[:, :, 8:, 8:] = -1  # otherwise blurring changes nothing
    used, unused = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    used[:, 0, 0], unused[:, 1, 1] = 1, 1
    good, bad = (deletion_insertion(Corner(), images, m, targets) for m in (used, unused))
    assert (area_under(good["deletion"]) < area_under(bad["deletion"]) - 0.2).all()
    assert (area_under(good["insertion"]) >= area_under(bad["insertion"])).all()
    for found in (good, bad):  # both curves have the whole image at one end
        whole_image = Corner()(images).softmax(1)[:, 1].numpy()
        assert found["deletion"][:, 0] == pytest.approx(whole_image)
        assert found["insertion"][:, -1] == pytest.approx(whole_image)
        assert found["deletion"][:, -1] == pytest.approx(0.5)  # only the mean color is left


def test_deletion_follows_the_order_of_the_map():
    seen = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.clone())
            return torch.zeros(len(x), 2)

    maps = torch.arange(16.0).reshape(1, 4, 4)
    deletion_insertion(
        Spy(), torch.ones(1, 1, 4, 4), maps, torch.zeros(1, dtype=torch.long), steps=4
    )
    deleted = [int((x == 0).sum()) for x in seen[::2]]
    assert deleted == [0, 4, 8, 12, 16]
    assert (seen[2][0, 0, 3] == 0).all()
    assert (seen[2][0, 0, :3] == 1).all()


def test_area_equals_the_trapezoidal_rule():
    curve = np.random.default_rng(0).random((3, 11))
    assert area_under(curve) == pytest.approx(np.trapezoid(curve, np.linspace(0, 1, 11), axis=1))


def test_outlines_are_cropped_like_torchvision_does(pets):
    preprocess = Preprocess(28, [0.5] * 3, [0.5] * 3, crop_pct=0.875)
    data = load_data("pets", str(pets), preprocess.resized)
    found = load_outlines(data, data.test, str(pets), preprocess)
    cut = v2.Compose([v2.Resize(32, InterpolationMode.NEAREST), v2.CenterCrop(28)])
    theirs = OxfordIIITPet(str(pets), "test", target_types="segmentation")
    kinds = {1: ANIMAL, 2: BACKGROUND, 3: BORDER}
    for i in range(len(data.test)):
        expected = np.vectorize(kinds.get)(np.asarray(cut(theirs[i][1])))
        assert (found[i].numpy() == expected).mean() > 0.97  # rounding may differ by half a pixel
    assert set(found.unique().tolist()) == {ANIMAL, BACKGROUND, BORDER}


def test_missing_outlines_end_in_a_message(pets, tmp_path):
    preprocess = Preprocess(8, [0.5], [0.5])
    digits = load_data("digits")
    with pytest.raises(UserError, match=r"digits has no segmentation masks.*--images pets"):
        load_outlines(digits, digits.test, "data", preprocess)
    preprocess = Preprocess(32, [0.5] * 3, [0.5] * 3)
    data = load_data("pets", str(pets), 32)
    with pytest.raises(UserError, match=r"12 of 12 segmentation masks are missing"):
        load_outlines(data, data.test, str(tmp_path), preprocess)


def test_outline_that_is_not_an_image_is_named(pets, tmp_path):
    shutil.copytree(pets, tmp_path / "data")
    preprocess = Preprocess(32, [0.5] * 3, [0.5] * 3)
    data = load_data("pets", str(pets), 32)
    folder = tmp_path / "data" / "oxford-iiit-pet" / "annotations" / "trimaps"
    path = folder / f"{Path(data.test.names[3]).stem}.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # runs code if opened
    with pytest.raises(UserError, match=f"cannot read the segmentation mask .*{path.name}"):
        load_outlines(data, data.test, str(tmp_path / "data"), preprocess)


def toy() -> tuple[Loaders, dict[str, torch.Tensor]]:
    """Images of bright squares on a dark background, and the outlines of the squares."""
    rng = np.random.default_rng(0)
    store = torch.randint(0, 60, (30, 3, 16, 16), dtype=torch.uint8)
    masks = torch.full((30, 16, 16), BACKGROUND, dtype=torch.uint8)
    for i in range(30):
        y, x = rng.integers(0, 9, 2)
        store[i, :, y : y + 7, x : x + 7] = 220
        masks[i, y : y + 7, x : x + 7] = ANIMAL
    masks[29] = ANIMAL  # no background, so this image is left out
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
    with torch.no_grad():  # "trained": its last block attends to bright patches
        models[TRAINED].patch_embed.proj.weight.fill_(0.02)
    targets = {split: torch.zeros(len(m), dtype=torch.long) for split, m in masks.items()}
    found = score_maps(models, loaders, masks, targets, 6)
    return {"title": "toy", "images": "toys, 15 test images", **found}


def test_every_method_and_baseline_is_scored(record):
    assert list(record["methods"]) == ["block 1", "block 2", "block 3", "rollout",
                                       "gradient-rollout"]  # fmt: skip
    assert record["test_images"] == 14
    assert record["left_out"] == 1
    assert record["deletion_images"] == 6
    assert {CENTER, CHANCE} < set(record["faithfulness"])
    for found in record["methods"].values():
        for weights in (TRAINED, RANDOM):
            for values in found[weights].values():
                mean, low, high = values["mean"]
                assert 0 <= low <= mean <= high <= 1
    rivals = set(record["methods"]["rollout"][TRAINED]["mass"])
    assert rivals == {"mean", RANDOM, CENTER, "uniform"}
    json.dumps(record)  # fails for anything but plain numbers


def test_identical_weights_correlate_perfectly_and_gain_nothing():
    torch.manual_seed(0)
    loaders, masks = toy()
    model = VisionTransformer(ViTConfig(16, 4, 3, 2, 16, 2, 2)).eval()
    batches = []
    model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    targets = {split: torch.zeros(len(m), dtype=torch.long) for split, m in masks.items()}
    found = score_maps({TRAINED: model, RANDOM: model}, loaders, masks, targets, 0)
    assert max(batches) == loaders.batch_size
    for values in found["methods"].values():
        assert values["rank_correlation"] == 1
        assert values[TRAINED]["iou"][RANDOM] == [0, 0, 0]
    assert "faithfulness" not in found


def test_table_shows_the_numbers_of_the_record(record):
    text = to_markdown(record)
    mean, low, high = record["methods"]["rollout"][TRAINED]["iou"]["mean"]
    assert f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    columns = {line.count("|") for line in rows[:13]}
    assert columns == {8}
    assert sum(line.startswith("| rollout | trained") for line in rows) == 1


def pretend(record: dict, gains: dict[str, tuple[float, float]]) -> dict:
    """A copy of the record with these gains over center and random weights (lower ends)."""
    new = json.loads(json.dumps(record))
    for name in new["methods"]:
        center, random = gains.get(name, (-0.1, -0.1))
        values = new["methods"][name][TRAINED]["average_precision"]
        values[CENTER], values[RANDOM] = [center + 0.1, center, 1], [random + 0.1, random, 1]
    return new


def test_verdict_trusts_maps_that_beat_both_references(record):
    lines = verdict(pretend(record, {"rollout": (0.01, 0.02), "gradient-rollout": (0.01, -0.01)}))
    assert re.search(r"trust rollout\.", lines[-1])
    by_method = {line.split(":")[0]: line for line in lines}
    assert "no better than with random weights" in by_method["- gradient-rollout"]
    assert "trust none" in verdict(pretend(record, {}))[-1]


def test_faithfulness_summary_names_maps_that_beat_chance_twice(record):
    def made(deletion: float, insertion: float) -> dict:
        kinds = {"deletion": deletion, "insertion": insertion}
        return {kind: {CHANCE: [gain, gain - 0.02, gain + 0.02]} for kind, gain in kinds.items()}

    areas = {name: made(0.01, -0.01) for name in candidates(record)}
    assert "insertion: none." in verdict({**record, "faithfulness": areas})[-1]
    areas |= {"rollout": made(-0.03, 0.03), "gradient-rollout": made(-0.03, 0.01)}
    assert re.search(r"insertion: rollout\.", verdict({**record, "faithfulness": areas})[-1])


def test_deletion_is_compared_with_chance_on_the_same_images(record):
    for found in record["faithfulness"].values():
        for kind in ("deletion", "insertion"):
            chance = record["faithfulness"][CHANCE][kind]["area"][0]
            gain = found[kind]["area"][0] - chance
            assert found[kind][CHANCE][0] == pytest.approx(gain, abs=2e-4)
            assert len(found[kind]["curve"]) == 11
    assert record["faithfulness"][CHANCE]["deletion"][CHANCE] == [0, 0, 0]


def test_figures_are_drawn_with_and_without_classes(record, tmp_path):
    bare = {k: v for k, v in record.items() if k != "faithfulness"}
    cnn = {**record, "title": "cnn", "methods": {"grad-cam": record["methods"]["rollout"]}}
    cnn["faithfulness"] = {**record["faithfulness"], "grad-cam": record["faithfulness"]["rollout"]}
    for name, one in (("a", record), ("b", bare), ("c", cnn)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, one)
        with Image.open(tmp_path / name / "score.png") as image:
            assert image.width > 1000
            assert len(image.convert("L").resize((50, 50)).getcolors()) > 9
    compare(tmp_path / "scores", [record, cnn])
    text = (tmp_path / "scores.md").read_text(encoding="utf-8")
    assert text.count("| toy |") == len(candidates(record))
    assert text.count("| cnn |") == 1
