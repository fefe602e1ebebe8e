"""The page shows the maps it was given, without a network; also in a real browser."""

import io
import json
import re
from base64 import b64decode
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image

from lab.attention.pages import write_maps_page
from lab.attention.plots import AttentionExample

TABLE = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3].astype(int)
NASTY = "a</script><b>bold</b><!--data--> & \"quotes\" 'n' \\ ü 猫 $& {0} \u2028"


def example(seed=0, side=224, shapes=((6, 16, 16),) * 12, methods=("rollout",), **changes):
    """An image of noise with maps of noise; `shapes` are (heads, rows, columns) of the blocks."""
    rng = np.random.default_rng(seed)
    fields = {
        "pixels": rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
        "name": f"image {seed}",
        "label": None,
        "prediction": None,
        "confidence": 0,
        "correct": True,
        "raw": [rng.random(shape) * 0.02 for shape in shapes],
        "maps": {name: rng.random((16, 16)) for name in methods},
    }
    return AttentionExample(**(fields | changes))


def small(seed=0, **changes):
    """An image of 8 x 8 pixels with 4 blocks of 4 heads and 2 x 2 values."""
    return example(seed, side=8, shapes=((4, 2, 2),) * 4, **changes)


def written(folder, *images, heading="heading", notes=("a note",)):
    path = folder / "attention.html"
    write_maps_page(path, heading, list(notes), list(images))
    return path


class Elements(HTMLParser):
    """All elements of a page with their attributes, and the text in each kind of element."""

    def __init__(self, path):
        super().__init__()
        self.found, self.text, self.open = [], {}, "none"
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data):
        self.text[self.open] = self.text.get(self.open, "") + data


def data_in(path):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    return json.loads(found[1])


def decoded(stack):
    """The maps (count, rows, columns) of a stack, and the largest possible rounding error."""
    values = np.frombuffer(b64decode(stack["values"]), np.uint8)
    values = values.reshape(-1, stack["rows"], stack["columns"])
    low, high = (np.array(stack[key])[:, None, None] for key in ("low", "high"))
    return low + values / 255 * (high - low), (high - low) / 255 / 2 + 1e-12


def levels(one):
    """A map as the bytes 0 to 255 that select its colors."""
    return np.round((one - one.min()) / (one.max() - one.min()) * 255).astype(int)


# Without a browser.


def test_data_decodes_back_to_the_maps(tmp_path):
    image = example(shapes=((3, 8, 4), (6, 4, 2)), methods=("rollout", "other"))
    (packed,) = data_in(written(tmp_path, image))["images"]
    assert len(packed["blocks"]) == 2
    for stack, maps in zip(packed["blocks"], image.raw, strict=True):
        values, error = decoded(stack)
        wanted = np.concatenate([maps.mean(0, keepdims=True), maps])
        assert values.shape == wanted.shape
        assert (abs(values - wanted) <= error).all()
        assert stack["low"] == wanted.min((1, 2)).tolist()
        assert stack["high"] == wanted.max((1, 2)).tolist()
    assert list(packed["others"]) == ["rollout", "other"]
    for name, one in image.maps.items():
        values, error = decoded(packed["others"][name])
        assert (abs(values[0] - one) <= error[0]).all()
    pixels = Image.open(io.BytesIO(b64decode(packed["picture"].partition(",")[2])))
    assert np.array_equal(np.asarray(pixels), image.pixels)


def test_flat_and_float32_maps_are_kept(tmp_path):
    image = small(raw=[np.full((2, 3, 3), 0.25, np.float32)])
    with np.errstate(all="raise"):  # such as division by zero
        (packed,) = data_in(written(tmp_path, image))["images"]
    assert np.array_equal(decoded(packed["blocks"][0])[0], np.full((3, 3, 3), 0.25))


def test_hostile_text_adds_no_element(tmp_path):
    plain = Elements(written(tmp_path, small()))
    hostile = small(name=NASTY, maps={NASTY: np.eye(2)})
    path = written(tmp_path, hostile, heading=NASTY, notes=[NASTY])
    nasty = Elements(path)
    assert [tag for tag, _ in nasty.found] == [tag for tag, _ in plain.found]
    assert NASTY in nasty.text["h1"]
    assert NASTY in nasty.text["title"]
    assert NASTY in nasty.text["p"]
    (packed,) = data_in(path)["images"]
    assert packed["title"] == NASTY
    assert list(packed["others"]) == [NASTY]


def test_file_name_that_is_not_utf8_is_written(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    path = written(tmp_path, small(name=name), heading=name)
    assert "<h1>caf?.jpg</h1>" in path.read_text(encoding="utf-8")


def test_page_with_eight_images_stays_below_3_megabytes(tmp_path):
    # Noise compresses worst, so photographs are smaller
    images = [example(seed, shapes=((12, 16, 16),) * 12) for seed in range(8)]
    assert written(tmp_path, *images).stat().st_size < 3e6


def test_page_refers_to_no_other_file_or_server(tmp_path):
    path = written(tmp_path, example())
    text = path.read_text(encoding="utf-8")
    text = text.replace('"http://www.w3.org/2000/svg"', "")  # a namespace, not a request
    assert not re.search(r"https?:|@import|url\(|\beval\(", text)
    for tag, attributes in Elements(path).found:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        ([small(raw=[], maps={}, name="bare")], "'bare' has no maps"),
        ([small(raw=[np.full((1, 2, 2), np.nan)], name="gap")], "'gap': a map contains NaN"),
    ],
)
def test_images_that_cannot_be_shown_are_rejected(tmp_path, images, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, *images)
    assert not list(tmp_path.iterdir())


# In a browser.


@pytest.fixture
def shown(visit, tmp_path):
    """Writes and opens a page, and waits until it shows a map."""

    def show(*images, width=1300, **texts):
        page = visit(written(tmp_path, *images, **texts), width)
        page.locator("#methods input:checked").wait_for()
        return page

    return show


def pixels(page, selector="#overlay"):
    """The pixels of a canvas: int (height, width, 3)."""
    # as a file, because Chromium warns about reading a canvas repeatedly
    address = page.locator(selector).evaluate("canvas => canvas.toDataURL('image/png')")
    file = io.BytesIO(b64decode(address.partition(",")[2]))
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def slide(page, name, fraction):
    """Clicks on a slider at a fraction of its width."""
    box = page.locator(f"#{name}").bounding_box()
    x = box["x"] + 2 + fraction * (box["width"] - 4)
    page.mouse.click(x, box["y"] + box["height"] / 2)


def centers(one, side):
    """The pixels at the centers of the squares of a map, in an image of `side` pixels."""
    return np.ix_(*(((np.arange(n) + 0.5) * side / n).astype(int) for n in one.shape))


def label(page, name):
    return page.locator(f"#{name}-label").text_content()


def test_page_loads_from_a_file_without_other_requests(shown):
    page = shown(example(), heading="What the ViT sees", notes=["First note.", "Second."])
    assert page.title() == "What the ViT sees"
    assert page.locator("h1").text_content() == "What the ViT sees"
    assert page.locator(".notes p").all_text_contents() == ["First note.", "Second."]
    assert label(page, "block") == "block 12 of 12"  # it opens at the last block
    assert label(page, "head") == "mean of all heads"
    assert pixels(page).std() > 10


def test_pixels_equal_a_calculation_in_numpy(shown):
    image = example(shapes=((2, 16, 16), (3, 7, 5)))
    page = shown(image)
    slide(page, "opacity", 1)
    slide(page, "block", 1)
    page.locator("#head").press("End")
    assert page.locator("#shown").text_content() == "block 2 of 2, head 3 of 3"
    one = image.raw[1][2]
    drawn = pixels(page)
    assert np.array_equal(drawn[centers(one, len(drawn))], TABLE[levels(one)])
    page.get_by_label("rollout").check()
    one = image.maps["rollout"]
    assert np.array_equal(pixels(page)[centers(one, len(drawn))], TABLE[levels(one)])


def test_opacity_blends_image_and_map(shown):
    gray = np.random.default_rng(3).integers(0, 256, (8, 8, 1), dtype=np.uint8).repeat(3, 2)
    colorful = small(1)
    page = shown(small(pixels=gray), colorful)
    slide(page, "opacity", 0.5)
    share = int(page.locator("#opacity").input_value()) / 100
    assert 0.4 < share < 0.6
    over = TABLE[levels(small().raw[-1].mean(0))].repeat(4, 0).repeat(4, 1)  # (8, 8, 3)
    drawn = pixels(page)
    whole = centers(gray[..., 0], len(drawn))
    # a gray image cannot lose color, so the result is a plain mix
    assert abs(drawn[whole] - (gray * (1 - share) + over * share)).max() <= 2
    page.locator("#thumbnails button").nth(1).click()
    slide(page, "opacity", 0)
    assert label(page, "opacity") == "0\u00a0%"
    times = len(drawn) // 8
    assert np.array_equal(pixels(page), colorful.pixels.repeat(times, 0).repeat(times, 1))


def test_smoothing_interpolates_values_not_colors(shown):
    ramp = np.array([[0.0, 1.0]])
    page = shown(small(raw=[ramp[None]]))
    slide(page, "opacity", 1)
    assert len(np.unique(pixels(page)[300], axis=0)) == 2
    page.get_by_label("smooth").check()
    row = pixels(page)[300]
    width = len(row)
    place = (np.arange(width) + 0.5) * 2 / width - 0.5
    wanted = np.interp(place, [0, 1], [0, 255])
    nearest = abs(row[:, None] - TABLE[None]).sum(-1)
    assert (nearest.min(1) == 0).all(), "a color that is not in the color map"
    assert abs(nearest.argmin(1) - wanted).max() <= 0.501  # the nearest color


def test_block_slider_changes_the_map(shown):
    page = shown(example())
    before = pixels(page)
    slide(page, "block", 0)
    assert label(page, "block") == "block 1 of 12"
    assert page.locator("#block").get_attribute("aria-valuetext") == "block 1 of 12"
    assert not np.array_equal(pixels(page), before)


def test_arrow_key_changes_the_head(shown):
    page = shown(example())
    before = pixels(page)
    page.locator("#head").press("ArrowRight")
    assert label(page, "head") == "head 1 of 6"
    assert not np.array_equal(pixels(page), before)


def test_head_is_clamped_in_a_block_with_fewer_heads(shown):
    page = shown(example(shapes=((8, 4, 4), (3, 2, 2))))
    slide(page, "block", 0)
    page.locator("#head").press("End")
    assert label(page, "head") == "head 8 of 8"
    slide(page, "block", 1)
    assert label(page, "head") == "head 3 of 3"
    assert page.locator("#head").input_value() == "3"


def test_method_changes_the_example(shown):
    page = shown(example(methods=("rollout", "gradient rollout")))
    seen = [pixels(page)]
    for name in ("rollout", "gradient rollout"):
        page.get_by_label(name, exact=True).click()
        assert page.locator("#shown").text_content() == name
        assert page.locator("#block").is_disabled()
        seen.append(pixels(page))
    assert not any(np.array_equal(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    page.get_by_label("attention of one block").click()
    assert np.array_equal(pixels(page), seen[0])
    assert page.locator("#block").is_enabled()


def test_overview_cell_sets_both_sliders(shown):
    image = example()
    page = shown(image)
    page.get_by_label("rollout").check()
    page.get_by_role("button", name="block 5, head 3", exact=True).click()
    assert page.locator("#block").input_value() == "5"
    assert page.locator("#head").input_value() == "3"
    assert page.get_by_label("attention of one block").is_checked()
    chosen = page.locator("#cells [aria-pressed=true]")
    assert chosen.count() == 1
    assert chosen.get_attribute("aria-label") == "block 5, head 3"
    one = image.raw[4][2]
    assert np.array_equal(pixels(page, "#cells [aria-pressed=true] canvas"), TABLE[levels(one)])
    chosen.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#shown").text_content() == "block 6 of 12, head 2 of 6"
    assert page.evaluate("document.activeElement.ariaLabel") == "block 6, head 2"


def test_range_of_the_map_is_shown(shown):
    one = np.array([[0.0125, 0.25], [0.1, 0.2]])
    page = shown(small(raw=[one[None]], maps={"Grad-CAM": one * 4}))
    range_text = page.locator("#range")
    assert "minimum 1.25\u00a0%, maximum 25\u00a0% of the attention" in range_text.text_content()
    assert page.locator("#lowest").text_content() == "1.25\u00a0%"
    page.get_by_label("Grad-CAM").check()
    assert "minimum 0.05, maximum 1." in range_text.text_content()
    assert page.locator("#highest").text_content() == "1"


def test_thumbnail_selects_the_image_and_shows_if_it_is_correct(shown):
    images = [small(0), small(1, correct=False), small(2, correct=None)]
    page = shown(*images)
    buttons = page.locator("#thumbnails button")
    assert buttons.all_text_contents() == ["✓ correct", "✗ wrong", ""]
    assert page.locator("#title").text_content() == "image 0 ✓ correct"
    slide(page, "block", 1)
    slide(page, "opacity", 1)
    page.get_by_role("button", name="image 1, wrong").click()
    assert page.locator("#title").text_content() == "image 1 ✗ wrong"
    assert page.locator("#thumbnails [aria-pressed=true]").all_text_contents() == ["✗ wrong"]
    one = images[1].raw[3].mean(0)  # the block stays selected
    drawn = pixels(page)
    assert np.array_equal(drawn[centers(one, len(drawn))], TABLE[levels(one)])
    assert page.locator("#picture").get_attribute("alt").startswith("image 1")


def test_page_without_blocks_hides_the_sliders(shown):
    page = shown(small(raw=[], maps={"Grad-CAM": np.eye(7)}))
    for name in ("layer", "block", "head", "overview"):
        assert page.locator(f"#{name}").is_hidden()
    assert page.locator("#opacity").is_visible()
    assert page.locator("#methods label").all_text_contents() == ["Grad-CAM"]
    assert page.locator("#shown").text_content() == "Grad-CAM"
    assert pixels(page).std() > 10


def test_image_without_the_selected_method_shows_another_one(shown):
    page = shown(small(), small(1, raw=[], maps={"Grad-CAM": np.eye(7)}))
    page.locator("#thumbnails button").nth(1).click()
    assert page.locator("#shown").text_content() == "Grad-CAM"
    assert page.get_by_label("rollout").is_disabled()
    assert page.get_by_label("attention of one block").is_disabled()
    page.locator("#thumbnails button").nth(0).click()
    assert page.locator("#shown").text_content() == "block 4 of 4, mean of all heads"


def test_hostile_title_shows_as_text(shown):
    page = shown(small(name=NASTY), heading=NASTY)
    assert page.locator("#title").text_content().startswith(NASTY)
    assert page.locator("b").count() == 0


@pytest.mark.parametrize("heads", [1, 6, 24])
def test_phone_needs_no_horizontal_scrolling(shown, heads):
    title = "a_file_name_without_a_single_break_" * 4
    images = [example(seed, shapes=((heads, 16, 16),) * 3, name=title) for seed in range(8)]
    page = shown(*images, width=360, heading=title, notes=[title])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#overlay").bounding_box()["width"] > 300


def test_small_images_are_pixelated_and_photographs_are_smooth(shown):
    page = shown(small(), example(1))
    rendering = "element => getComputedStyle(element).imageRendering"
    assert page.locator("#picture").evaluate(rendering) == "pixelated"
    page.locator("#thumbnails button").nth(1).click()
    assert page.locator("#picture").evaluate(rendering) == "auto"
