"""predict.py: files, folders, patterns and datasets; labels; files that cannot be read."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lab.core import runtime
from lab.data import Dataset, Preprocess, datasets, images, load_data
from lab.data.splits import full_split
from lab.models import load_model, load_pretrained
from lab.sharing import leakage, predictions
from model import VisionTransformer, ViTConfig
from tests.models.reference import ROOT, save_run
from tests.sample_data import noise_image
from tests.shaken import shaken
from tests.sharing.conftest import script  # noqa: F401


@pytest.fixture
def run_folder(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(img_size=8, patch_size=4, num_classes=3, embed_dim=16, depth=1, num_heads=2)
    model = shaken(VisionTransformer(config))
    return save_run(
        tmp_path / "a run", model, ["cat", "dog", "$x$"], Preprocess(8, [0.5] * 3, [0.5] * 3)
    )


@pytest.fixture
def photos(tmp_path):
    """Twelve images in folders named after two classes, of all kinds, and a hidden file."""
    for i in range(12):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        image = noise_image(20 + i, 20, seed=i)
        mode = ("RGB", "L", "CMYK")[i % 3]
        image.convert(mode).save(folder / f"{i:02}.jpg", exif=rotated(i))
    (tmp_path / "photos" / "._hidden.jpg").write_bytes(b"x")
    return tmp_path / "photos"


def rotated(i):
    exif = Image.Exif()
    exif[0x0112] = 6 if i == 4 else 1
    return exif


def rows_of(folder):
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predictions_and_accuracy_equal_load_model(script, run_folder, photos, tmp_path):  # noqa: F811
    done = script("predict.py", "--model", run_folder, "--images", "photos", "--top-k", 9,
                  "--batch-size", 5, "--attention")  # fmt: skip
    assert done.code == 0, done.err
    folder = tmp_path / "out" / "a run-photos"
    rows = rows_of(folder)
    assert [row["image"] for row in rows] == sorted(row["image"] for row in rows)
    assert len(rows) == 12
    model, preprocess, classes = load_model(run_folder)
    correct = 0
    for row in rows:
        with torch.no_grad():
            p = model(preprocess(row["image"])[None])[0].softmax(0)
        order = p.argsort(descending=True).tolist()
        assert [row[f"class_{k}"] for k in (1, 2, 3)] == [classes[i] for i in order]
        assert float(row["probability_1"]) == pytest.approx(p.max().item(), abs=1e-4)
        assert row["label"] in row["image"]
        correct += row["label"] == classes[order[0]]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["accuracy"] == pytest.approx(correct / 12, abs=1e-6)
    assert f"accuracy {100 * correct / 12:.1f} % (95 % interval" in done.out
    assert Image.open(folder / "predictions.jpg").size[0] > 500
    assert done.out.splitlines()[-1].endswith("predictions.jpg")
    assert "results already exist" in script(
        "predict.py", "--model", run_folder, "--images", "photos", "--top-k", 9,
        "--batch-size", 5, "--attention").out  # fmt: skip


def test_unreadable_files_are_named_and_the_rest_is_predicted(script, run_folder, photos, tmp_path):  # noqa: F811
    (photos / "cat" / "broken.jpg").write_bytes(b"no image")
    whole = (photos / "cat" / "01.jpg").read_bytes()
    (photos / "cat" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    done = script(
        "predict.py", "--model", run_folder, "--images", "photos/cat/*.jpg photos/dog/00.jpg"
    )
    assert "2 of 9 images could not be read" in str(done.code)
    assert "broken.jpg (not an image in a format that can be read)" in done.out
    assert "truncated.jpg (" in done.out
    assert len(rows_of(tmp_path / "out" / "a run-9-images")) == 7
    (tmp_path / "photos").rename(tmp_path / "my photos")
    done = script("predict.py", "--model", run_folder, "--images", "my photos/*/0*.jpg")
    assert len(rows_of(tmp_path / "out" / "a run-10-images")) == 10, done.err
    (tmp_path / "my photos").rename(photos)
    done = script("predict.py", "--model", run_folder, "--images", "photos/cat/broken.jpg")
    assert done.code == 2
    assert "none of the images could be read (1)" in done.err


def test_test_images_that_the_run_did_not_test_are_counted(tmp_path):
    """A new image moves others between the splits, so the model may know them."""
    names = [f"cat/{i}.png" for i in range(3)]
    split = full_split(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3).long(), names)
    data = Dataset("d", ["cat"], split, split, split, [0.5], [0.5], [])
    source = predictions.SplitImages(data, "test")
    tested = leakage.tested_images(tmp_path)
    assert leakage.leakage_warning(source, True, tested) is None  # no record
    (tmp_path / "predictions.csv").write_text("image,label\ncat/0.png,cat\ncat/1.png,cat\n")
    tested = leakage.tested_images(tmp_path)
    assert "trained on 1 of these 3 test images" in leakage.leakage_warning(source, True, tested)
    assert leakage.leakage_warning(source, False, tested) is None


@pytest.mark.parametrize(("tested", "count"), [
    (["dog/00.jpg", "dog/02.jpg", "cat/01.jpg"], 3), (["train/dog/00.jpg"], 0), (["00.jpg"], 1),
    ([f"{'cat' if i % 2 else 'dog'}/{i:02}.jpg" for i in range(12)], 0),  # nothing else is left
    (["photos/dog/00.jpg"], 1), (["test/00.jpg", "dog/00.jpg"], 0), ([], 0),
])  # fmt: skip
def test_files_next_to_tested_images_may_have_been_trained_on(run_folder, photos, tested, count):
    source = predictions.find_images(f"'{photos}'", "test", "", load_pretrained(str(run_folder)))
    warning = leakage.leakage_warning(source, False, set(tested))
    assert (warning or "0 of these").startswith(f"{count} of these")


def test_images_in_formats_that_cannot_be_read_are_counted(script, run_folder, photos):  # noqa: F811
    (photos / "cat" / "IMG_1.HEIC").touch()
    done = script("predict.py", "--model", run_folder, "--images", "photos")
    assert "note: 1 images are left out, because formats such as HEIC" in done.out


def test_labels_come_from_the_nearest_folder_that_is_a_class(run_folder, photos):
    """Also from an outer folder, but not from one outside of what the user names."""
    (photos / "cat" / "session 1").mkdir()
    (photos / "cat" / "01.jpg").rename(photos / "cat" / "session 1" / "01.jpg")
    pretrained = load_pretrained(str(run_folder))

    def labels(source):
        (batch,) = predictions.find_images(source, "test", "", pretrained).batches(20)
        return batch.labels

    assert labels(f"'{photos}'") == ["cat"] * 6 + ["dog"] * 6
    assert labels(f"'{photos}/cat/session 1'") == [""]
    assert labels(f"'{photos}/cat/03.jpg'") == ["cat"]


def test_each_split_holds_the_images_that_training_put_there(tmp_path, run_folder):
    """Without val/ and test/, both come from train/; their sizes follow from the constants."""
    for i, name in enumerate(["$x$", "cat", "dog"] * 20):
        (tmp_path / "data" / "train" / name).mkdir(parents=True, exist_ok=True)
        noise_image(90, 90, seed=i).save(tmp_path / "data" / "train" / name / f"{i:02}.jpg")
    source, pretrained = f"{tmp_path / 'data'}", load_pretrained(str(run_folder))
    trained = load_data(source, val_fraction=0.3)
    for split in ("train", "val", "test"):
        found = predictions.find_images(source, split, "", pretrained, True, 0.3)
        names = [name for batch in found.batches(50) for name in batch.names]
        assert sorted(names) == sorted(getattr(trained, split).names)


@pytest.mark.parametrize(("text", "windows"), [
    ("'a b.jpg' c.jpg", ["a b.jpg", "c.jpg"]), (r"C:\a.jpg D:\b.jpg", [r"C:\a.jpg", r"D:\b.jpg"]),
])  # fmt: skip
def test_backslashes_separate_folders_on_windows(text, windows):
    assert datasets._split_words(text, windows=True) == windows


def test_files_are_read_one_batch_ahead(run_folder, photos, monkeypatch):
    read = images.read_image
    started = []
    monkeypatch.setattr(
        predictions.images, "read_image", lambda *args: started.append(1) or read(*args)
    )
    source = predictions.find_images(f"{photos}", "test", "", load_pretrained(str(run_folder)))
    taken = 0
    for batch in source.batches(2):
        taken += len(batch.names)
        assert len(started) <= taken + 2
    assert taken == len(started) == 12


@pytest.fixture
def dataset(tmp_path):
    """Ten images of each class in a folder without train/, of which one is unreadable."""
    for i, name in enumerate(["$x$", "cat", "dog"] * 10):
        (tmp_path / "all" / name).mkdir(parents=True, exist_ok=True)
        noise_image(90, 90, seed=i).save(tmp_path / "all" / name / f"{i:02}.jpg")
    (tmp_path / "all" / "dog" / "29.jpg").write_bytes(b"no image")
    return tmp_path / "all"


def test_split_of_the_training_data_is_predicted_without_its_unreadable_images(
    script,  # noqa: F811
    run_folder,
    dataset,
    tmp_path,
):
    (tmp_path / "a run" / "config.json").write_text('{"constants": {"DATASET": "all"}}')
    done = script("predict.py", "--model", run_folder, "--batch-size", 2)
    assert done.code == 0, done.err
    assert "note: 1 unreadable images are in no split: dog/29.jpg (not an image" in done.out
    rows = rows_of(tmp_path / "out" / "a run-all-test")
    held_out = load_data(str(dataset), skip_unreadable=True).test
    assert [row["image"] for row in rows] == held_out.names
    assert len(rows) == 6
    # The same folder in another place; under another name, all images are predicted.
    recorded = tmp_path / "out" / "a run-all-test" / "predictions.csv"
    recorded.rename(tmp_path / "a run" / "predictions.csv")
    (tmp_path / "moved").mkdir()
    dataset.rename(tmp_path / "moved" / "All")
    done = script("predict.py", "--model", run_folder, "--images", "moved/All")
    assert "moved/All is the dataset of this model: predicting its test images" in done.out
    assert rows_of(tmp_path / "out" / "a run-All-test") == rows
    (tmp_path / "moved" / "All").rename(tmp_path / "other")
    done = script("predict.py", "--model", run_folder, "--images", "other")
    assert "warning: 6 of these 30 images have the names of test images" in done.out


@pytest.mark.parametrize(("flags", "message"), [
    (["--images", "nothing.jpg"], "'nothing.jpg' is not a file, a folder or a dataset"),
    (["--images", "*.webp"], "there are no images"),
    (["--images", ""], "does not say what it was trained on"),
    (["--images", "'"], "quote names that contain spaces"),
    (["--images", "photos", "--top-k", "0"], "TOP_K=0 must be at least 1"),
    (["--images", "photos", "--batch-size", "0"], "BATCH_SIZE=0 must be at least 1"),
    ([], "does not say what it was trained on"),
    (["--images", "photos", "--model", "none/"], "none"),
])  # fmt: skip
def test_bad_input_ends_with_one_sentence(flags, message, script, run_folder, photos):  # noqa: F811
    done = script("predict.py", "--model", run_folder, *flags)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_dataset_split_gives_the_accuracy_of_its_labels(script, tmp_path):  # noqa: F811
    config = ViTConfig(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16,
                       depth=1, num_heads=2)  # fmt: skip
    model = shaken(VisionTransformer(config))
    run = save_run(
        tmp_path / "gray", model, [str(i) for i in range(10)], Preprocess(8, [0.3], [0.4])
    )
    done = script("predict.py", "--model", run, "--images", "digits")
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "out" / "gray-digits-test")
    assert len(rows) == 359
    correct = sum(row["label"] == row["class_1"] for row in rows)
    assert f"accuracy {100 * correct / 359:.1f} %" in done.out


def test_color_image_becomes_gray_for_a_model_of_gray_images():
    preprocess = Preprocess(8, [0.3], [0.4])
    image = noise_image(8, 8)
    expected = (np.asarray(image.convert("L")) / 255 - 0.3) / 0.4
    found = preprocess(image)
    assert found.shape == (1, 8, 8)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=0.01)


def test_run_of_a_model_file_needs_that_file(script, run_folder, photos, tmp_path):  # noqa: F811
    record = {"constants": {"MODEL_FILE": "mine.py"}, "code": {"model.py": "another"}}
    (tmp_path / "a run" / "config.json").write_text(json.dumps(record))
    flags = ("--model", run_folder, "--images", "photos")
    done = script("predict.py", *flags)
    assert done.code == 2
    assert "was trained with MODEL_FILE=mine.py" in done.err
    record["code"]["model.py"] = runtime.source_hash((ROOT / "model.py").read_bytes())
    (tmp_path / "a run" / "config.json").write_text(json.dumps(record))
    done = script("predict.py", *flags, "--model-file", ROOT / "model.py")
    assert done.code == 0, done.err


def test_the_only_readable_file_is_shown(script, run_folder, tmp_path):  # noqa: F811
    (tmp_path / "x").mkdir()
    for i in range(40):
        (tmp_path / "x" / f"{i:02}.jpg").write_bytes(b"no image")
    noise_image(9, 9).save(tmp_path / "x" / "21.jpg")
    done = script("predict.py", "--model", run_folder, "--images", "x", "--batch-size", 4)
    assert done.code == "39 of 40 images could not be read", done.err
    assert done.out.startswith("21.jpg  ")
    assert (tmp_path / "out" / "a run-x" / "predictions.jpg").is_file()
