"""What goes wrong in a submission ends as one sentence with the line in the student's file."""

import faulthandler
import re
from pathlib import Path

import pytest

from lab.exercise import checks, processes
from lab.exercise.parts import PARTS
from lab.exercise.processes import Job, run_checks
from tests.exercise.conftest import STUDENT, WEIGHTS, definitions, edited, pasted


def run(folder: Path, source: str, parts=("MLP",), seconds=10.0, steps_file=None):
    path = folder / "model.py"
    path.write_text(source, encoding="utf-8")
    job = Job(path, steps_file, tuple(parts), 1, WEIGHTS, seconds, memory_mb=1000)
    results, printed = run_checks(job)
    assert [result.part for result in results] == list(parts)
    return results, printed


def line_of(source: str, text: str) -> int:
    return source[: source.index(text)].count("\n") + 1


def mlp_with(line: str) -> str:
    """A solution whose MLP.forward begins with a line."""
    return pasted(edited("MLP", [("h = self.fc1(x)", f"{line}\n        h = self.fc1(x)")]))


SENTENCES = {
    "raise KeyError('width')": r"line \d+: KeyError: 'width'",
    "x = torch.log(-x.abs())": r"line \d+: the output contains NaN",
    "big = torch.zeros(2**40)": r"line \d+: this needs more memory than the check allows",
    "big = [0] * 2**40": r"line \d+: this needs more memory than the check allows",
    "return self.forward(x)": r"line \d+: infinite recursion: this function keeps calling itself",
    "raise SystemExit": r"line \d+: your code ends the program here",
    "import os; os._exit(3)": r"your code ended the process",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": r"killed by the signal SIGKILL",
    "import ctypes; ctypes.string_at(0)": r"line \d+: the process was killed by the signal SIGSEGV",
    "while True: pass": r"line \d+: still running after 0.5 seconds",
    "return (x, x)": r"line \d+: MLP returns a value of type tuple, not a tensor",
    "x = undefined": r"line \d+: NameError",
}


@pytest.mark.parametrize("statement", SENTENCES)
def test_failure_in_forward_is_one_sentence_with_its_line(tmp_path, statement):
    source = mlp_with(statement)
    (result,), _ = run(tmp_path, source, seconds=0.5 if "while" in statement else 10.0)
    assert re.search(SENTENCES[statement], result.says), result.says
    assert "\n" not in result.says
    if "line" in SENTENCES[statement] and "returns" not in SENTENCES[statement]:
        assert f"line {line_of(source, statement)}" in result.says


def test_syntax_error_names_the_line(tmp_path):
    source = pasted(STUDENT).replace(
        "def forward(self, x):\n        h =", "def forward(self, x:\n h ="
    )
    results, _ = run(tmp_path, source, ("MLP", "Attention"))
    for result in results:
        assert re.search(r"model.py, line \d+: syntax error", result.says)


def test_a_syntax_error_in_the_steps_leaves_the_model(tmp_path):
    steps = tmp_path / "steps.py"
    steps.write_text("def evaluate(:\n", encoding="utf-8")
    (mlp, evaluate), _ = run(tmp_path, pasted(STUDENT), ("MLP", "evaluate"), steps_file=steps)
    assert mlp.failed is None
    assert evaluate.says.startswith("steps.py, line 1: syntax error")


@pytest.mark.parametrize("mistake", ["x = = 1", "raise SystemExit", "import os; os._exit(1)"])
def test_a_model_that_cannot_be_loaded_leaves_the_steps(tmp_path, mistake):
    steps = tmp_path / "steps.py"
    steps.write_text(STUDENT.replace("from model", "# "), encoding="utf-8")
    parts = ("MLP", "training_step", "evaluate")
    (mlp, *functions), _ = run(tmp_path, mistake, parts, steps_file=steps)
    assert mlp.failed == processes.LOADING
    assert [result.failed for result in functions] == [None, None]


def test_a_mistake_in_the_model_names_the_line_of_its_method(check):
    source = pasted(edited("VisionTransformer", [("x = x[:, 0]", "x = x.mean(1)")]))
    line = line_of(source, "def forward_head")
    assert check(source, "VisionTransformer").says.startswith(f"model.py, line {line}: The head")


def test_missing_class_names_a_similar_one(tmp_path):
    source = pasted(STUDENT).replace("class MLP(", "class Mlp2(").replace("MLP(config)", "1")
    (result,), _ = run(tmp_path, source.replace("Mlp2", "MLp"))
    assert "there is no class MLP" in result.says
    assert "MLp" in result.says


def test_wrong_signature_names_the_line_and_the_signature(tmp_path):
    source = pasted(STUDENT).replace(
        "class MLP(nn.Module):\n    def __init__(self, config):",
        "class MLP(nn.Module):\n    def __init__(self, dim, hidden_dim, config=None):",
    )
    (result,), _ = run(tmp_path, source)
    assert f"line {line_of(source, 'def __init__(self, dim')}" in result.says
    assert "hidden_dim" in result.says


def test_a_class_without_nn_module_is_one_sentence(check):
    result = check(pasted(STUDENT).replace("class MLP(nn.Module)", "class MLP"), "MLP")
    assert "write `class MLP(nn.Module)`" in result.says


def test_a_file_without_the_config_is_one_sentence(tmp_path):
    source = pasted(STUDENT).replace("class ViTConfig:", "class MyConfig:")
    (result,), _ = run(tmp_path, source.replace("ViTConfig", "object"))
    assert "ViTConfig is missing" in result.says


def test_a_loop_on_import_is_waited_for_only_once(tmp_path, monkeypatch):
    start, started = processes._run_once, []
    monkeypatch.setattr(processes, "_run_once", lambda *a: started.append(a) or start(*a))
    results, _ = run(tmp_path, pasted(STUDENT) + "\nwhile True:\n    pass\n", tuple(PARTS), 0.5)
    assert all("still running" in result.says for result in results)
    assert len(started) == 1  # not once for each part


def test_a_part_that_hangs_keeps_the_points_of_earlier_checks(tmp_path):
    (result,), _ = run(tmp_path, mlp_with("while x.requires_grad: pass"), seconds=1)
    assert "still running" in result.says
    assert result.passed == ["shapes", "values"]
    assert result.failed == "gradients"


def test_a_failure_of_the_checker_keeps_the_points_of_earlier_checks(tmp_path, monkeypatch):
    def fail(evidence, weights):
        raise ValueError("zip()")

    monkeypatch.setitem(checks._CHECKS, "gradients", fail)
    (result,), _ = run(tmp_path, pasted(STUDENT))
    assert result.says == "the checker itself failed (ValueError: zip())"
    assert (result.passed, result.failed) == (["shapes", "values"], "gradients")


def test_a_byte_order_mark_is_ignored(tmp_path):
    (result,), _ = run(tmp_path, "\ufeff" + pasted(STUDENT))
    assert result.failed is None


@pytest.mark.parametrize("move", [".to(x.device)", ".to(x)", ".to(device=x.device)", ".type_as(x)"])
def test_moving_a_new_tensor_to_the_device_is_no_mistake(check, move):
    source = pasted(STUDENT).replace(
        "h = self.fc1(x)", f"h = self.fc1(x + torch.zeros(x.shape[-1], dtype=x.dtype){move})"
    )
    assert "torch.zeros" in source
    assert check(source, "MLP").failed is None
    mistake = check(source.replace(move, ""), "MLP")
    assert "device" in mistake.says


def test_a_part_that_dies_only_loses_itself(tmp_path):
    source = mlp_with("import os; os._exit(1)")
    results, _ = run(tmp_path, source, ("PatchEmbed", "MLP", "Attention"))
    assert [result.failed is None for result in results] == [True, False, True]


def test_a_part_that_only_works_with_the_students_own_parts_passes(check):
    """VisionTransformer reads an attribute that the reference's PatchEmbed does not have."""
    source = pasted(STUDENT)
    source = source.replace("self.patch_size = P\n", "self.patch_size = P\n        self.mine = 0\n")
    source = source.replace(
        "x = self.patch_embed(x)\n", "x = self.patch_embed(x) + self.patch_embed.mine\n"
    )
    result = check(source, "VisionTransformer")
    assert result.failed is None, result.says


def test_a_part_that_only_works_with_timms_parts_fails(check):
    """timm's PatchEmbed has an attribute that the student's does not have."""
    edits = [("n = (config.img_size // config.patch_size) ** 2", ""),
             ("if config.class_token:", "n = self.patch_embed.num_patches\n"
              "        if config.class_token:")]  # fmt: skip
    source = pasted(edited("VisionTransformer", edits))
    result = check(source, "VisionTransformer")
    line = line_of(source, "n = self.patch_embed.num_patches")
    assert result.failed == "options"
    assert result.says.startswith(f"model.py, line {line}: AttributeError: 'PatchEmbed' object")
    assert result.says.endswith("but not with your own")


def test_the_model_of_replace_head_has_no_methods_that_model_py_lacks(check):
    new = "model.reset_classifier(num_classes)"
    old = "model.head = nn.Linear(model.head.in_features, num_classes)"
    result = check(pasted(edited("replace_head", [(old, new)])), "replace_head")
    assert "'VisionTransformer' object has no attribute 'reset_classifier'" in result.says


def test_a_timer_of_the_parent_does_not_stop_the_check(tmp_path):
    faulthandler.dump_traceback_later(1000)
    (result,), _ = run(tmp_path, pasted(STUDENT))
    assert result.failed is None, result.says


def test_what_the_submission_prints_is_kept_apart(tmp_path):
    (result,), printed = run(tmp_path, mlp_with("print('}{ garbage', x.shape)"))
    assert result.failed is None
    assert "}{ garbage" in printed


def test_endless_printing_ends_at_the_limit(tmp_path):
    (result,), _ = run(tmp_path, mlp_with("while True: print('x' * 10**6)"), seconds=20)
    assert "File too large" in result.says


def test_each_part_passes_without_the_others(check):
    """The reference fills in what a part builds on."""
    for part, code in definitions(STUDENT).items():
        imports = STUDENT[: STUDENT.index("class PatchEmbed")]
        result = check(pasted(imports + code), part)
        assert result.failed is None, f"{part}: {result.says}"


UNKNOWN = {
    "correct up to a factor of 1.41": ("MLP", [("return h", "return h * 2**0.5")]),
    "correct up to -1 times the input": ("Block", [
        ("return x", "return x - start"), ("a = self.attn", "start = x\n        a = self.attn")]),
    "correct up to a constant of +3": ("MLP", [("return h", "return h + 3")]),
    "correct for token 0": ("MLP", [
        ("return h", "return h * torch.arange(1, x.shape[1] + 1)[:, None]")]),
    "correct for channel 0, 1": ("MLP", [
        ("return h", "return torch.cat([h[..., :2], h[..., 2:] ** 2], -1)")]),
    "tokens are in another order": ("PatchEmbed", [("return x", "return x.flip(1)")]),
    "axes of the output are in another order": ("MLP", [("return h", "return h.permute(1, 0, 2)")]),
    "multiplied by 0.125 instead of 0.354": ("Attention", [("math.sqrt(self.d)", "8")]),
    "1 becomes 0.7616": ("MLP", [("F.gelu(h)", "torch.tanh(h)")]),
    "depends on the other images": ("Attention", [("return (out", "out = out - out.mean(0) ** 2\n"
                                                   "        return (out")]),
    "depends on the other tokens": ("MLP", [("return h", "return h - h.amax(1, keepdim=True)")]),
    "depends on the order of the tokens": ("Attention", [
        ("return (out", "out = out * torch.linspace(2, 3, N)[:, None]\n        return (out")]),
    "works for one and two images but not for three": ("MLP", [
        ("return h", "return h if len(x) < 3 else h.view(1)")]),
    "fc2.weight (24, 48)": ("MLP", [("nn.Linear(hidden, D)", "nn.Linear(hidden, D + 1)")]),
    "sum to one over queries": ("Attention", [
        ("torch.softmax(scores, dim=3)", "torch.softmax(2 * scores, dim=2)")]),
    "the attention weights are not correct": ("Attention", [("q @ k", "q.abs() @ k")]),
    "look at the line that merges the heads": ("Attention", [
        ("out.transpose(1, 2).reshape", "out.permute(0, 2, 3, 1).reshape")]),
    "the MLP does not": ("Block", [("self.mlp(self.norm2(x))", "self.mlp(self.norm2(a))")]),
    "`embed` is correct": ("VisionTransformer", [("in self.blocks:", "in self.blocks[::-1]:")]),
    "the output equals the input": ("MLP", [("return h", "return x")]),
    "proj.bias (24,)": ("PatchEmbed", [("stride=P", "stride=P, bias=False")]),
    "for one image the output has shape (10, 24)": ("MLP", [("return h", "return h.squeeze()")]),
    "blocks.2.attn.qkv.bias (72,) and 8 more": ("VisionTransformer", [
        ("range(config.depth)", "range(config.depth + 1)")]),
    "no negative values": ("PatchEmbed", [("return x", "return F.relu(x)")]),
    "the update between them is wrong": ("training_step", [
        ("loss.backward()", "(loss * 2).backward()")]),
    "the largest difference is at": ("PatchEmbed", [("return x", "return x.sin()")]),
}  # fmt: skip


@pytest.mark.parametrize("statement", UNKNOWN)
def test_unknown_mistake_gets_the_narrowest_true_statement(check, statement):
    part, edits = UNKNOWN[statement]
    result = check(pasted(edited(part, edits)), part)
    assert result.mistakes == [] or "works for" in statement
    assert statement.lower() in result.says.lower()
