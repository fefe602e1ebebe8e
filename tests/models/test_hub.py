"""Repositories of the Hugging Face hub, on a server of the test, with and without a network."""

import http.server
import os
import subprocess
import sys
import threading
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

COMMIT = "c0ffee" + "0" * 34  # of every repository that the tests serve


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def hub(tmp_path):
    """A server of repositories: the folder that holds them, its address, and what was asked."""
    folder = tmp_path / "hub"
    folder.mkdir()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            owner, name, *rest = self.path.strip("/").split("/")
            file = folder / owner / name / rest[-1]
            asked.append(f"{self.command} {owner}/{name}/{rest[-1]}")
            if file.is_file() and rest[:-1] in (["resolve", "main"], ["resolve", COMMIT]):
                content = file.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{owner}-{name}-{rest[-1]}-{len(content)}"')
                self.send_header("Content-Length", str(len(content)))
            else:
                content = b""
                gated, there = name == "gated", file.parent.is_dir()
                code = "GatedRepo" if gated else "EntryNotFound" if there else "RepoNotFound"
                self.send_response(403 if gated else 404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def stop():
        if thread.is_alive():
            server.shutdown()
            thread.join()
            server.server_close()

    yield folder, f"http://127.0.0.1:{server.server_port}", asked, stop
    stop()


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """This process asks that server, and caches in an empty folder; `offline()` ends that."""
    folder, address, asked, stop = hub
    where = {"cache_dir": str(tmp_path / "cache")}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", where["cache_dir"])
    look = partial(huggingface_hub.try_to_load_from_cache, **where)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look)
    ask = partial(huggingface_hub.hf_hub_download, endpoint=address, **where)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)

    def offline():
        stop()
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", partial(ask, local_files_only=True))

    return folder, asked, offline


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


def publish_vit(folder, mean=0.25):
    """A ViT of transformers and what it gives for the images of SCRIPT."""
    config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48,
        image_size=32, patch_size=8, num_labels=5,
    )  # fmt: skip
    model = shaken(ViTForImageClassification(config))
    model.save_pretrained(folder)
    ViTImageProcessor(image_mean=[mean] * 3).save_pretrained(folder)
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).logits


def test_repository_is_downloaded_once_and_then_found_offline(hub, tmp_path):
    folder, address, asked, stop = hub
    expected = publish_vit(folder / "google" / "vit")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
    repository = "google/vit"
    assert in_another_process(environment, tmp_path / "a", repository, f"hf-hub:{repository}") == ""
    fetched = [line.split("/")[-1] for line in asked if line.startswith("GET")]
    assert sorted(fetched) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert (tmp_path / "home" / "hub" / "models--google--vit").is_dir()
    stop()
    environment["HF_HUB_OFFLINE"] = "1"
    said = in_another_process(environment, tmp_path / "b", repository, "google/other")
    for number in ("a0", "a1", "b0"):
        logits, mean = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert mean == [0.25] * 3

    # What is not in the cache: the file, the repository, the folder to put it in.
    assert f"config.json of google/other is not in the cache ({tmp_path / 'home'}" in said
    assert "HF_HUB_OFFLINE" in said
    assert f"{address}/google/other/tree/main" in said
    assert "use weights/other as the weights" in said


def test_suggested_folder_works(client, tmp_path, monkeypatch):
    folder, _, offline = client
    expected = publish_vit(folder / "google" / "vit")
    offline()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_pretrained("google/vit")
    advised = Path(str(caught.value).split("and use ")[1].split()[0])
    advised.mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert file in str(caught.value)
        (advised / file).write_bytes((folder / "google" / "vit" / file).read_bytes())
    pretrained = load_pretrained(str(advised))
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    torch.testing.assert_close(pretrained.model(images), expected, atol=1e-5, rtol=1e-5)
    assert pretrained.preprocess.mean == [0.25] * 3


def test_timm_name_repository_and_folder_give_the_same_model(client, tmp_path):
    folder, asked, _ = client
    name = "test_vit.r160_in1k"
    reference = timms(name)
    exported(reference, folder / "timm" / name)
    for source in ("test_vit", name, f"timm/{name}", str(folder / "timm" / name)):
        pretrained = load_pretrained(source, plain_only=True)
        assert_same_logits(pretrained, reference, 160)
        assert_preprocess_of(pretrained, reference)
    fetched = [line for line in asked if line.startswith("GET")]
    assert sorted(set(fetched)) == sorted(fetched)  # nothing twice


def test_missing_files_are_remembered_offline(client):
    """A repository with only a pickle and no processor: the cache knows what is missing."""
    folder, asked, offline = client
    place = folder / "someone" / "old"
    publish_vit(place)
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    (place / "preprocessor_config.json").unlink()
    online = load_pretrained("someone/old")
    assert any("without mean and std" in remark for remark in online.remarks)
    count = len(asked)
    offline()
    assert load_pretrained("someone/old").fingerprint() == online.fingerprint()
    assert len(asked) == count


def test_unknown_processor_is_reported_offline(client, tmp_path):
    """Without it images would be normalized wrongly, without any sign of it."""
    folder, _, offline = client
    publish_vit(folder / "google" / "vit")
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
    folder, *_ = client
    (folder / "some" / "empty").mkdir(parents=True)
    (folder / "some" / "configured").mkdir()
    (folder / "some" / "configured" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError) as caught:
        load_pretrained(source)
    assert said in str(caught.value)
