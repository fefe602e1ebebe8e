"""The texts of theory/ say what is computed; a changed number or comparison is caught."""

import _mutations
import _text
import pytest

SAMPLE = 60  # mutations per text; `python theory/_mutations.py` tries all of them
TEXT = "On digits 98.8 % of 359 images are right, more than on CIFAR-10 (Liu et al. 2021, table 3)."
SAID = {"test": "98.8 % of 359 images", "order": "right, more than on CIFAR-10"}


@pytest.mark.parametrize("script", _mutations.scripts(), ids=lambda script: script.stem)
def test_text_says_what_is_computed_and_mutations_are_caught(script):
    said, sources = _mutations.computed(script)
    tried, missed = _mutations.survivors(script, said, sources, SAMPLE)
    assert len(missed) <= 0.05 * len(tried), [(m.line, m.before, m.after) for m in missed]


def test_the_right_text_has_no_problems():
    assert _text.problems(TEXT, SAID, {}) == []


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("98.8", "98.9", "says 0 times"),
        ("359", "3590", "says 0 times"),
        ("98.8", "198.8", "says 0 times"),
        ("more", "fewer", "says 0 times"),
        ("(Liu", "98.8 % of 359 images (Liu", "says 2 times"),
        ("(Liu", "by 3 points (Liu", "no phrase of the script contains '3'"),
    ],
)
def test_a_changed_text_is_a_problem(before, after, complaint):
    found = _text.problems(TEXT.replace(before, after), SAID, {})
    assert any(complaint in problem for problem in found)


def test_years_places_and_names_are_the_only_exempt_numbers():
    found = [match.group() for match in _text.occurrences(TEXT, _text.NUMBER)]
    assert found == ["98.8", "359"]


def test_phrases_may_be_broken_across_lines():
    assert _text.problems(TEXT.replace("of 359", "of\n  359"), SAID, {}) == []


def test_check_fails_with_the_line_of_an_unexplained_number(tmp_path):
    (tmp_path / "text.md").write_text("# Title\n\nAbout 12 images.\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="line 3: no phrase of the script contains '12'"):
        _text.check(tmp_path / "text.py", {}, {})


def test_a_false_claim_is_not_said():
    assert _text.claim("a beats b", 2 > 1) == "a beats b"
    with pytest.raises(AssertionError, match="not true: 'a beats b'"):
        _text.claim("a beats b", 2 > 1, 1 > 2)


def test_mutations_change_every_digit_and_every_comparison():
    changed = [(m.before, m.after) for m in _mutations.mutations(TEXT)]
    assert changed == [
        ("98.8", "08.8"), ("98.8", "99.8"), ("98.8", "98.9"),
        ("359", "459"), ("359", "369"), ("359", "350"), ("more", "fewer"),
    ]  # fmt: skip
