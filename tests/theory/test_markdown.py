"""All Markdown files render on GitHub as they were meant: links, tables, lists and formulas."""

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin

ROOT = Path(__file__).resolve().parents[2]
PARSER = MarkdownIt("gfm-like").use(dollarmath_plugin, allow_space=False, double_inline=True)
PUNCTUATION_AFTER_BACKSLASH = re.compile(r"\\[^A-Za-z\s]")


def markdown_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).exists()]


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_renders_as_meant(path):
    assert defects(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("text", "defect"),
    [
        ("grows by (ln 16\n- ln 8) / ln 8", "a list interrupts a sentence"),
        ("- grows by (ln 16\n  - ln 8) / ln 8", "a list interrupts a sentence"),
        ("| a | b |\n|---|\n| 1 | 2 |", "a table is shown as text"),
        ("| a | b |\n|---|---|\n| 1 | 2 | 3 |", "3 cells under 2 headers"),
        ("| a | b |\n|---|---|\n| 1 |", "1 cells under 2 headers"),
        ("[text](missing.md)", "no such file: missing.md"),
        ("[text](README.md#no-such-heading)", "no heading"),
        ("[text](#no-such-heading)", "no heading"),
        ("costs $ x$ more", "a lone $"),
        ("the set $\\{1\\}$", "loses its backslash"),
        ("$$\na = \\frac{1}{2\n$$", "unbalanced braces"),
        ("$a =$", "ends with"),
        ("```math\na = \\sqrt{2\n```", "unbalanced braces"),
        ("a (b c", "unbalanced parentheses"),
    ],
)
def test_defects_are_found(text, defect, tmp_path):
    (tmp_path / "README.md").write_text("# Heading\n", encoding="utf-8")
    found = defects(text, tmp_path / "text.md")
    assert any(defect in message for message in found), found


def test_a_sound_text_has_no_defects(tmp_path):
    text = (
        "# Heading, with `code`\n\nLink to [here](#heading-with-code), $a_1 = \\frac{1}{2}$:\n\n"
        "- one (a | b)\n- two\n\n| a | `b \\| c` |\n|---|---|\n| $x$ | 2 |\n\n"
        "```math\na = \\{1, 2\\}\n```\n\n    a = (\n\n```\n$OUT (\n```\n"
    )
    path = tmp_path / "text.md"
    path.write_text(text, encoding="utf-8")
    assert defects(text, path) == []


def defects(text: str, path: Path) -> list[str]:
    """What GitHub would render differently from what the author meant."""
    tokens = PARSER.parse(text)
    lines = text.splitlines()
    found = [*_broken_lists(tokens, lines), *_broken_tables(tokens, lines)]
    for token in tokens:
        where = f"line {token.map[0] + 1}" if token.map else "?"
        if token.type == "inline":
            found += [f"{where}: {problem}" for problem in _inline_defects(token, path)]
        elif token.type == "fence" and token.info.strip() == "math":
            found += [f"{where}: {problem}" for problem in _formula_defects(token.content)]
        elif token.type.startswith("math_block"):
            found += [f"{where}: {p}" for p in _formula_defects(token.content, escapes=True)]
    return found


def _broken_lists(tokens: list[Token], lines: list[str]) -> list[str]:
    """Lists that start in the middle of a sentence, such as a line that begins with a minus."""
    found, end_of_paragraph = [], None
    for token in tokens:
        if token.type == "paragraph_open":
            end_of_paragraph = token.map[1]
        elif token.type in ("bullet_list_open", "ordered_list_open"):
            start = token.map[0]
            if start == end_of_paragraph and not lines[start - 1].rstrip().endswith(
                (".", ":", "`")
            ):
                found.append(f"line {token.map[0] + 1}: a list interrupts a sentence")
    return found


def _broken_tables(tokens: list[Token], lines: list[str]) -> list[str]:
    found = []
    for number, token in enumerate(tokens):
        if token.type == "paragraph_open" and tokens[number + 1].content.lstrip().startswith("|"):
            found.append(f"line {token.map[0] + 1}: a table is shown as text")
        if token.type == "table_open":
            start, end = token.map
            columns = _cells(lines[start])
            for row in range(start, end):
                if (cells := _cells(lines[row])) != columns:
                    found.append(f"line {row + 1}: {cells} cells under {columns} headers")
    return found


def _cells(row: str) -> int:
    return len(re.split(r"(?<!\\)\|", row.strip().strip("|")))


def _inline_defects(token: Token, path: Path) -> list[str]:
    found, words = [], ""
    for child in token.children or []:
        if child.type in ("text", "html_inline"):
            words += child.content if child.type == "text" else ""
        elif child.type == "link_open":
            found += _link_defects(child.attrGet("href"), path)
        elif child.type == "image":
            found += _link_defects(child.attrGet("src"), path)
        elif child.type.startswith("math"):
            formula = child.content
            fenced = formula.startswith("`") and formula.endswith("`")
            found += _formula_defects(formula.strip("`"), escapes=not fenced)
    if "$" in words:
        found.append(f"a lone $: {words!r}")
    if words.count("(") != words.count(")") and not re.search(r"[:;]-?\)", words):
        found.append(f"unbalanced parentheses, perhaps a truncated formula: {words!r}")
    return found


def _formula_defects(formula: str, escapes: bool = False) -> list[str]:
    """Args: escapes: whether Markdown sees the formula first and removes backslashes."""
    found = []
    plain = formula.replace("\\{", "").replace("\\}", "").replace("\\left.", "")
    if plain.count("{") != plain.count("}"):
        found.append(f"unbalanced braces: {formula!r}")
    if plain.count("\\left") - plain.count("\\leftarrow") != plain.count("\\right") - plain.count(
        "\\rightarrow"
    ):
        found.append(f"\\left without \\right: {formula!r}")
    if not formula.strip() or re.search(r"(?:=|\+|-|\\cdot|\\times|\\frac|\^|_)\s*$", formula):
        found.append(f"the formula ends with an operator: {formula!r}")
    if escapes and PUNCTUATION_AFTER_BACKSLASH.search(formula):
        found.append(f"GitHub loses its backslash; write $`...`$ or ```math: {formula!r}")
    return found


def _link_defects(link: str, path: Path) -> list[str]:
    if re.match(r"[a-z]+:", link):
        return []
    target, _, anchor = unquote(link).partition("#")
    file = path.parent / target if target else path
    if not file.exists() and target:
        return [f"no such file: {target}"]
    if anchor and file.suffix == ".md":
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if anchor not in _anchors(text):
            return [f"no heading #{anchor} in {file.name}"]
    return []


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    tokens, found = PARSER.parse(text), []
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            title = "".join(child.content for child in tokens[number + 1].children or [])
            slug = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
            found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)
