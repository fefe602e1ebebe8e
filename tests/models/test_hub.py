"""Repositories of the Hugging Face hub, on a server of the test, with and without a network."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import ViTForImageClassification, ViTImageProcessor

from lab.core import UserError
from lab.models import load_pretrained
from tests.models.reference import (
    ROOT,
    assert_preprocess_of,
    assert_same_logits,
    exported,
    timms,
)
from tests.shaken import shaken
from tests.sharing.hub_server import Hub


@pytest.fixture
def server():
    hub = Hub()
    yield hub
    hub.stop()


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    """That hub as the only one of this process, and a function that takes it away."""
    server.be_the_only_one(monkeypatch, tmp_path)

    def offline():
        server.stop()
        local = partial(huggingface_hub.hf_hub_download, local_files_only=True)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", local)

    return server, offline


SCRIPT = """
import sys, torch
from lab.core import UserError
from lab.models import load_pretrained
images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
for number, source in enumerate(sys.argv[2:]):
    try:
        found = load_pretrained(source, plain_only=True)
        with torch.no_grad():
            torch.save([found.model(images), found.preprocess.mean], f"{sys.argv[1]}{number}.pt")
    except UserError as error:
        print(error, end="")
"""


def in_another_process(environment, place, *sources):
    """Loads by huggingface_hub's environment variables, which it reads while it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(place), *sources],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "*", **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def publish_vit(hub, folder):
    """A ViT of transformers, in a folder and as google/vit. Returns: its logits for SCRIPT."""
    config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48,
        image_size=32, patch_size=8, num_labels=5,
    )  # fmt: skip
    model = shaken(ViTForImageClassification(config))
    model.save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.25] * 3).save_pretrained(folder)
    hub.publish("google/vit", folder)
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).logits


def test_repository_is_downloaded_once_and_then_found_offline(client, tmp_path):
    hub, offline = client
    expected = publish_vit(hub, tmp_path / "vit")
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    for source in ("google/vit", "hf-hub:google/vit"):
        found = load_pretrained(source, plain_only=True)
        torch.testing.assert_close(found.model(images), expected, atol=1e-5, rtol=1e-5)
    fetched = [line.split("/")[-1] for line in hub.asked if line.startswith("GET /google/")]
    assert sorted(fetched) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    cache = tmp_path / "cache"
    assert (cache / "models--google--vit").is_dir()
    offline()
    environment = {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "1"}
    said = in_another_process(environment, tmp_path / "b", "google/vit", "google/other")
    logits, mean = torch.load(tmp_path / "b0.pt", weights_only=True)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert mean == [0.25] * 3

    # What is not in the cache: the file, the repository, the folder to put it in.
    assert f"config.json of google/other is not in the cache ({cache}" in said
    assert "HF_HUB_OFFLINE" in said
    assert f"{hub.address}/google/other/tree/main" in said
    assert "use weights/other as the weights" in said


def test_suggested_folder_works(client, tmp_path, monkeypatch):
    hub, offline = client
    expected = publish_vit(hub, tmp_path / "vit")
    offline()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_pretrained("google/vit")
    advised = Path(str(caught.value).split("and use ")[1].split()[0])
    advised.mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert file in str(caught.value)
        (advised / file).write_bytes((tmp_path / "vit" / file).read_bytes())
    pretrained = load_pretrained(str(advised))
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    torch.testing.assert_close(pretrained.model(images), expected, atol=1e-5, rtol=1e-5)
    assert pretrained.preprocess.mean == [0.25] * 3


def test_timm_name_repository_and_folder_give_the_same_model(client, tmp_path):
    hub, _ = client
    name = "test_vit.r160_in1k"
    reference = timms(name)
    folder = exported(reference, tmp_path / name)
    hub.publish(f"timm/{name}", tmp_path / name)
    for source in ("test_vit", name, f"timm/{name}", folder):
        pretrained = load_pretrained(source, plain_only=True)
        assert_same_logits(pretrained, reference, 160)
        assert_preprocess_of(pretrained, reference)
    fetched = [line for line in hub.asked if line.startswith("GET /timm/")]
    assert sorted(set(fetched)) == sorted(fetched)  # nothing twice


def test_missing_files_are_remembered_offline(client, tmp_path):
    """A repository with only a pickle and no processor: the cache knows what is missing."""
    hub, offline = client
    place = tmp_path / "old"
    publish_vit(hub, place)
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    (place / "preprocessor_config.json").unlink()
    hub.publish("someone/old", place)
    online = load_pretrained("someone/old")
    assert any("without mean and std" in remark for remark in online.remarks)
    count = len(hub.asked)
    offline()
    assert load_pretrained("someone/old").fingerprint() == online.fingerprint()
    assert len(hub.asked) == count


def test_unknown_processor_is_reported_offline(client, tmp_path):
    """Without it images would be normalized wrongly, without any sign of it."""
    hub, offline = client
    publish_vit(hub, tmp_path / "vit")
    load_pretrained("google/vit")
    for file in tmp_path.joinpath("cache").rglob("preprocessor_config.json"):
        file.unlink()
    offline()
    with pytest.raises(UserError, match=r"preprocessor_config\.json of google/vit is not in"):
        load_pretrained("google/vit")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/body", "there is no folder 'no/body'"),
        ("some/gated", "is gated: accept its terms"),
        ("some/empty", "no config.json"),
        ("some/configured", "neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_unusable_repositories_have_different_messages(source, said, client):
    hub, _ = client
    hub.gated.add("some/gated")
    hub.create("some/empty")
    hub.create("some/configured", {"config.json": b'{"model_type": "vit"}'})
    with pytest.raises(UserError) as caught:
        load_pretrained(source)
    assert said in str(caught.value)
