"""attention_viz.py from the command line: its files, its choice of images, its error messages."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from lab.attention.plots import AttentionExample
from lab.attention.views import class_index, uniform_distance
from lab.core import UserError
from lab.data import Augmentation, Loaders
from lab.data.datasets import load_images
from lab.data.preprocess import Preprocess
from lab.models.pretrained import Pretrained
from lab.models.registry import TimmConfig, build_timm_model, save_model
from model import VisionTransformer, ViTConfig
from tests.in_process import Ended, run_script

ROOT = Path(__file__).resolve().parents[2]
VIT = ROOT / "weights" / "vit_128x6_cifar10.safetensors"
SWIN = ROOT / "weights" / "swin_48x222_cifar10.safetensors"


def viz(folder: Path, *flags: object) -> Ended:
    return run_script(["attention_viz.py", "--results-dir", "out", *map(str, flags)], folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a space in its name and with images."""
    folder = tmp_path_factory.mktemp("my lab")
    rng = np.random.default_rng(0)
    (folder / "my images").mkdir()
    for name in ("a.png", "b c.jpg"):
        pixels = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "my images" / name)
    return folder


def test_default_is_the_newest_run_of_train_py(place):
    message = viz(place).err
    assert "there is no finished run in results/train" in message
    assert "python train.py" in message
    train = ["train.py", "--dataset", "digits", "--epochs", "2", "--patch-size", "2"]
    assert run_script(train, place).status == 0
    assert viz(place).status == 0
    out = place / "out" / "digits-vit_64x4-s0-digits"
    files = {path.name for path in out.iterdir()} - {".lock"}
    assert files == {"overview.jpg", "heads.jpg", "distance.png", "positions.png", "example.png",
                     "attention.html", "config.json", "metrics.json"}  # fmt: skip
    assert "class VisionTransformer" in (out / "attention.html").read_text()
    record = json.loads((out / "metrics.json").read_text())
    assert len(record["images"]) == 6
    assert record["methods"] == ["raw", "rollout", "gradient-rollout"]
    wrong = [x for x in record["images"] if x["label"] != x["prediction"]]
    with open(place / "results/train/digits-vit_64x4-s0/predictions.csv", newline="") as file:
        mistakes = sum(row["label"] != row["prediction"] for row in csv.DictReader(file))
    assert len(wrong) == min(3, mistakes)
    distance = np.array(record["distance"])
    assert distance.shape == (4, 4)
    assert (distance > 0).all()
    assert (distance < 8 * 2**0.5).all()
    before = (out / "overview.jpg").stat().st_mtime_ns
    again = viz(place)
    assert "already exist" in again.out
    assert (out / "overview.jpg").stat().st_mtime_ns == before


def test_images_without_labels(place):
    done = viz(place, "--model", SWIN, "--images", "my images", "--name", "images")
    assert done.status == 0, done.err
    record = json.loads((place / "out" / "images" / "metrics.json").read_text())
    assert [x["name"] for x in record["images"]] == ["a.png", "b c.jpg"]
    assert {x["label"] for x in record["images"]} == {None}
    assert record["methods"] == ["raw", "rollout", "gradient-rollout", "grad-cam"]
    assert not (place / "out" / "images" / "positions.png").exists()  # a Swin has none
    one = viz(place, "--model", SWIN, "--images", "'my images/b c.jpg' 'my images/a.png'",
              "--method", "rollout", "--name", "two")  # fmt: skip
    assert one.status == 0, one.err
    record = json.loads((place / "out" / "two" / "metrics.json").read_text())
    assert [x["name"] for x in record["images"]] == ["b c.jpg", "a.png"]
    assert not (place / "out" / "two" / "heads.jpg").exists()
    page = (place / "out" / "two" / "attention.html").read_text()
    assert "<p>Rollout follows attention" in page
    assert "Grad-CAM" not in page


def test_color_files_become_gray_for_a_model_of_gray_images(place):
    preprocess = Preprocess(20, [0.3], [0.4], crop_pct=0.8)
    path = place / "my images" / "b c.jpg"
    data = load_images(f"'{path}'", "data", preprocess)
    loaders = Loaders(data, preprocess, 8, Augmentation())
    found = loaders.normalize(data.test.images(slice(0, 1)))[0]
    torch.testing.assert_close(found, preprocess(path), atol=0.51 / 255 / 0.4, rtol=0)


def test_folder_of_a_single_image_has_no_suffix(place):
    flags = ("--model", VIT, "--images", "my images/a.png", "--method", "rollout")
    assert viz(place, *flags).status == 0
    assert (place / "out" / "vit_128x6_cifar10-a" / "overview.jpg").exists()


def test_cnn_works_with_grad_cam(place):
    torch.manual_seed(0)
    model = build_timm_model(TimmConfig("test_resnet", {"num_classes": 3}))
    preprocess = Preprocess(64, [0.5] * 3, [0.5] * 3)
    classes = ["cat", "dog", "</script>"]
    save_model(place / "cnn.safetensors", model, classes, preprocess,
               {"epoch": 1, "val_accuracy": 0.5})  # fmt: skip
    done = viz(place, "--model", "cnn.safetensors", "--images", "my images", "--name", "cnn",
               "--target-class", "</script>")  # fmt: skip
    assert done.status == 0, done.err
    assert {path.name for path in (place / "out" / "cnn").iterdir()} - {".lock"} == {
        "overview.jpg", "example.png", "attention.html", "config.json", "metrics.json"}  # fmt: skip
    assert "skipping raw, rollout, gradient-rollout: test_resnet is not a ViT" in done.out


def test_scores_are_written_and_compared_with_earlier_ones(place, pets):
    words = ("--images", "pets", "--data-dir", pets, "--score", "--deletion-images", 2)
    (place / "out" / "damaged").mkdir(parents=True)
    (place / "out" / "damaged" / "metrics.json").write_text('{"images": "pets, 12 test images"}')
    for model in (SWIN, VIT):
        done = viz(place, "--model", model, *words)
        assert done.status == 0, done.err
        assert "To find the animal, trust" in done.out
    out = place / "out" / "vit_128x6_cifar10-pets-score"
    assert {path.name for path in out.iterdir()} - {".lock"} == {
        "score.md", "score.png", "config.json", "metrics.json"}  # fmt: skip
    record = json.loads((out / "metrics.json").read_text())
    assert record["test_images"] == 12
    assert {"block 6", "rollout", "gradient-rollout"} < set(record["methods"])
    both = (place / "out" / "scores-pets-12.md").read_text()
    assert "| vit_128x6_cifar10-pets | rollout |" in both
    assert "| swin_48x222_cifar10-pets | grad-cam |" in both
    assert "already exist" in viz(place, "--model", VIT, *words).out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--layer", 7), "LAYER=7: this model has blocks 1 to 6"),
        (("--head", 5), "HEAD=5: block 6 has heads 1 to 4"),
        (("--images", "nowhere"), "'nowhere' is not a file, a folder or a dataset (mnist-5k"),
        (("--method", "grad-cam"), "Use METHOD=gradient-rollout"),
        (("--target-class", "frgo"), "is not one of the model's 10 classes. Similar names: frog"),
        (("--score", "--deletion-images", -1), "DELETION_IMAGES=-1 must be at least 0"),
        (("--score",), "mnist-5k has no segmentation masks"),
        (("--num-images", 0), "NUM_IMAGES=0 must be at least 1"),
    ],
)
def test_mistakes_end_in_a_message_and_write_nothing(place, flags, message):
    before = sorted((place / "out").iterdir()) if (place / "out").exists() else []
    done = viz(place, "--model", VIT, *flags)
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert (sorted((place / "out").iterdir()) if (place / "out").exists() else []) == before


def test_out_of_memory_recommends_a_smaller_batch(place, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lab.attention.saliency.raw_attention", fail)
    done = viz(place, "--model", VIT)
    assert done.status == 2
    assert "not enough memory. Use a smaller batch, such as --batch-size 4" in done.err


def test_unreadable_image_is_named(tmp_path):
    preprocess = Preprocess(32, [0.5] * 3, [0.5] * 3)
    (tmp_path / "broken.jpg").write_text("hello")
    with pytest.raises(UserError, match=r"broken\.jpg cannot be read: not an image"):
        load_images(str(tmp_path / "broken.jpg"), "data", preprocess)
    Image.new("RGB", (9, 9)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"cut\.png"):
        load_images(f"'{tmp_path}/cut.png'", "data", preprocess)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there are no images"):
        load_images(str(tmp_path / "empty"), "data", preprocess)


def test_class_names_come_from_the_model_imagenet_or_numbers():
    def names(architecture: str, count: int, own: list[str] | None) -> list[str]:
        model = timm.create_model(architecture, num_classes=count)
        preprocess = Preprocess(32, [0.5] * 3, [0.5] * 3)
        return Pretrained(model, preprocess, own, "x", []).class_names

    assert names("test_vit", 2, ["a", "b"]) == ["a", "b"]
    info = ImageNetInfo("imagenet-1k")
    assert names("test_vit", 1000, None)[281] == info.index_to_description(281)
    plain = VisionTransformer(ViTConfig(32, 16, embed_dim=8, depth=1, num_heads=1))
    preprocess = Preprocess(32, [0.5] * 3, [0.5] * 3)
    ours = Pretrained(plain, preprocess, None, "x", []).class_names
    assert ours[281] == info.index_to_description(281)
    assert names("test_vit", 3, None) == ["class 0", "class 1", "class 2"]
    assert names("test_vit", 0, None) == []
    assert class_index("b", ["a", "b"]) == 1
    assert class_index(None, []) is None


def test_uniform_distance_is_the_mean_over_all_pairs():
    points = [(y, x) for y in range(3) for x in range(5)]
    expected = np.mean([np.hypot(a - c, b - d) for a, b in points for c, d in points])
    assert uniform_distance((3, 5), 4.0) == pytest.approx(4 * expected)


def test_titles_show_what_is_known():
    pixels = np.zeros((4, 4, 3), np.uint8)
    known = AttentionExample(pixels, "1.jpg", "cat", "dog", 0.876, False, [], {})
    assert known.title == "cat: predicted dog (88\N{NO-BREAK SPACE}%)"
    assert AttentionExample(pixels, "1.jpg", None, "dog", 0.5, None, [], {}).title == (
        "1.jpg: predicted dog (50\N{NO-BREAK SPACE}%)")  # fmt: skip
    assert AttentionExample(pixels, "1.jpg", None, None, 0, None, [], {}).title == "1.jpg"
