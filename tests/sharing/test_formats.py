"""A shared folder gives the same logits in timm, transformers, ONNX Runtime and this project."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image

from lab.core import UserError
from lab.data import Preprocess
from lab.models import load_model, load_pretrained
from lab.models.cnn import CNNConfig, ResidualCNN
from lab.models.registry import TimmConfig, build_timm_model
from lab.sharing import card, formats
from model import VisionTransformer, ViTConfig
from tests.models.reference import DIGITS, ROOT, SMALL
from tests.models.reference import save_run as save_weights
from tests.sample_data import noise_image
from tests.shaken import shaken
from tests.sharing.conftest import CONFIG, logits_of, run_code_of, save_run


@torch.no_grad()
def same_logits(ours, theirs, channels=1, size=8):
    images = torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(3))
    expected = ours.eval()(images)
    found = theirs(images)
    torch.testing.assert_close(getattr(found, "logits", found), expected, atol=1e-5, rtol=1e-5)


def test_every_format_of_a_vit_loads_with_the_same_logits(script, vit_run, tmp_path, monkeypatch):
    done = script("share.py", "--model", vit_run, "--int8")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "out/vit"
    assert str(ROOT).encode() not in (tmp_path / "out" / "vit" / "model.onnx").read_bytes()
    (tmp_path / "out").rename(tmp_path / "somewhere else")
    monkeypatch.chdir(tmp_path / "somewhere else")
    noise_image(20, 20).save("photo.jpg")
    original = load_pretrained(str(vit_run))
    images = torch.randn(7, 1, 8, 8)
    card_text = Path("vit/README.md").read_text(encoding="utf-8")
    found = run_code_of(card_text, images)
    with torch.no_grad():
        expected = original.model(images)
        for names in found.values():
            torch.testing.assert_close(logits_of(names, images), expected, atol=1e-5, rtol=1e-5)
        for count in (1, 2):
            (logits,) = found["ONNX Runtime"]["session"].run(
                None, {"images": images[:count].numpy()}
            )
            torch.testing.assert_close(torch.from_numpy(logits), expected[:count])
    assert len(found) == 5
    assert found["ViT Lab"]["preprocess"] == original.preprocess
    assert found["ViT Lab"]["classes"] == DIGITS
    assert list(found["transformers and timm"]["model"].config.id2label.values()) == DIGITS
    native = found["transformers, without timm"]["model"]
    assert type(native).__name__ == "ViTForImageClassification"
    check_card(card_text, done.out)


def check_card(text, out):
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.sdk) == ("mit", "timm", "static")
    assert data.pipeline_tag == "image-classification"
    assert data.eval_results[0].metric_value == 0.75
    assert data.eval_results[0].metric_args == {"confidence_interval_95": [0.7, 0.8]}
    for said in ("75.00 % (95 % interval 70.0 to 80.0, 4 images", "`python train.py`", "c0ffee",
                 "![Confusion matrix", "test images of digits"):  # fmt: skip
        assert said in text
    assert Path("vit/confusion.png").read_bytes() == b"a figure"
    (int8,) = re.findall(r"^int8: (.*)", out, re.MULTILINE)
    assert f"| int8 | {int8} |" in text
    assert re.search(r"has a test accuracy of \d+\.\d\d %, `model.onnx` of \d+", int8)


def test_transformers_holds_layer_scale_and_a_token_without_position(tmp_path):
    config = ViTConfig(**SMALL, num_classes=3, init_values=0.1, no_embed_class=True, qkv_bias=False)
    model = shaken(VisionTransformer(config)).eval()
    save_weights(
        tmp_path / "run", model, ["a", "b", "c"], Preprocess(32, [0.4] * 3, [0.5] * 3, 0.8)
    )
    pretrained = load_pretrained(str(tmp_path / "run"))
    formats.write_transformers(
        tmp_path, pretrained, formats.Expected(model, torch.randn(4, 3, 32, 32))
    )
    native = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "transformers")
    same_logits(model, native, 3, 32)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "transformers")
    photo = Image.fromarray(np.full((60, 90, 3), 77, np.uint8))
    found = torch.as_tensor(np.array(processor(photo)["pixel_values"][0]))
    torch.testing.assert_close(found, pretrained.preprocess(photo), atol=1e-4, rtol=0)
    found = torch.as_tensor(np.array(processor(noise_image(90, 60))["pixel_values"][0]))
    assert found.shape == (3, 32, 32)


def test_timm_models_go_to_timm_and_a_swin_and_a_cnn_to_onnx(tmp_path):
    preprocess = Preprocess(32, [0.5] * 3, [0.5] * 3)
    swin = {"depths": (2,), "num_heads": (2,), "embed_dim": 16, "window_size": 4, "num_classes": 3,
            "img_size": 32}  # fmt: skip
    models = {
        "SwinTransformer": build_timm_model(TimmConfig("swin_tiny_patch4_window7_224", swin)),
        "ConvNeXt": build_timm_model(TimmConfig("test_convnext", {"num_classes": 3})),
        "ResidualCNN": ResidualCNN(CNNConfig(dims=(4, 8), blocks=1, num_classes=3)),
    }
    for name, model in models.items():
        model = shaken(model).eval()
        save_weights(tmp_path / name, model, ["a", "b", "c"], preprocess)
        pretrained = load_pretrained(str(tmp_path / name))
        expected = formats.Expected(model, torch.randn(6, 3, 32, 32))
        folder = tmp_path / f"shared {name}"
        folder.mkdir()
        formats.write_weights(folder, pretrained)
        with pytest.raises(formats.NotPossible, match=f"plain ViTs, and this is a {name}"):
            formats.write_transformers(folder, pretrained, expected)
        if name != "ConvNeXt":  # an export takes seconds
            assert formats.write_onnx(folder, pretrained, expected).same == 6
        if name == "ResidualCNN":
            with pytest.raises(formats.NotPossible, match="no architecture for a ResidualCNN"):
                formats.write_timm(folder, pretrained, expected)
        else:
            assert formats.write_timm(folder, pretrained, expected).difference < 1e-5
            theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            same_logits(model, theirs, 3, 32)
        same_logits(model, load_model(folder)[0], 3, 32)


def test_a_format_with_other_logits_is_refused(tmp_path):
    config = ViTConfig(**SMALL, num_classes=3, norm_eps=0.1)  # timm's config cannot say this
    model = shaken(VisionTransformer(config))
    save_weights(tmp_path / "run", model, ["a", "b", "c"], Preprocess(32, [0.4] * 3, [0.5] * 3))
    pretrained = load_pretrained(str(tmp_path / "run"))
    formats.write_weights(tmp_path, pretrained)
    expected = formats.Expected(pretrained.model, torch.randn(3, 3, 32, 32))
    with pytest.raises(formats.NotPossible, match="differ from the model's"):
        formats.write_timm(tmp_path, pretrained, expected)
    assert json.loads((tmp_path / "config.json").read_text())["library_name"] == "vit-lab"


def test_own_model_file_must_compute_what_timm_computes(script, vit_run, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "write_onnx", not_possible)
    flags = ("--model-file", ROOT / "model.py")
    assert script("share.py", "--model", vit_run, *flags).code == 0
    model = shaken(VisionTransformer(replace(CONFIG, norm_eps=0.1)))
    run = save_run(tmp_path / "other", model, Preprocess(8, [0.3], [0.4]))
    assert script("share.py", "--model", run).code == 0
    done = script("share.py", "--model", run, "--name", "x", *flags)
    assert done.code == 2
    assert "model.py is not timm's, so others could not load it (the logits of" in done.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["other", "vit"]


def not_possible(*_):
    raise formats.NotPossible("takes long, and does not matter here")


def test_missing_packages_and_other_models_are_named(script, vit_run, tmp_path, monkeypatch):
    found = formats.importlib.util.find_spec
    monkeypatch.setattr(formats.importlib.util, "find_spec",
                        lambda name: None if name == "onnxruntime" else found(name))  # fmt: skip
    done = script("share.py", "--model", vit_run, "--name", "x")
    assert done.code == 0, done.err
    assert (
        "skipping onnx: onnxruntime not installed; to get it: pip install onnxruntime" in done.out
    )
    assert "pip install onnxruntime" in (tmp_path / "out" / "x" / "README.md").read_text()
    model = shaken(VisionTransformer(replace(load_pretrained(str(vit_run)).model.config, depth=2)))
    other = save_run(tmp_path / "other", model, Preprocess(8, [0.3], [0.4]))
    done = script("share.py", "--model", other, "--name", "x")
    assert done.code == 2
    assert "out/x contains another model: choose another --name" in done.err
    assert script("share.py", "--model", other, "--name", "x", "--overwrite").code == 0
    (tmp_path / "out" / "mine").mkdir()
    done = script("share.py", "--model", other, "--name", "mine", "--overwrite")
    assert "out/mine exists and contains no model" in done.err
    done = script("share.py", "--model", other, "--name", "../out", "--overwrite")
    assert "is not the name of a folder" in done.err


def records_of(tmp_path, **pretrained):
    """Records of a run that was fine-tuned on a tenth of a folder called `pets`."""
    data = {"name": "pets", "train": 3600, "train_images": 360, "val": 2, "test": 3, "classes": []}
    config = {"constants": {"DATASET": "photos/pets", "MODE": "full"}, "pretrained": pretrained,
              "dataset": data, "command": "python finetune.py", "versions": {},
              "hardware": {"cpu": "y", "cores": 2, "threads": 1}}  # fmt: skip
    metrics = {"test_accuracy": 0.75, "test_accuracy_95": [0.7, 0.8], "test_images": 4,
               "best_epoch": 1, "epochs": 1, "training_seconds": 1.0}  # fmt: skip
    return card.Records(tmp_path, config, metrics)


def test_the_card_counts_each_training_image_once(tmp_path):
    assert "pets: 360 training, 2 validation" in card.training_table(records_of(tmp_path))
    assert "trained on 360 images" in card._limitations(records_of(tmp_path), ["a"])


def test_metadata_names_no_data_and_no_model_that_the_hub_does_not_have(vit_run, tmp_path):
    """A folder that has the name of a dataset is not that dataset; a revision is no repository."""

    def metadata(**pretrained):
        release = card.Release("x", None, load_pretrained(str(vit_run)),
                               records_of(tmp_path, **pretrained), "mit", "images")  # fmt: skip
        return card._metadata(tmp_path, release)

    assert metadata(origin="owner/name@v1").base_model == "owner/name"
    assert metadata(origin="gone/run/best.safetensors").base_model is None
    assert metadata(origin=None).datasets is None
    assert metadata(origin=None).eval_results[0].dataset_type == "pets"


def test_a_shared_folder_can_be_visualized(script, vit_run, monkeypatch):
    for name in ("write_transformers", "write_onnx"):
        monkeypatch.setattr(formats, name, not_possible)
    assert script("share.py", "--model", vit_run).code == 0
    done = script("attention_viz.py", "--model", "out/vit", "--images", "digits")
    assert done.code == 0, done.err
    page = Path(done.out.splitlines()[-1]).read_text(encoding="utf-8")
    assert "shown: digits" in page
    assert "trained on" not in page  # the folder does not say what it was trained on


def test_a_shared_folder_is_not_shared_again(script, vit_run, tmp_path, monkeypatch):
    """Its records are in the folder of the run, so the new card would not state its accuracy."""
    for name in ("write_transformers", "write_onnx"):
        monkeypatch.setattr(formats, name, not_possible)
    assert script("share.py", "--model", vit_run).code == 0
    before = (tmp_path / "out" / "vit" / "README.md").read_bytes()
    for model in ("out/vit", "out/vit/model.safetensors"):
        done = script("share.py", "--model", model, "--name", "vit")
        assert done.code == 2
        assert f"{model} is already shared" in done.err
    assert (tmp_path / "out" / "vit" / "README.md").read_bytes() == before
    (tmp_path / "out" / "vit").rename(tmp_path / "out" / "hub")
    config = json.loads((tmp_path / "out" / "hub" / "config.json").read_text())
    del config["vit_lab"]  # as in a repository of timm
    (tmp_path / "out" / "hub" / "config.json").write_text(json.dumps(config))
    done = script("share.py", "--model", "out/hub", "--license", "mit")
    assert done.code == 2
    assert "out/hub is the folder of the model itself" in done.err


def test_an_unfinished_run_is_not_shared(script, vit_run):
    (vit_run / "metrics.json").unlink()
    done = script("share.py", "--model", vit_run)
    assert done.code == 2
    assert "is not a finished run" in done.err


def test_the_page_with_test_images_can_be_left_out(script, vit_run, tmp_path, monkeypatch):
    for name in ("write_transformers", "write_onnx"):
        monkeypatch.setattr(formats, name, not_possible)
    done = script("share.py", "--model", vit_run, "--name", "my-vit")
    (count,) = re.findall(r"index.html contains (\d+) of the test images of digits", done.out)
    page = (tmp_path / "out" / "my-vit" / "index.html").read_text(encoding="utf-8")
    assert page.count('"pixels":') == int(count) > 0
    assert re.search(r"my-vit · [\d,]+ parameters · trained on digits", page)
    assert script("share.py", "--model", vit_run, "--name", "my-vit", "--no-page").code == 0
    assert not (tmp_path / "out" / "my-vit" / "index.html").exists()


def test_a_format_that_fails_leaves_no_files(script, vit_run, tmp_path, monkeypatch):
    def wrong(self, model, name):
        raise formats.NotPossible("other logits")

    monkeypatch.setattr(formats.Expected, "compare", wrong)
    assert script("share.py", "--model", vit_run).code == 0
    assert sorted(path.name for path in (tmp_path / "out" / "vit").iterdir()) == [
        "README.md", "config.json", "confusion.png", "index.html", "metrics.json",
        "model.safetensors",
    ]  # fmt: skip


def test_license_is_inherited_and_asked_for_if_unknown(vit_run, tmp_path):
    def license_of(given=None, **pretrained):
        config = {"constants": {"MODE": "full"}, "pretrained": pretrained, "dataset": {}}
        return card.license_of("run", card.Records(tmp_path, config, {}), given)

    assert license_of(origin=None) == "mit"
    assert license_of(origin=str(vit_run)) == "mit"
    assert license_of(origin="vit_base_patch16_224.augreg_in21k") == "apache-2.0"
    assert license_of(origin="vit_base_patch16_224.mae") == "cc-by-nc-4.0"
    with pytest.raises(UserError, match=r"unknown.*--license"):
        license_of(origin="gone/best.safetensors")
    assert license_of("mit", origin="gone/best.safetensors") == "mit"
    with pytest.raises(UserError, match=r"'cc-by-nc-4.0', which the model inherits"):
        license_of("mit", origin="vit_base_patch16_224.mae")


def test_a_card_names_no_folder_outside_of_the_project(tmp_path):
    command = (
        "python train.py --dataset=/mnt/acme/defects/ --data-dir /x/y --name 'a b' --space a/b"
    )
    records = card.Records(tmp_path, {"command": command}, {})
    expected = "python train.py --dataset=defects/ --data-dir y --name 'a b' --space a/b"
    assert records.command == expected
