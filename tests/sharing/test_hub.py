"""Uploads to a hub on localhost: versions, interruptions, refusals, and loading back."""

import json

import huggingface_hub
import pytest
import timm
import torch
import transformers

from lab.core import UserError
from lab.data import Preprocess
from lab.models import load_model, load_pretrained
from lab.sharing import card
from lab.sharing import hub as sharing_hub
from model import VisionTransformer
from tests.models.reference import DIGITS
from tests.shaken import shaken
from tests.sharing.conftest import CONFIG, save_run
from tests.sharing.hub_server import GOOD, READ_ONLY


@pytest.fixture(autouse=True)
def no_onnx(monkeypatch):
    """Exporting takes long, and does not matter here."""
    from lab.sharing import formats

    found = formats.importlib.util.find_spec
    monkeypatch.setattr(formats.importlib.util, "find_spec",
                        lambda name: None if name == "onnx" else found(name))  # fmt: skip


def make(folder, classes=DIGITS, text="1"):
    """A folder as far as an upload reads it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"label_names": classes}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "model.safetensors").write_text(f"weights {text}")
    (folder / "model.onnx").write_text(f"graph {text}")
    return folder


def test_versions_load_in_timm_transformers_and_this_project(hub, script, vit_run, tmp_path):
    done = script("share.py", "--model", vit_run, "--repository", "me/vit")
    assert done.code == 0, done.err
    assert f"{hub.address}/me/vit is version v1" in done.out
    assert {"config.json", "README.md", "transformers/config.json"} <= set(hub.files("me/vit")[1])
    assert card.license_of("me/vit@v1", None, None) == "mit"
    with pytest.raises(UserError, match=r"license of me/vit@v9 is unknown"):
        card.license_of("me/vit@v9", None, None)
    first = load_pretrained(str(vit_run)).model
    load_model("me/vit")  # is now in the cache
    torch.manual_seed(1)
    second = shaken(VisionTransformer(CONFIG), 1)
    better = save_run(tmp_path / "better", second, Preprocess(8, [0.3], [0.4]))
    done = script("share.py", "--model", better, "--repository", "me/vit")
    assert f"{hub.address}/me/vit is version v2" in done.out, done.err
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert load_model("me/vit")[0](images).equal(second.eval()(images))
    again = script("share.py", "--model", better, "--repository", "me/vit")
    assert "is version v2" in again.out
    auto = transformers.AutoModelForImageClassification
    with torch.no_grad():
        for version, model in (("v1", first), ("v2", second), (None, second)):
            expected, suffix = model(images), f"@{version}" if version else ""
            revision = {"revision": version} if version else {}
            ours, _, classes = load_model(f"me/vit{suffix}")
            assert (classes, ours(images).equal(expected)) == (DIGITS, True)
            loaded = timm.create_model(f"hf-hub:me/vit{suffix}", pretrained=True).eval()
            torch.testing.assert_close(loaded(images), expected, atol=1e-5, rtol=1e-5)
            wrapped = auto.from_pretrained("me/vit", **revision)
            native = auto.from_pretrained("me/vit", subfolder="transformers", **revision)
            for theirs in (wrapped, native):
                found = theirs(images).logits
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="has no revision 'v9'"):
        load_model("me/vit@v9")
    done = script("predict.py", "--model", "me/vit", "--revision", "v1", "--images", "digits")
    assert done.code == 0, done.err
    hub.stop()
    with torch.no_grad():
        assert load_model("me/vit")[0](images).equal(second(images))  # from the cache
        assert load_model("me/vit@v1")[0](images).equal(first(images))
    assert GOOD not in done.out + "".join(
        path.read_text(errors="ignore") for path in (tmp_path / "out").rglob("*") if path.is_file()
    )


def test_interrupted_upload_resumes(hub, tmp_path):
    folder = make(tmp_path / "x")
    hub.broken_puts = 100
    with pytest.raises(UserError, match="complete"):
        sharing_hub.upload(folder, "me/x", False, False)
    sent = set(hub.blobs)
    assert len(sent) == 1
    assert len(hub.commits["me/x"]) == 1
    hub.broken_puts, before = 0, len(hub.asked)
    assert sharing_hub.upload(folder, "me/x", False, False)[0] == "v1"
    puts = [line for line in hub.asked[before:] if line.startswith("PUT")]
    assert len(puts) == 1
    assert puts[0].split("/")[-1] not in sent
    assert hub.files("me/x", "v1")[1]["model.onnx"] == b"graph 1"


def test_version_replaces_all_files_of_the_one_before(hub, tmp_path):
    folder = make(tmp_path / "x")
    sharing_hub.upload(folder, "me/x", True, False)
    assert hub.private["me/x"]
    (folder / "model.onnx").unlink()
    make(tmp_path / "y", text="2")
    (tmp_path / "y" / "model.onnx").unlink()
    assert sharing_hub.upload(tmp_path / "y", "me/x", True, False)[0] == "v2"
    assert "model.onnx" not in hub.files("me/x", "v2")[1]
    assert "model.onnx" in hub.files("me/x", "v1")[1]


def test_another_model_is_only_replaced_if_requested(hub, tmp_path):
    folder = make(tmp_path / "x")
    sharing_hub.upload(make(tmp_path / "y", ["cat", "dog"]), "me/x", False, False)
    with pytest.raises(UserError, match="already contains a model of 2 other classes"):
        sharing_hub.upload(folder, "me/x", False, False)
    hub.create("me/notes", {"notes.txt": b"mine"})
    with pytest.raises(UserError, match="already contains something else"):
        sharing_hub.upload(folder, "me/notes", False, False)
    with pytest.raises(UserError, match="exists and is public"):
        sharing_hub.upload(folder, "me/x", True, False)
    assert sharing_hub.upload(folder, "me/x", False, True)[0] == "v2"


def test_refusals_are_one_sentence_each(hub, tmp_path, monkeypatch):
    folder = make(tmp_path / "x")

    def refused(*words, repository="me/x"):
        with pytest.raises(UserError) as caught:
            sharing_hub.upload(folder, repository, False, False)
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "hf_good" not in message
        assert "hf_read" not in message
        assert "hf_wrong" not in message

    refused("permission to write to other/x", "other must be your user name", repository="other/x")
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    refused("permission to write to me/x", "write access")
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    refused("does not accept the token", "hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    refused("there is no Hugging Face token", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", GOOD)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # closed port
    refused("cannot be reached", "the same command continues")


@pytest.mark.parametrize("name", ["name", "a/b/c", "a b/c", "me/--", "me/", "/x", "../x"])
def test_invalid_repository_names_are_refused_before_anything_is_written(name, script, vit_run):
    done = script("share.py", "--model", vit_run, "--repository", name)
    assert done.code == 2
    assert "must be owner/name" in done.err
