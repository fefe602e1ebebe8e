"""Constants as flags: types, help, recipes, and what happens to each kind of mistake."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from lab.core import constants, script_source

SCRIPT = '''"""Does a thing."""
from typing import Literal

# --- Size ---
WIDTH: int = 3  # in pixels, 50 % of it
RATE: float | None = None  # a rate

# --- How ---
KIND: Literal["a", "bee"] = "a"
ON: bool = True  # a switch
SEED: int = 0
NAME: str | None = None
RECIPES = {"small": {"RATE": 0.5}, "large": {"RATE": 2.0}}
not_a_constant: int = 3


def main(c):
    return c.WIDTH, c.RATE, c.KIND, c.ON, c.SEED, c.NAME
'''


def git(place, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *words], cwd=place, check=True, capture_output=True)


@pytest.fixture
def script(tmp_path):
    """Makes a module of the script above after edits; it is committed unedited if asked."""

    def make(*edits, commit=False, name="script", text=SCRIPT):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        if commit:
            git(tmp_path, "init", "-q")
            git(tmp_path, "add", path.name)
            git(tmp_path, "commit", "-qm", "script")
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        module = types.ModuleType(name, "Does a thing.")
        module.__file__ = str(path)
        exec(compile(text, path, "exec"), module.__dict__)
        return module

    script_source.committed.cache_clear()
    return make


DEFAULTS = {"WIDTH": 3, "RATE": None, "KIND": "a", "ON": True, "SEED": 0, "NAME": None}


def error_of(capsys, *given, **named):
    with pytest.raises(SystemExit) as end:
        constants.override(*given, **named)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


def test_flags_have_the_constants_names_types_and_defaults(script):
    module = script()
    assert constants.override(module, []) == DEFAULTS
    words = ["--width", "7", "--rate", "1e-3", "--kind", "bee", "--no-on"]
    assert constants.override(module, words)["RATE"] == 1e-3
    assert (module.WIDTH, module.KIND, module.ON) == (7, "bee", False)
    assert constants.override(module, ["--rate", "none"])["RATE"] is None


def test_help_shows_comments_groups_defaults_and_what_each_recipe_gives(script, capsys):
    module = script()
    with pytest.raises(SystemExit):
        constants.override(module, ["--help"], recipes=module.RECIPES)
    text = " ".join(capsys.readouterr().out.split())
    assert "Does a thing." in text
    assert "Size: --width INT in pixels, 50 % of it (default: 3)" in text
    assert "a rate (small: 0.5, large: 2.0)" in text
    assert "How: --kind {a,bee}" in text


def test_the_header_names_the_recipe_and_what_it_gave(script):
    module = script()
    values = constants.override(module, ["--width", "4"], recipes=module.RECIPES)
    resolved = constants.resolve(values, module.RECIPES["large"])
    assert resolved.RATE == 2.0
    assert constants.header(values, resolved, "large") == "recipe large: RATE 2.0"


def test_a_flag_of_other_programs_is_translated(script, capsys, monkeypatch):
    monkeypatch.setitem(constants._OTHER_NAMES, "--lr", "--rate")
    assert error_of(capsys, script(), ["--lr", "3"]) == "unknown flag --lr; here it is --rate"


@pytest.mark.parametrize(("words", "message"), [
    (["--widht", "3"], "unknown flag --widht; did you mean --width?"),
    (["--xyz"], "unknown flag --xyz"),
    (["--not-a-constant", "3"], "unknown flag --not-a-constant"),
    (["--recipes", "3"], "unknown flag --recipes"),
    (["--width", "3.5"], "argument --width: 3.5 is not an integer"),
    (["--width", "64.0"], "argument --width: 64.0 is not an integer; write 64"),
    (["--width", "many"], "argument --width: 'many' is not an integer"),
    (["--width", "none"], "argument --width: 'none' is not an integer"),
    (["--width", "9" * 30], f"argument --width: {'9' * 30} is too large; the maximum is "
                            f"{sys.maxsize}"),
    (["--rate", "x"], "argument --rate: 'x' is not a number or None"),
    (["--name=--"], "argument --name: the value is missing"),
    (["--rate", "nan"], "argument --rate: nan is not a finite number"),
    (["--rate=-inf"], "argument --rate: -inf is not a finite number"),
    (["--seed", "-3"], "argument --seed: -3 is negative; it must be 0 or more"),
    (["--kind", "Bee"], "argument --kind: 'Bee' is not one of a, bee; did you mean bee?"),
    (["--kind", "c"], "argument --kind: 'c' is not one of a, bee"),
    (["--lr", "3"], "unknown flag --lr"),
    (["--resume"], "unknown flag --resume; the same command resumes a stopped run"),
    (["--name", "a.jpg", "b.jpg"], "b.jpg is not preceded by a flag; --name takes one value: put "
                                   'names that belong together in quotes, "a b"'),
    (["--name", *"abcde"], "b c d ... is not preceded by a flag; --name takes one value: put "
                           'names that belong together in quotes, "a b"'),
    (["--width", "3", "4"], "4 is not preceded by a flag"),
    (["--on", "False"], "False is not preceded by a flag; --on takes no value: write --on or "
                        "--no-on"),
])  # fmt: skip
def test_a_wrong_flag_is_explained(script, capsys, words, message):
    assert error_of(capsys, script(), words) == message


@pytest.mark.parametrize(("old", "new", "value"), [
    ("WIDTH: int = 3", "WIDTH = 5", 5),
    ("KIND: Literal[\"a\", \"bee\"] = \"a\"", "KIND = 'bee'", "bee"),
    ("RATE: float | None = None", "RATE = 1", 1.0),
    ("ON: bool = True", "ON = False", False),
])  # fmt: skip
def test_a_constant_without_its_annotation_keeps_its_type(script, capsys, old, new, value):
    name = new.split()[0]
    module = script((old, new), commit=True)
    values = constants.override(module, [])
    assert values == {**DEFAULTS, name: value}
    assert type(values[name]) is type(value)
    if name == "KIND":
        assert "not one of a, bee" in error_of(capsys, module, ["--kind", "c"])


def test_without_git_the_type_is_that_of_the_recipe_or_value(script, capsys):
    module = script(("WIDTH: int = 3", "WIDTH = 5"), ("RATE: float | None = None", "RATE = 1"))
    values = constants.override(module, [], recipes=module.RECIPES)
    assert values == {**DEFAULTS, "WIDTH": 5, "RATE": 1.0}
    assert type(values["RATE"]) is float
    assert "not an integer" in error_of(capsys, module, ["--width", "x"])


def test_without_git_a_constant_that_only_a_module_reads_counts(script):
    module = script(("WIDTH: int = 3", "WIDTH = 5"), ("c.WIDTH, ", ""))
    assert constants.override(module, [])["WIDTH"] == 5


def test_a_byte_order_mark_is_ignored(script):
    module = script()
    path = Path(module.__file__)
    path.write_text(SCRIPT, encoding="utf-8-sig")
    assert constants.override(module, ["--width", "4"]) == {**DEFAULTS, "WIDTH": 4}


@pytest.mark.parametrize("commit", [True, False])
def test_a_constant_that_is_commented_out_is_named(script, capsys, commit):
    module = script(("ON: bool", "# ON: bool"), commit=commit)
    message = "script.py: ON is missing; put its line back, and change its value instead"
    assert error_of(capsys, module, []) == message + "; its value was True" * commit


def test_a_script_inherits_the_constants_of_its_base(script, capsys):
    base = script()
    text = "EXTRA: int = 1\nWIDTH = 9\ndef main(c):\n    return c.EXTRA\n"
    module = script(name="other", text=text)
    values = constants.override(module, ["--rate", "2"], base, ("NAME",))
    expected = {**DEFAULTS, "EXTRA": 1, "WIDTH": 9, "RATE": 2.0}
    del expected["NAME"]
    assert values == expected
    assert "unknown flag --name" in error_of(capsys, module, ["--name", "x"], base, ("NAME",))
    wrong = script(name="wrong", text=text.replace("9", "'9'"))
    assert error_of(capsys, wrong, [], base) == (
        "wrong.py, line 2: WIDTH = '9': '9' is not an integer; write 9 without quotes"
    )


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("edit", ["WIDHT = 5", "WIDHT: int = 5"])
@pytest.mark.parametrize("added", [True, False])
def test_a_misspelled_constant_is_named(script, capsys, commit, edit, added):
    line = "WIDTH: int = 3  # in pixels, 50 % of it\n"
    module = script((line, line + edit + "\n" if added else edit + "\n"), commit=commit)
    assert error_of(capsys, module, []) == (
        f"script.py, line {5 + added}: WIDHT is not a constant of this script; did you mean WIDTH?"
    )


def test_a_constant_of_the_users_own_is_a_flag(script):
    edits = ("ON: bool", "MINE: int = 4  # my own\nON: bool"), ("c.ON", "c.ON, c.MINE")
    assert constants.override(script(*edits, commit=True), ["--mine", "5"])["MINE"] == 5


@pytest.mark.parametrize(("old", "new", "line", "message"), [
    ("ON: bool = True", "ON: bool = 'False'", 10,
     "ON = 'False': 'False' is not True or False; write False without quotes"),
    ("ON: bool = True", "ON: bool = 0", 10, "ON = 0: 0 is not True or False"),
    ('KIND: Literal["a", "bee"] = "a"', 'KIND: Literal["a", "bee"] = "Bee"', 9,
     "KIND = 'Bee': 'Bee' is not one of a, bee; did you mean bee?"),
    ("WIDTH: int = 3", "WIDTH: int = 64.0", 5, "WIDTH = 64.0: 64.0 is not an integer; write 64"),
    ("WIDTH: int = 3", "WIDTH: int = True", 5, "WIDTH = True: True is not an integer"),
    ("WIDTH: int = 3", "WIDTH: int = None", 5, "WIDTH = None: None is not an integer"),
    ("WIDTH: int = 3", "WIDTH: int = 10**30", 5,
     f"WIDTH = {10**30}: {10**30} is too large; the maximum is {sys.maxsize}"),
    ("RATE: float | None = None", "RATE: float | None = 1e-3,", 6,
     "RATE = (0.001,): (0.001,) is not a number or None; remove the comma after 0.001"),
    ("RATE: float | None = None", "RATE = 0,1", 6,
     "RATE = (0, 1): (0, 1) is not a number or None; write a decimal point, 0.1"),
    ("RATE: float | None = None", "RATE: float | None = float('nan')", 6,
     "RATE = nan: nan is not a finite number"),
    ("SEED: int = 0", "SEED: int = -3", 11, "SEED = -3: -3 is negative; it must be 0 or more"),
])  # fmt: skip
def test_a_wrong_value_in_the_file_is_explained_with_its_line(
    script, capsys, old, new, line, message
):
    module = script((old, new), commit=True)
    assert error_of(capsys, module, []) == f"script.py, line {line}: {message}"


def test_edited_constants_are_known_as_flags(script):
    edits = (("WIDTH: int = 3", "WIDTH: int = 5"), ("ON: bool = True", "ON = False"),
             ("RATE: float | None = None", "RATE = 0.5"))  # fmt: skip
    module = script(*edits, commit=True)
    constants.override(module, ["--seed", "4", "--rate", "2"])
    assert constants.as_flags(constants.running.edited) == ["--width=5", "--no-on"]
    again = constants.override(script(), ["--seed", "4", "--rate", "2", "--width=5", "--no-on"])
    assert again == constants.override(module, ["--seed", "4", "--rate", "2"])


def test_an_imported_script_does_not_read_another_programs_arguments(script, monkeypatch):
    module = script()
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    assert constants.override(module) == DEFAULTS
    monkeypatch.setattr(sys, "argv", ["some/script.py", "--width", "8"])
    assert constants.override(module)["WIDTH"] == 8
