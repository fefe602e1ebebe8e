"""benchmarks.speedrun: its parts agree with scikit-learn and numpy, and the script runs."""

import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA

from benchmarks import race, speedrun, variants
from lab.core.errors import UserError
from lab.data.augment import Augmentation
from lab.data.datasets import load_data
from lab.data.loaders import Loaders
from lab.data.preprocess import Preprocess
from model import VisionTransformer, ViTConfig

WORDS = ["--num-seeds", "1", "--embed-dim", "24", "--depth", "1", "--num-heads", "2",
         "--batch-size",
         "10", "--checks", "2", "--precision", "fp32", "--seconds", "1.5"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 training and 10 test images of 32 pixels, two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for shade, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8) + 127 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def ticking(monkeypatch):
    """A clock that advances by 50 ms whenever it is read, so that no result depends on speed."""
    ticks = itertools.count()
    monkeypatch.setattr(race.time, "perf_counter", lambda: 0.05 * next(ticks))


@pytest.fixture
def runner(folder):
    c = SimpleNamespace(**{
        **{name: getattr(speedrun, name) for name in speedrun.__annotations__ if name.isupper()},
        **speedrun.RECIPES["cpu"], "EMBED_DIM": 24, "DEPTH": 1, "NUM_HEADS": 2, "BATCH_SIZE": 10,
        "PRECISION": "fp32",
    })  # fmt: skip
    data = load_data(str(folder))
    loaders = Loaders(data, Preprocess(32, data.mean, data.std, 1.0), 10, Augmentation())
    return race.Runner(c, loaders, 0)


def command(monkeypatch, folder, out, *words):
    monkeypatch.setattr(sys, "argv", [
        "speedrun.py", "--dataset", str(folder), "--out", str(out), *WORDS, *words
    ])  # fmt: skip
    kept = {name: getattr(speedrun, name) for name in speedrun.__annotations__}
    try:
        speedrun.main()
    finally:
        vars(speedrun).update(kept)


@pytest.mark.parametrize(("size", "patch", "width"), [(16, 4, 24), (16, 4, 120), (8, 2, 30)])
def test_embedding_starts_as_principal_components(size, patch, width):
    torch.manual_seed(size + width)
    images = F.avg_pool2d(torch.randn(64, 3, 4 * size, 4 * size), 5, 1, 2)[:, :, :size, :size]
    model = VisionTransformer(ViTConfig(img_size=size, patch_size=patch, num_classes=2,
                                        embed_dim=width, depth=1, num_heads=1))  # fmt: skip
    deviation = model.patch_embed.proj.weight.std()
    race.warm_start(model, images)
    weight = model.patch_embed.proj.weight.detach()
    assert weight.std().item() == pytest.approx(deviation.item(), rel=1e-4)
    patches = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, C, rows, columns, P, P)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    components = PCA().fit(patches.numpy()).components_
    size = 3 * patch**2
    for i, row in enumerate(weight.flatten(1)):
        cosine = F.cosine_similarity(row, torch.tensor(components[i % size]), dim=0).item()
        assert abs(cosine) == pytest.approx(1, abs=1e-3), i
        if i >= size:
            sign = -1 if i // size % 2 else 1
            torch.testing.assert_close(row, sign * weight.flatten(1)[i % size])
    variances = (patches @ weight.flatten(1).T).var(0)[: min(width, size)]
    assert (variances[:-1] >= variances[1:] * 0.999).all()  # the largest first, none drowned
    assert variances.max() < 60 * variances.min()


def test_training_starts_on_half_size_images(runner, ticking, monkeypatch):
    seen, real = [], runner.model.forward
    monkeypatch.setattr(runner.model, "forward", lambda x: seen.append(x) or real(x))
    images, labels = next(runner.loaders.train(1))
    runner.step(images, labels, 0.2)
    means = images.numpy().reshape(-1, 3, 16, 2, 16, 2).mean((3, 5))
    np.testing.assert_allclose(seen[0], means, atol=1e-6)
    runner.run(0.3)
    sides = [x.shape[-1] for x in seen]
    assert sides == sorted(sides), "images never shrink again"
    assert set(sides) == {16, 32}
    assert sides[-1] == 32, "test images have their full size"
    assert runner.optimizer.state[runner.model.pos_embed], "position embeddings are trained"


def variant(runner, name):
    """A Runner of two blocks that trains a variant on the images of another one."""
    changes = {"DEPTH": 2, **speedrun.VARIANT_CHANGES[name]}
    return race.Runner(SimpleNamespace(**{**vars(runner.c), **changes}), runner.loaders, 0)


@pytest.mark.parametrize("name", [*speedrun.VARIANT_CHANGES])
def test_every_variant_trains_all_of_its_parameters(runner, name):
    varied = variant(runner, name)
    before = {key: value.clone() for key, value in varied.model.state_dict().items()}
    for done in (0.3, 0.9):  # before and after the image size and the dropping change
        varied.enter_phase(done)
        varied.step(*next(varied.batches()), done)
    same = [key for key, value in varied.model.state_dict().items() if value.equal(before[key])]
    assert not same
    assert 0 <= varied.evaluate("test").accuracy <= 1


def test_variants_have_as_many_parameters_as_the_recipe(runner):
    def size(name):
        return sum(p.numel() for p in variant(runner, name).model.parameters())

    width, heads, depth = 24, 2, 2
    assert size("squared ReLU") == size("chosen")
    assert size("SwiGLU") == pytest.approx(size("chosen"), rel=0.01)
    assert size("register tokens") == size("chosen") + 4 * width
    # Layer norms of queries and keys have a scale and a shift for each dimension of a head.
    assert size("QK-norm") == size("chosen") + depth * 2 * 2 * width // heads


def test_squared_relu_of_numpy():
    x = np.random.default_rng(0).normal(size=100)
    expected = np.maximum(x, 0) ** 2
    np.testing.assert_allclose(variants.SquaredReLU()(torch.from_numpy(x)), expected)


@pytest.mark.parametrize(
    ("name", "first", "later"),
    [("chosen", 16, 64), ("patch dropout", 12, 64), ("patch dropout at full size", 16, 64)],
)
def test_patches_are_dropped_in_training_at_first(runner, name, first, later):
    varied, seen = variant(runner, name), []
    varied.model.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    images, labels = next(varied.batches())
    for done in (0.0, 0.59, 0.6, 1.0):
        varied.enter_phase(done)
        varied.step(images, labels, done)
    varied.enter_phase(0.0)
    varied.shrink = 1
    varied.model.eval()(images)
    assert seen == [first, first, later, later, 64]


def test_batches_skip_blocks_in_training_at_first(runner):
    varied, calls = variant(runner, "layer dropping"), []
    for block in varied.model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    images, _ = next(varied.batches())
    torch.manual_seed(0)

    def blocks_per_batch(done, batches=200):
        calls.clear()
        varied.enter_phase(done)
        for _ in range(batches):
            varied.model(images)
        return len(calls) / batches

    assert blocks_per_batch(0.0) == pytest.approx(0.75 * 2, abs=0.15)  # deviation: 0.04
    assert blocks_per_batch(0.6) == 2
    varied.model.eval()
    assert blocks_per_batch(0.0) == 2


def test_clock_stops_during_validation(monkeypatch):
    now = iter([10.0, 11.0, 12.0, 19.0, 20.0])
    monkeypatch.setattr(race.time, "perf_counter", lambda: next(now))
    clock = race.Clock(torch.device("cpu"), "wall")
    assert clock.spent == 1
    with clock.stopped():  # from 12 to 19
        pass
    assert clock.spent == 3


def test_runs_leave_records_a_table_and_a_figure(monkeypatch, ticking, capsys, folder, tmp_path):
    command(monkeypatch, folder, tmp_path, "--variants", "chosen,EMA,common recipe")
    first = capsys.readouterr().out
    records = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert set(records) == {"chosen-1.5s-0", "EMA-1.5s-0", "common-recipe-1.5s-0"}
    for record in records.values():
        assert record["test_images"] == 10
        assert record["seconds"] >= 1.5
        assert len(record["curve"]) == 2
        assert record["images"] % 10 == 0
    assert records["common-recipe-1.5s-0"]["constants"]["OPTIMIZER"] == "adamw"
    assert (tmp_path / "curves-1.5s.png").stat().st_size > 10_000
    table = (tmp_path / "table.md").read_text()
    assert table in first
    assert f"| {100 * records['common-recipe-1.5s-0']['test_accuracy']:.2f} |" in table

    command(monkeypatch, folder, tmp_path, "--variants", "chosen,EMA,common recipe")
    assert "seed 0: test accuracy" not in capsys.readouterr().out  # nothing was run again
    with pytest.raises(UserError, match=r"different constants \(DEPTH\).*--overwrite"):
        command(monkeypatch, folder, tmp_path, "--depth", "2")
    with monkeypatch.context() as patch:
        patch.setattr(speedrun.runtime, "code_hashes", lambda: {"model.py": "changed"})
        command(patch, folder, tmp_path)
    assert "chosen, 1.5 s, seed 0: test accuracy" in capsys.readouterr().out  # run again
    with pytest.raises(UserError, match="'quick' is none of all, chosen"):
        command(monkeypatch, folder, tmp_path, "--variants", "quick")
    with pytest.raises(UserError, match="must be numbers such as"):
        command(monkeypatch, folder, tmp_path, "--seconds", "soon")
    command(monkeypatch, folder, tmp_path, "--profile")
    assert "addmm" in (tmp_path / "profile.txt").read_text()


def test_a_device_without_a_recipe_is_refused(monkeypatch, folder, tmp_path):
    state = SimpleNamespace(device=torch.device("mps"))
    monkeypatch.setattr(speedrun.runtime, "process_state", lambda: state)
    with pytest.raises(UserError, match="runs on cpu and cuda, but not on mps"):
        command(monkeypatch, folder, tmp_path)


def test_table_has_numpys_mean_and_standard_deviation(tmp_path):
    rng = np.random.default_rng(0)
    found = {name: rng.uniform(0.8, 0.99, 3) for name in ("chosen", "common recipe")}
    for name, accuracies in found.items():
        for seed, accuracy in enumerate(accuracies):
            record = {
                "variant": name, "budget": 60.0, "seed": seed, "data": "cifar10", "images": 1000,
                "test_accuracy": accuracy, "parameters": 5, "command": "python", "versions": {
                    "torch": "2", "timm": "1"}, "constants": {"CLOCK": "wall"},
                "hardware": {"cpu": "some", "threads": 2},
                "curve": [[10.0, 0.5], [20.0 + seed, 0.91], [60.0, 0.94 if seed else 0.92]],
            }  # fmt: skip
            (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(record))
    rows = speedrun.write_table(tmp_path).split("\n")
    chosen = next(row for row in rows if row.startswith("| chosen"))
    other = next(row for row in rows if row.startswith("| common recipe"))
    for row, name in ((chosen, "chosen"), (other, "common recipe")):
        values = 100 * found[name]
        assert f"| {values.mean():.2f} ± {values.std(ddof=1):.2f} |" in row
    apart = 100 * (found["common recipe"] - found["chosen"])
    assert f"| {apart.mean():+.2f} ± {apart.std(ddof=1):.2f} |" in other
    assert chosen.endswith("| 21 ± 1 | - | - |")  # 93 % was not reached by every seed
    shutil.rmtree(tmp_path)
