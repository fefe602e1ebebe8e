"""The page shows its content offline, also in a real browser."""

import io
import json
import re
from base64 import b64encode
from functools import partial

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from lab.core.stats import wilson_interval
from lab.report.page import write_page

NASTY = (
    "a</script><b>bold</b><!--data--> & \"quotes\" 'n' \\ ü 🐈 \u202e\u05e9\u05dc $& {0} \u2028 "
)
NASTY += "x" * 300
TITLES = [
    "My runs", "All runs", "Learning curves", "Accuracy against cost", "Fine-tuning",
    "Data efficiency", "Confusion matrix", "The hardest test images", "Paired comparisons",
    "Calibration", "Sweeps", "Attention", "Folders with problems", "Details of each run",
]  # fmt: skip
HEAD = ("heading", "made", "summary", "provenance")  # plain HTML
CLASSES = ["cat", "dog", "European hedgehog"]
TRUTH, PREDICTED = (np.random.default_rng(seed).integers(0, 3, 90) for seed in (0, 1))
COUNTS = confusion_matrix(TRUTH, PREDICTED)
RUN = """{
  "folder": "results/train/run", "link": "train/run", "files": [], "kind": "ViT", "whole": true,
  "recipe": "12 epochs", "task": "From scratch", "reference": false, "state": "finished",
  "dataset": "pets", "model": "vit", "seed": 0, "test_set": 0, "test_images": 90,
  "val_accuracy": 0.9, "calibration_error": 0.05, "trained_parameters": 1290, "macs": 4e6,
  "seconds": 43.21, "images_per_second": 3100, "memory_mb": 640, "best_epoch": 3,
  "calibration": [[0.55, 0.5, 10], [0.9, 0.75, 80]], "command": "python train.py",
  "commit": "b7522a2", "uncommitted_changes": false, "started": "2026-11-22T08:00:00Z",
  "hardware": "2 cores", "versions": "Python 3.11", "notes": ["a note"]
}"""
CONTENT = """{
  "heading": "Every run", "made": "2026-11-22 09:00 UTC", "summary": ["First sentence.", "Second."],
  "provenance": "3 runs.", "title": "My runs", "significance": "No two models differ.",
  "cards": [{"title": "ViT from scratch", "run": 0, "accuracy": 0.7, "low": 0.6, "high": 0.8,
    "seeds": 1, "sentence": "It works.", "attention": null,
  "page": {"page": "attention_viz/x/attention.html", "live": true}},
    {"title": "CNN twin", "run": null, "command": "python cnn_baseline.py"}],
  "seeds": [{"name": "run", "task": "From scratch", "dataset": "pets", "mean": 0.672,
    "std": 0.0079, "runs": [0, 1]}],
  "test_sets": [{"name": "pets", "images": 90}],
  "comparisons": [{"reference": false, "test_set": 0, "attribution": "Photos: CC BY-SA 4.0.",
    "pairs": [{"a": 0, "b": 1, "only_a": 7, "only_b": 2, "p": 0.1796875, "p_holm": 0.54,
      "summary": "may be chance"}]}],
  "finetuning": [{"title": "vit on pets", "reference": false,
  "points": [
    {"run": 0, "label": "head", "trained": 1290, "accuracy": 0.7, "low": 0.65, "high": 0.8,
      "seeds": 1, "seconds": 22, "memory_mb": 971},
    {"run": 1, "label": "full", "trained": 2e6, "accuracy": 0.9, "low": 0.85, "high": 0.95,
      "seeds": 2, "seconds": 99, "memory_mb": 971}]}],
  "efficiency": [{"title": "pets", "reference": false,
  "summary": "More helps.", "series": [{"label": "ViT", "points": [
    {"run": 0, "fraction": 0.1, "images": 9, "accuracy": 0.5, "low": 0.4, "high": 0.6, "seeds": 1},
    {"run": 0, "fraction": 1, "images": 90, "accuracy": 0.9, "low": 0.8, "high": 1, "seeds": 1}
  ]}]}],
  "mode_files": [],
  "score_files": [{"name": "scores.md", "link": "a/scores.md", "reference": false}],
  "sweeps": [{"name": "digits", "reference": false, "link": "s", "files": [],
    "summary": "A paragraph.", "folder": "results/sweep", "best": 0,
    "columns": ["LEARNING_RATE", "AUTO_AUGMENT"], "trials": [
    {"number": 0, "state": "complete", "values": [1e-4, "none"], "val_accuracy": 1, "epochs": 9},
    {"number": 1, "state": "failed", "values": [null, "auto"], "val_accuracy": null, "epochs": 1}
  ]}],
  "attention": [{"title": "looks", "reference": false, "link": "l", "files": [], "page": null,
  "folder": "results/look", "summary": "It works."}],
  "left_out": [{"folder": "results/broken", "link": "broken", "reason": "no config.json"}]
}"""


def png(side):
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, format="png")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def run(number, epochs=12, **changes):
    low, high = wilson_interval(60 + number % 30, 90)
    curves = {"epoch": list(range(1, epochs + 1))}
    for place, name in enumerate(("train_loss", "val_loss", "train_accuracy", "val_accuracy")):
        values = np.random.default_rng([number, place]).random(epochs)
        curves[name] = (values * 0.9 + 0.05).tolist()
    own = {"id": number, "name": f"run{number}", "accuracy": (60 + number % 30) / 90, "low": low}
    own |= {"high": high, "parameters": 2000 * (1 + number), "curves": curves, "epochs": epochs}
    own["confusion"] = [[int(i), int(j), int(COUNTS[i, j])] for i, j in np.argwhere(COUNTS)]
    return json.loads(RUN) | own | changes


def content(runs=None, **changes):
    """Content with something in every section."""
    whole = json.loads(CONTENT)
    whole["runs"] = [run(0), run(1), run(2, reference=True)] if runs is None else runs
    shown = [{"source": png(40), "caption": "a plot", "link": "s/rate.png"}]
    whole["sweeps"][0]["plots"] = whole["attention"][0]["plots"] = shown
    answers = [
        {"run": i, "prediction": "dog", "confidence": 0.83, "correct": False} for i in (0, 1)
    ]
    hardest = {"image": "7", "label": "cat", "thumbnail": png(8)}
    whole["test_sets"][0] |= {"classes": CLASSES}
    hard = [hardest | {"answers": answers, "image": str(i)} for i in range(7, 16)]
    whole["comparisons"][0]["hardest"] = hard
    return whole | changes


def everything_named(value, name):
    """The content with all texts replaced, except images, states and tasks."""
    if isinstance(value, dict):
        kept = ("thumbnail", "source", "state", "task", "kind", "image")
        return {k: v if k in kept else everything_named(v, name) for k, v in value.items()}
    if isinstance(value, list):
        return [everything_named(part, name) for part in value]
    return name if isinstance(value, str) else value


def written(folder, whole):
    path = folder / "report.html"
    write_page(path, whole)
    return path


def data_in(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', text)[1])


# Without a browser


def test_page_contains_the_content(tmp_path):
    whole = content()
    packed = data_in(written(tmp_path, whole))
    assert packed == {k: v for k, v in whole.items() if k not in HEAD}


@pytest.mark.parametrize(
    "changes",
    [
        {"runs": [run(0), run(1, accuracy=float("nan"))]},
        {"runs": [run(0, curves={"val_loss": [1.0, float("inf")]})]},
        {"sweeps": [{"trials": [{"values": [-float("inf")]}]}]},
    ],
)
def test_numbers_that_are_not_finite_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="not JSON compliant"):
        written(tmp_path, content(**changes))
    assert not list(tmp_path.iterdir())


def test_page_refers_to_no_other_file_or_server(tmp_path):
    text = written(tmp_path, content()).read_text(encoding="utf-8")
    text = text.replace('"http://www.w3.org/2000/svg"', "")  # a namespace, which is not requested
    assert not re.search(r"https?:|@import|url\(|\beval\(|innerHTML|\bsrcset=", text)
    assert all(target == "data:," for target in re.findall(r'(?:href|src)="([^#"]+)"', text))


# In a browser


@pytest.fixture
def shown(visit, tmp_path):
    """Writes and opens a page."""

    def show(whole=None, width=1300, scheme="light"):
        return visit(written(tmp_path, content() if whole is None else whole), width, scheme)

    return show


def column(page, place, table="#runs table >> nth=1"):
    return page.locator(table).locator(f"tbody tr > :nth-child({place + 1})").all_text_contents()


def on_axis(figure, axis):
    """Reads an axis by its ticks: (function from pixels to values, whether it is logarithmic)."""
    ticks = figure.locator(f".tick-{axis}")
    texts = [text.replace(",", "") for text in ticks.all_text_contents()]
    powers = {"K": 1e3, "M": 1e6, "B": 1e9}
    values = np.array([float(text.rstrip("KMB")) * powers.get(text[-1], 1) for text in texts])
    places = ticks.evaluate_all(f"all => all.map(one => +one.getAttribute('{axis}'))")
    places = np.array(places) - (4 if axis == "y" else 0)  # text is drawn a little below its line
    assert len(values) >= 3
    for log in (False, True):
        with np.errstate(divide="ignore"):
            line = np.log10(values) if log else values
        if np.isfinite(line).all():
            fit = np.polyfit(places, line, 1)
            if abs(np.polyval(fit, places) - line).max() < 1e-6 * abs(line).max():
                return partial(value_at, fit, log), log
    raise AssertionError(f"neither linear nor logarithmic: {texts} at {places}")


def value_at(fit, log, place):
    value = np.polyval(fit, place)
    return 10**value if log else value


def numbers(text):
    return np.array([float(one) for one in re.findall(r"-?[\d.]+", text)])


def test_page_loads_every_section_without_requests(shown):
    page = shown()
    assert page.title() == page.locator("h1").text_content() == "Every run"
    assert page.locator("main h2").all_text_contents() == TITLES
    targets = page.locator("nav a").evaluate_all("all => all.map(one => one.hash.slice(1))")
    assert targets == page.locator("section").evaluate_all("all => all.map(one => one.id)")
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(one => +one.tagName[1])")
    assert levels[0] == 1
    assert max(np.diff(levels)) <= 1
    assert page.locator("img:not([alt]), svg:not([aria-label], [aria-hidden])").count() == 0


def test_page_without_runs_gives_advice(shown):
    empty = {"run": None, "title": "ViT from scratch", "command": "python train.py"}
    kept = (*HEAD, "title")
    page = shown(
        {key: value if key in kept else [] for key, value in content().items()}
        | {"cards": [empty], "significance": ""}
    )
    assert page.locator("main > section").count() == 1
    card = page.locator(".card").text_content()
    assert card == "ViT from scratchNo finished run yet. Start one withpython train.py"


def test_summary_is_readable_without_javascript(browser, tmp_path):
    page = browser.new_page(java_script_enabled=False)
    page.goto(written(tmp_path, content()).as_uri())
    assert page.locator(".summary li").all_text_contents() == ["First sentence.", "Second."]
    page.close()


def test_links_are_relative_and_the_live_page_has_a_button(shown):
    files = [{"name": "curves.png", "link": "train/run/curves.png"}]
    page = shown(content([run(0, files=files), run(1)]))
    assert page.locator("#actions .live").get_attribute("href") == "attention_viz/x/attention.html"
    assert page.locator(".card").get_by_text("curves.png").count() == 1
    scores = page.locator("#attention").get_by_role("link", name="scores.md")
    assert scores.get_attribute("href") == "a/scores.md"
    targets = page.locator("main a, header a").evaluate_all(
        "all => all.map(one => one.getAttribute('href'))"
    )
    assert [t for t in targets if ":" in t or t.startswith("/")] == []


def test_what_i_learned_and_the_theme_are_remembered(shown):
    page = shown()
    page.locator("textarea").fill("Patches are tokens.")
    page.locator("#scheme").click()
    page.reload()
    assert page.locator("textarea").input_value() == "Patches are tokens."
    assert page.locator("#scheme").text_content() == "Light mode"
    page.emulate_media(media="print")
    assert page.locator(".printed").text_content() == "Patches are tokens."
    assert page.locator(".printed").is_visible()


def test_hand_in_view_prints_on_two_pages(shown):
    page = shown(content([run(i) for i in range(40)]))
    page.locator("textarea").fill("word " * 360)
    page.get_by_role("button", name="Hand-in view").click()
    page.locator("#runs").wait_for(state="hidden")
    file = page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", file)) == 2


def test_game_shows_answers_only_after_a_guess(shown):
    page = shown()
    tile = page.locator("#hardest .tile").nth(0)
    assert "83" not in tile.text_content()
    tile.get_by_role("button", name="cat").click()
    assert tile.locator("li.right").text_content() == "✓\u00a0cat you"
    assert tile.locator("li.wrong").count() == 2
    low, _ = wilson_interval(1, 1)
    score = page.locator("#hardest .score").text_content()
    assert score.startswith(f"Your score: 1 of 1, 100\u00a0% (95 % interval {100 * low:.0f} to")
    page.get_by_role("button", name="Show all answers").click()
    assert page.locator("#hardest button:visible").count() == 0


def test_game_without_images_only_shows_the_answers(shown):
    whole = content()
    for one in whole["comparisons"][0]["hardest"]:
        one["thumbnail"] = None
    page = shown(whole)
    assert page.locator("#hardest .tile li.wrong").count() == 2 * 9
    assert page.locator("#hardest button").count() == 0


def test_targets_are_at_least_24_pixels_high(shown):
    page = shown(width=390)
    found = page.locator("main button, main summary, main select, main label, #actions > *")
    heights = found.evaluate_all(
        "all => all.filter(one => one.checkVisibility()).map(one =>"
        " one.getBoundingClientRect().height)"
    )
    assert len(heights) > 30
    assert min(heights) >= 24


def test_tables_sort_with_missing_values_last(shown):
    values = [0.5, None, 0.099, 0.97]
    names = ["run10", "run9", "Änne", "run1"]
    runs = [
        run(i, name=n, accuracy=a, state="finished" if a else "stopped")
        for i, (n, a) in enumerate(zip(names, values, strict=True))
    ]
    page = shown(content(runs))
    heads = page.locator("#runs table >> nth=1").locator("thead th")
    accuracy = heads.nth(2)
    accuracy.locator("button").click()
    assert [text[:5] for text in column(page, 2)] == ["97.00", "50.00", "9.90 ", "\u2013"]
    assert accuracy.get_attribute("aria-sort") == "descending"  # the best first
    accuracy.locator("button").press("Enter")
    assert [text[:5] for text in column(page, 2)] == ["9.90 ", "50.00", "97.00", "\u2013"]
    assert accuracy.get_attribute("aria-sort") == "ascending"
    heads.nth(0).locator("button").press("Space")
    assert column(page, 0) == ["Änne", "run1", "run9stopped", "run10"]
    assert accuracy.get_attribute("aria-sort") is None


def test_own_runs_come_first_and_references_are_marked(shown):
    page = shown(content([run(0, reference=True), run(1)]))
    assert "run0" not in page.locator("#runs").text_content()
    page.get_by_label("Show reference runs").check()
    assert column(page, 0) == ["run1", "run0reference"]
    page.locator("#runs table >> nth=1").get_by_role("link", name="run0").click()
    page.locator("#run-0 dl").wait_for()
    assert "python train.py" in page.locator("#run-0 code").text_content()
    assert page.locator("#run-1 dl").is_hidden()


def test_many_runs_are_folded_and_filtered(shown):
    runs = [run(i, task="Sweep a" if i < 31 else "Fine-tuning") for i in range(34)]
    page = shown(content(runs))
    assert page.locator("#runs details").count() == 1
    assert page.locator("#runs details table").is_hidden()
    checked = page.locator("#curves input:checked").locator("xpath=..").all_text_contents()
    assert checked == ["run31", "run32", "run33"]
    page.locator("#runs").get_by_label("Filter by name").fill("sweep RUN3")
    rows = page.locator("#runs tbody tr:visible th").all_text_contents()
    assert [name for name in rows if name != "run"] == ["run3", "run30"]


def test_checkboxes_hide_curves(shown):
    page = shown()
    page.get_by_label("Show reference runs").check()
    curves = page.locator("#curves figure > svg .line")
    assert curves.count() == 3
    before = curves.nth(1).get_attribute("style")
    page.locator("#curves").get_by_label("run0").uncheck()
    assert curves.count() == 2
    assert curves.nth(0).get_attribute("style") == before  # a run keeps its color
    legend = page.locator("#curves .legend li").all_text_contents()
    assert legend == ["run1", "run2 (reference)"]
    page.locator("#curves").get_by_role("button", name="Uncheck all").click()
    assert curves.count() == 0


@pytest.mark.parametrize(
    ("quantity", "log"), [("val_accuracy", False), ("val_loss", False), ("val_loss", True)]
)
def test_curves_are_drawn_at_their_values(shown, quantity, log):
    losses = {"epoch": [1, 2, 4, 9], "val_loss": [2.5, None, 0.011, 0.5]}
    one = run(0, curves=losses | {"val_accuracy": [0.25, 0.5, None, 0.9]})
    page = shown(content([one, run(1)]))
    page.get_by_label("Quantity").select_option(quantity)
    if log:
        page.get_by_label("logarithmic").check()
    figure = page.locator("#curves figure > svg")
    (to_x, x_log), (to_y, y_log) = on_axis(figure, "x"), on_axis(figure, "y")
    assert (x_log, y_log) == (False, log)
    drawn = numbers(figure.locator(".line").nth(0).get_attribute("d")).reshape(-1, 2)
    values = one["curves"][quantity]
    wanted = [(x, y) for x, y in zip(losses["epoch"], values, strict=True) if y is not None]
    assert to_x(drawn[:, 0]) == pytest.approx([x for x, _ in wanted], abs=0.02)
    heights = np.array([y for _, y in wanted]) * (1 if quantity == "val_loss" else 100)
    pixel = {"rel": 0.01} if y_log else {"abs": 0.002 * heights.max()}
    assert to_y(drawn[:, 1]) == pytest.approx(heights, **pixel)


def test_points_and_error_bars_are_drawn_at_their_values(shown):
    page = shown()
    figure = page.locator("#finetuning figure > svg")
    (to_x, x_log), (to_y, y_log) = on_axis(figure, "x"), on_axis(figure, "y")
    assert (x_log, y_log) == (True, False)
    places = figure.locator(".point").evaluate_all("all => all.map(p => p.outerHTML)")
    points = np.array([numbers(re.search(r"translate\((.*?)\)", one)[1]) for one in places])
    assert to_x(points[:, 0]) == pytest.approx([1290, 2e6], rel=1e-6)
    assert to_y(points[:, 1]) == pytest.approx([70, 90])
    _, low, _, _, high, *_ = numbers(figure.locator(".bar").nth(0).get_attribute("d"))
    assert to_y([low, high]) == pytest.approx([65, 80])
    assert figure.locator(".label").all_text_contents() == ["head", "full"]
    assert column(page, 3, "#finetuning table") == ["1", "2"]  # seeds
    heads = page.locator("#finetuning th", has_text="interval or ± std")
    assert heads.count() == 1


def test_readout_follows_keyboard_and_pointer(shown):
    page = shown()
    figure = page.locator("#calibration figure > svg").nth(0)
    reading = page.locator("#calibration .reading").nth(0)
    figure.press("ArrowRight")
    figure.press("ArrowRight")
    low, high = wilson_interval(60, 80)
    readout = f"accuracy 75.00\u00a0% ({100 * low:.1f} to {100 * high:.1f})"
    readout += ", mean confidence 90.00\u00a0%, 80 images"
    assert reading.text_content() == f"run0: {readout}"
    figure.press("ArrowDown")
    assert reading.text_content() == f"run1: {readout}"
    page.locator("#calibration figure .point").nth(0).hover(force=True)  # other points cover it
    assert "50.00" in reading.text_content()
    assert "10 images" in reading.text_content()


def test_confusion_matrix_equals_scikit_learn(shown):
    page = shown(content([run(0, confusion=[[0, 0, 1]]), run(1)]))
    page.locator("#confusion select").select_option("run1")
    rows = page.locator("#confusion tbody tr")
    cells = [rows.nth(i).locator("td").all_text_contents() for i in range(3)]
    assert np.array_equal([[int(text or 0) for text in row] for row in cells], COUNTS)
    assert page.locator("#confusion tbody th").all_text_contents() == CLASSES
    rows.nth(2).locator("td").nth(1).hover()
    count, total = COUNTS[2, 1], COUNTS[2].sum()
    readout = page.locator("#confusion .reading").text_content()
    share = f"{100 * count / total:.1f}\u00a0%"
    assert readout == f"true European hedgehog, predicted dog: {count} of {total} ({share})"


def test_pairs_and_hardest_images_show_their_content(shown):
    page = shown()
    row = page.locator("#pairs tbody tr > *").all_text_contents()
    assert row == ["vit (12 epochs)", "vit (12 epochs)", "7", "2", "0.18", "0.54", "may be chance"]
    first = page.locator("#hardest .tile").nth(0)
    assert first.locator("button").all_text_contents() == CLASSES
    first.locator("button").nth(1).click()
    image = first.locator("img.pixels[alt='test image 7, true class cat']")  # once it is loaded
    assert image.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"


@pytest.mark.parametrize("width", [320, 390])
def test_markup_in_records_is_shown_as_text_and_fits_a_phone(shown, width):
    lone = "\udce9"
    whole = everything_named(content(), NASTY + lone)
    page = shown(whole, width=width)
    assert page.locator("b").count() == 0
    assert NASTY in page.locator("h1").text_content()
    for section in page.locator("section").all():
        assert NASTY in section.text_content()
    for place in ("#confusion option >> nth=0", "#curves .legend li >> nth=0", "#run-0 code"):
        assert page.locator(place).text_content().startswith(NASTY)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_colors_have_contrast_in_both_schemes(shown, scheme):
    page = shown(scheme=scheme)
    pairs = page.evaluate("""() => [...document.querySelectorAll("body *")].flatMap((one) => {
      const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
      if (!own || !one.checkVisibility()) return [];
      let below = one;
      const ground = () => getComputedStyle(below).backgroundColor;
      while (ground() === "rgba(0, 0, 0, 0)") below = below.parentNode;
      const style = getComputedStyle(one);
      const ink = one instanceof SVGElement ? style.fill : style.color;
      return [[ink, ground()]];
    })""")
    strokes = "all => all.map(one => getComputedStyle(one).stroke)"
    marks = page.locator(".legend path").evaluate_all(strokes)
    ground = "getComputedStyle(document.body).backgroundColor"
    paper = page.evaluate(ground)

    def luminance(color):
        parts = numbers(color)[-3:] / (1 if color.startswith("color(") else 255)
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    assert len(pairs) > 300
    assert (luminance(paper) < 0.1) == (scheme == "dark")
    assert min(contrast(*pair) for pair in set(map(tuple, pairs))) >= 4.5
    assert min(contrast(mark, paper) for mark in marks) >= 3
    page.locator("#scheme").click()
    assert (luminance(page.evaluate(ground)) < 0.1) == (scheme == "light")


def test_printed_page_has_every_section_and_the_details_of_own_runs(shown):
    page = shown(scheme="dark")
    file = page.pdf(prefer_css_page_size=True, tagged=True, outline=True)
    titles = [one.decode("latin-1") for one in re.findall(rb"/Title \((.*?)\)", file)]
    assert [title for title in titles if title in TITLES] == TITLES
    page.locator("#scheme").click(click_count=2)  # dark chosen by the user, not by the system
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(33, 36, 42)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert [page.locator(f"#run-{i} dl").is_visible() for i in range(3)] == [True, True, False]
    assert page.locator("nav, fieldset, #scheme, .reading").evaluate_all(
        "all => all.every(one => !one.checkVisibility())"
    )
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 without its margins
    wide = "all => Math.max(...all.map(one => one.getBoundingClientRect().right))"
    assert page.locator("table, svg, img").evaluate_all(wide) <= 703
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("#run-0 dl").is_hidden()


def test_a_thousand_runs_fit_in_10_megabytes(shown, tmp_path):
    page = shown(content([run(i, epochs=100, task=f"task {i % 5}") for i in range(1000)]))
    assert (tmp_path / "report.html").stat().st_size < 10e6
    assert page.locator("#runs tbody tr").count() == 1001
    assert page.locator("#curves figure > svg .line").count() == 6
