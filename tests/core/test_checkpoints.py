"""Files are written completely or not at all, and reading one never executes code."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from lab.core import Run, UserError, checkpoints
from tests.drills.harness import Process

ROOT = Path(__file__).resolve().parents[2]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(scratch):
        scratch.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"could not write .*file: No space left on device\. .* MB"):
        checkpoints.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_whoever_is_reading_the_old_file_still_reads_it(tmp_path):
    """The new file takes the place of the old one, whose content never changes."""
    path = tmp_path / "file"
    path.write_text("old")
    with open(path) as reader:
        checkpoints.write_atomically(path, lambda scratch: scratch.write_text("new"))
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_an_error_in_the_content_is_not_blamed_on_the_disk(tmp_path):
    def fail(scratch):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoints.write_atomically(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_every_kind_of_file_that_grows_too_large_ends_with_a_sentence(tmp_path):
    import resource

    tensors = {"x": torch.zeros(10_000)}
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    Run(place).write_history([{"epoch": 1}])
    writes = {
        "json": lambda: checkpoints.write_json(place / "json", ["x" * 10_000]),
        "state": lambda: checkpoints.save_state(place / "state", tensors),
        "weights": lambda: checkpoints.save_weights(place / "weights", tensors, {}),
        "history.csv": lambda: Run(place).append_history({"epoch": "1" * 10_000}),
    }
    for name, write in writes.items():

        def limited(write=write):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            with pytest.raises(UserError) as refused:
                write()
            print(refused.value)

        error = Process(limited, log.with_name(f"log-{name}")).finish()
        assert error.status == 0, error.output
        assert error.output.startswith(f"could not write {place / name}: "), error.output
        assert "MB are free" in error.output
    assert [path.name for path in place.iterdir()] == ["history.csv"]


def test_a_state_that_could_run_code_is_refused_without_torchs_advice(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"model": types.SimpleNamespace()}, path)
    with pytest.raises(UserError, match="cannot be read") as refused:
        checkpoints.load_state(path)
    assert "weights_only" not in str(refused.value)
    assert "--overwrite starts it over" in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\3\4garbage", None])
def test_a_damaged_state_is_named(tmp_path, content):
    path = tmp_path / "last.pt"
    torch.save([1], path)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt cannot be read: it is damaged"):
        checkpoints.load_state(path)


def test_a_truncated_state_is_named(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.save_state(path, {"x": torch.zeros(1000)})
    assert checkpoints.load_state(path)["x"].shape == (1000,)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load_state(path)


def test_weights_come_back_with_their_header(tmp_path):
    path, header = tmp_path / "best.safetensors", {"model": "VisionTransformer", "classes": ["ä"]}
    state = {"a": torch.randn(2, 3), "b.c": torch.randn(4).bfloat16()}
    checkpoints.save_weights(path, state, header)
    loaded, found = checkpoints.load_weights(path)
    assert found == header
    assert loaded.keys() == state.keys()
    assert all(loaded[k].equal(state[k]) for k in state)


def test_line_endings_do_not_change_the_hash_of_a_text(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x = 1\ny = 2\n")
    (tmp_path / "b.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    (tmp_path / "c.py").write_bytes(b"x = 1\ny = 3\n")
    a, b, c = (checkpoints.text_hash(tmp_path / f"{name}.py") for name in "abc")
    assert a == b != c


def test_weights_that_two_layers_share_can_be_saved(tmp_path):
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, layer)
    checkpoints.save_weights(tmp_path / "w.safetensors", model.state_dict(), {})
    state, _ = checkpoints.load_weights(tmp_path / "w.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert state["0.weight"].equal(state["1.weight"])


def test_wrong_weight_files_are_explained(tmp_path):
    path = tmp_path / "best.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.load_weights(path)
    checkpoints.save_weights(path, {"a": torch.zeros(1000)}, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        checkpoints.load_weights(path)
    checkpoints.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no valid ViT Lab header"):
        checkpoints.load_weights(path)


def test_a_model_of_another_shape_is_explained_by_key():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(UserError) as refused:
        checkpoints.load_strict(model, {"weight": torch.zeros(3, 4), "scale": torch.ones(1)}, "x")
    assert str(refused.value) == (
        "x does not match the model's architecture (3 mismatched keys):\n  missing bias\n  "
        "unexpected scale\n  weight has shape (3, 4), but the model expects (3, 2)"
    )


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 10**5, "\0"])
def test_a_damaged_record_is_named(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json is damaged; --overwrite repeats the run"):
        checkpoints.read_json(path)


def test_json_is_written_readably(tmp_path):
    checkpoints.write_json(tmp_path / "a", {"name": "é", "list": [1, 2.5]})
    assert json.loads((tmp_path / "a").read_text("utf-8")) == {"name": "é", "list": [1, 2.5]}
    assert "é" in (tmp_path / "a").read_text("utf-8")
