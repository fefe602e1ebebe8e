"""The quiz is one page without network that does not give the answers away."""

import json
import re

import broken_recipes


def test_quiz_holds_every_curve_and_no_accuracy(tmp_path, monkeypatch):
    monkeypatch.setattr(broken_recipes, "ROOT", tmp_path)
    monkeypatch.setattr(broken_recipes, "QUIZ", tmp_path / "results" / "quiz.html")
    template = tmp_path / "theory" / "_quiz.html"
    template.parent.mkdir()
    source = broken_recipes.RECORDS.parent / "_quiz.html"
    template.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    broken_recipes.quiz()
    page = broken_recipes.QUIZ.read_text(encoding="utf-8")
    curves = json.loads(re.search(r"const curves = (\[.*\]);", page).group(1))
    assert {curve["mistake"] for curve in curves} == set(broken_recipes.TITLES.values())
    assert all(curve.keys() == {"mistake", "train", "test"} for curve in curves)
    assert "accuracy" not in page
    assert not re.search(r"(?:src|href)=|https?://|fetch\(|@import", page)
