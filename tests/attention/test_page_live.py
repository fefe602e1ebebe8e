"""The page that runs a small ViT in the browser: its numbers are PyTorch's, and it reacts."""

import io
import json
import re
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lab.attention import attention_maps, pages, saliency
from lab.attention.pages import LiveContent, runs_in_browser, write_live_page
from lab.attention.plots import AttentionExample
from lab.core import Run, UserError, checkpoints
from lab.data import Preprocess, load_data
from lab.data.images import square
from lab.training.snapshots import save_snapshot
from model import VisionTransformer, ViTConfig

TINY = ViTConfig(img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=16, depth=2,
                 num_heads=2, mlp_ratio=2.0)  # fmt: skip
NASTY = "a</script><b>bold</b><!--data--> & \"quotes\" 'n' $& {0} \u2028"


def random_model(config=TINY):
    """A ViT whose weights are large enough that attention and logits vary."""
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not re.search(r"norm\d?\.weight", name):
                value.normal_(std=0.2)
            value.copy_(value.half())  # as the page stores them, so that only arithmetic differs
    return model


def example(pixels, name):
    """An image (C, S, S) that the model classifies correctly."""
    color = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return AttentionExample(color, name, name, name, 1, True, [], {})


def content(model=None, pixels=None, **changes):
    model = model or random_model()
    config = model.config
    if pixels is None:
        shape = (3, config.in_chans, config.img_size, config.img_size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    channels = config.in_chans
    mean, std = [0.1307, 0.3, 0.4][:channels], [0.3081, 0.2, 0.25][:channels]
    fields = {
        "name": "tiny",
        "model": model,
        "preprocess": Preprocess(config.img_size, mean, std),
        "classes": [f"{i}" for i in range(config.num_classes)],
        "examples": [example(image, f"image {i}") for i, image in enumerate(pixels)],
        "dataset": "mnist-5k",
    }
    return LiveContent(**(fields | changes))


@pytest.fixture
def show(visit, tmp_path):
    """Writes and opens a page, and waits until it has checked its numbers."""

    def open_page(shown, width=1300, **media):
        write_live_page(tmp_path / "page.html", shown)
        page = visit(tmp_path / "page.html", width, **media)
        page.locator("#check", has_text="agree").wait_for()
        return page

    return open_page


def normalized(shown):
    channels = shown.model.config.in_chans
    images = torch.tensor(np.stack([x.pixels for x in shown.examples]))
    images = images.permute(0, 3, 1, 2)[:, :channels].float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (shown.preprocess.mean,
                                                          shown.preprocess.std))  # fmt: skip
    return (images - mean) / std


@torch.no_grad()
def expected(shown):
    """Logits, attention of every block, and the head after every block, from PyTorch."""
    model, images = shown.model, normalized(shown)
    logits, blocks = attention_maps(model, images)
    tokens = [model.embed(images)]
    for block in model.blocks:
        tokens.append(block(tokens[-1]))
    lens = [model.forward_head(model.norm(x)) for x in tokens]
    return logits, [block.dense() for block in blocks], lens


def computed(page, index):
    return page.evaluate(
        """index => {
          const result = infer(data.examples[index].image);
          return { logits: [...result.logits], lens: result.lens.map((one) => [...one]),
                   attention: result.blocks.map((block) => [...block.weights]),
                   rollout: [...rolloutMap(result, POOLED)] };
        }""",
        index,
    )


CONFIGS = {
    "class token": {},
    "mean pooling": {"global_pool": "avg", "class_token": False},
    "mean pooling with a class token": {"global_pool": "avg"},
    "LayerScale": {"init_values": 0.5},
    "no position for the class token": {"no_embed_class": True},
    "no qkv bias": {"qkv_bias": False},
    "color, several sizes": {"in_chans": 3, "img_size": 32, "patch_size": 4, "num_heads": 4,
                             "dynamic_img_size": True, "num_classes": 7},
}  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_attention_and_lens_equal_pytorch(show, changes):
    shown = content(random_model(replace(TINY, **changes)))
    page = show(shown)
    logits, attention, lens = expected(shown)
    rollout = saliency.rollout(shown.model, normalized(shown)).flatten(1)
    assert logits.std() > 0.1
    for i in range(len(logits)):
        ours = computed(page, i)
        assert np.allclose(ours["logits"], logits[i], atol=2e-4)
        assert np.allclose(ours["rollout"], rollout[i], atol=2e-5)
        for found, wanted in zip(ours["attention"], attention, strict=True):
            assert np.allclose(found, wanted[i].flatten(), atol=2e-5)
        for found, wanted in zip(ours["lens"], lens, strict=True):
            assert np.allclose(found, wanted[i], atol=2e-4)


def test_real_images_match_within_fp16_error(show, tmp_path):
    data = load_data("mnist-5k", str(tmp_path), 28)
    model = VisionTransformer(replace(TINY, embed_dim=64, num_heads=4, depth=4)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2)  # so that attention is not uniform
    shown = content(model, data.test.images(slice(0, 5)))
    page = show(shown)
    logits, attention, _ = expected(shown)
    for i in range(len(logits)):
        ours = computed(page, i)
        assert (
            np.abs(np.array(ours["logits"]) - logits[i].numpy()).max() < 0.01 * logits.abs().max()
        )
        for found, wanted in zip(ours["attention"], attention, strict=True):
            assert np.allclose(found, wanted[i].flatten(), atol=2e-3)


@torch.no_grad()
def test_broken_parts_equal_the_same_changes_in_pytorch(show):
    shown = content()
    page = show(shown)
    model, image = shown.model, normalized(shown)[:1]

    def browser(changes):
        code = f"[...infer(data.examples[0].image, FINAL, {{...NO_CHANGES, {changes}}}).logits]"
        return page.evaluate(code)

    def torch_logits(tokens):
        return model.forward_head(model.norm(model.blocks(tokens)))[0]

    tokens = model.embed(image)
    without = torch.cat([tokens[:, :4], tokens[:, 5:]], 1)  # patch 3 is token 4
    kept = [i for i in range(16) if i != 3]
    assert np.allclose(browser(f"keep: {kept}"), torch_logits(without), atol=2e-4)
    no_positions = tokens - model.pos_embed
    assert np.allclose(browser("no_pos_embed: true"), torch_logits(no_positions), atol=2e-4)
    silent = model.blocks[1](tokens)
    silent = model.forward_head(model.norm(silent))[0]
    assert np.allclose(browser("silent: new Set(['0'])"), silent, atol=2e-4)
    proj = model.blocks[0].attn.proj.weight
    before, proj[:, 8:] = proj[:, 8:].clone(), 0  # the second of two heads with 8 channels
    assert np.allclose(browser("silent: new Set(['0.1'])"), torch_logits(tokens), atol=2e-4)
    proj[:, 8:] = before
    for block in model.blocks:
        block.attn.scale = 1.0
    assert np.allclose(browser("no_scale: true"), torch_logits(tokens), atol=2e-4)


def test_shuffled_patches_without_positions_change_nothing(show):
    page = show(content())
    before, after = (
        page.evaluate(f"[...infer(data.examples[0].image, FINAL, {{...NO_CHANGES, {x}}}).logits]")
        for x in ("no_pos_embed: true", "no_pos_embed: true, order: shuffled()")
    )
    assert np.allclose(before, after, atol=1e-4)


def draw(page, *strokes):
    """Draws lines with the mouse; places are fractions of the drawing area."""
    box = page.locator("#pad").bounding_box()
    for line in strokes:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in line]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=8)
        page.mouse.up()


def settled(page):
    """Waits until the page has read the drawing, and returns the probabilities."""
    return page.evaluate("""() => new Promise((resolve) => {
      const wait = () => scheduled
        ? requestAnimationFrame(wait) : resolve([...current.probabilities]);
      wait();
    })""")


def seen(page):
    return np.array(page.evaluate("[...state.image]")).reshape(28, 28)


def test_drawing_with_the_mouse_changes_the_prediction(show):
    page = show(content())
    before, bars = settled(page), page.locator("#bars .value").all_text_contents()
    page.locator("#clear").click()
    draw(page, [(0.3, 0.2), (0.7, 0.2), (0.4, 0.8)])
    after = settled(page)
    assert not np.allclose(before, after, atol=0.01)
    assert page.locator("#bars .value").all_text_contents() != bars
    assert sum(after) == pytest.approx(1, abs=1e-5)


def test_drawing_is_scaled_and_centered_as_in_mnist(show):
    page = show(content())
    page.locator("#clear").click()
    draw(page, [(0.1, 0.1), (0.35, 0.1), (0.35, 0.5)])  # small and in a corner
    settled(page)
    image = seen(page)
    rows, columns = np.nonzero(image.max(1) > 8)[0], np.nonzero(image.max(0) > 8)[0]
    assert max(np.ptp(rows), np.ptp(columns)) + 1 in (19, 20)
    center = np.argwhere(image >= 0) * image.reshape(-1, 1)
    # As in all 5,000 images of mnist-5k: pixel 14, up to rounding to whole pixels
    assert np.abs(center.sum(0) / image.sum() - 14).max() <= 0.51
    page.locator("#fit-on").uncheck()
    settled(page)
    assert seen(page)[18:, 18:].max() == 0


def test_eraser_and_clear_remove_ink(show):
    page = show(content())
    page.locator("#clear").click()
    settled(page)
    assert seen(page).max() == 0
    assert page.locator("#answer-text").text_content() == "an empty page"
    page.locator("#fit-on").uncheck()
    draw(page, [(0.2, 0.5), (0.8, 0.5)])
    settled(page)
    assert seen(page)[14, 20] > 200
    page.get_by_role("button", name="Eraser").click()
    draw(page, [(0.6, 0.5), (0.9, 0.5)])
    settled(page)
    assert seen(page)[14, 20] == 0
    assert seen(page)[14, 8] > 200


def test_keyboard_draws(show):
    page = show(content())
    page.locator("#clear").click()
    page.locator("#pad").focus()
    page.keyboard.press("Space")
    for _ in range(6):
        page.keyboard.press("ArrowDown")
    settled(page)
    assert seen(page).max() == 255


def test_clicked_patch_becomes_the_query(show):
    shown = content()
    page = show(shown)
    assert page.locator("#look-shown").text_content() == "Block 2, mean of all heads. "
    box = page.locator("#look-map").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.9)  # row 4, col 3
    assert "row 4, column 3" in page.locator("#query-text").text_content()
    page.get_by_role("button", name="Block 1, head 2", exact=True).click()
    values = page.evaluate("[...shownMap(current)]")
    wanted = expected(shown)[1][0][0, 1, 1 + 14, 1:]  # the patch in row 4, column 3 is number 14
    assert np.allclose(values, wanted, atol=2e-5)
    page.locator("#look-map").hover(position={"x": 5, "y": 5})
    value = page.locator("#look-value").text_content()
    number = float(re.search(r"Row 1, column 1: ([\d.]+)", value)[1])
    assert number == pytest.approx(100 * float(wanted[0]), abs=0.51)
    page.get_by_role("button", name="class token").click()
    assert page.locator("#query-text").text_content() == "or click a patch"


def test_arrow_keys_and_enter_select_a_patch(show):
    page = show(content())
    page.locator("#look-map").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert "row 2, column 2" in page.locator("#query-text").text_content()


def test_lens_shows_the_probabilities_after_each_block(show):
    shown = content()
    page = show(shown)
    rows = page.locator("#lens tbody tr")
    assert rows.count() == 3
    for row, logits in zip(rows.all(), expected(shown)[2], strict=True):
        titles = [cell.get_attribute("title") for cell in row.locator("td").all()]
        values = [float(re.search(r": ([\d.]+)", title)[1]) for title in titles]
        assert np.allclose(values, 100 * logits[0].softmax(0), atol=0.51)


def test_removed_patch_changes_the_broken_answer_only(show):
    page = show(content())
    intact = settled(page)
    assert page.locator("#broken").is_hidden()
    page.locator("#break-map").click(position={"x": 5, "y": 5})
    assert page.locator("#broken-label").text_content() == "without 1 patch"
    assert settled(page) == intact
    wanted = page.evaluate("""Math.max(...infer(state.image, FINAL,
      {...NO_CHANGES, keep: [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]}).probabilities)""")
    shown = page.locator("#broken").text_content()
    assert float(re.search(r"· ([\d.]+)", shown)[1]) == pytest.approx(100 * wanted, abs=0.51)
    sentence = page.locator("#break-sum").text_content()
    share = page.evaluate("attentionMap(current, DEPTH - 1, MEAN, POOLED)[0]")
    assert f"received {100 * share:.1f}\u00a0% of the attention" in sentence
    page.get_by_role("button", name="Reset").click()
    assert page.locator("#broken").is_hidden()
    assert page.locator("#break-sum").text_content() == ""


def test_cost_of_each_patch_is_compared_with_attention(show):
    page = show(content())
    page.locator("#proof-text", has_text="Rank correlation").wait_for()
    costs = page.evaluate("[...costs.values]")
    best = int(np.argmax(settled(page)))
    for patch in (0, 7):
        kept = [i for i in range(16) if i != patch]
        after = page.evaluate(
            f"infer(state.image, FINAL, {{...NO_CHANGES, keep: {kept}}}).probabilities[{best}]"
        )
        assert costs[patch] == pytest.approx(settled(page)[best] - after, abs=1e-6)
    assert page.locator("#scatter circle").count() == 16


@pytest.fixture
def trained(tmp_path):
    """A run with three snapshots; the best epoch, 3, is none of them."""
    run, model = Run(tmp_path / "run"), random_model()
    run.folder.mkdir()
    for epoch in (0, 1, 4):
        save_snapshot(run.folder, random_model(), epoch, 0.1 * epoch or None)
    checkpoints.save_weights(run.folder / "best.safetensors", model.state_dict(),
                             {"epoch": 3, "val_accuracy": 0.9})  # fmt: skip
    run.write_history([
        {"epoch": i, "train_accuracy": 0.1 * i, "val_accuracy": 0.2 * i} for i in range(1, 5)
    ])  # fmt: skip
    checkpoints.write_json(run.folder / "config.json", {"command": "python train.py"})
    return run, model


def test_slider_moves_the_page_through_the_snapshots(show, trained):
    run, model = trained
    shown = content(model, run=run)
    page = show(shown)
    assert "epoch 3" in page.locator("#epoch-value").text_content()
    assert page.locator("#epoch-badge").is_hidden()
    final = settled(page)
    page.locator("#epoch").press("Home")
    first = settled(page)
    assert not np.allclose(first, final, atol=0.01)
    weights = checkpoints.load_weights(run.folder / "snapshots" / "epoch-000.safetensors")[0]
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    with torch.no_grad():
        wanted = model(normalized(shown)[:1]).softmax(1)[0]
    assert np.allclose(first, wanted, atol=1e-3)
    assert page.locator("#epoch-text").text_content() == "Weights of epoch 0."
    page.locator("#film button").nth(3).locator("b").filter(has_text=re.compile(r"\d")).wait_for()
    assert page.locator("#film span").all_text_contents() == [
        "random", "epoch 1", "epoch 3", "epoch 4"]  # fmt: skip
    page.get_by_role("button", name="Back to the final model").click()
    assert settled(page) == final
    assert page.locator("#history .line").count() == 2


def test_playback_from_the_last_step_ends_at_the_final_model(show, trained):
    run, model = trained
    page = show(content(model, run=run))
    page.locator("#epoch").press("ArrowLeft")
    page.locator("#epoch-value", has_text="epoch 1").wait_for()
    page.locator("#play").click()
    page.locator("#epoch-value", has_text="epoch 3").wait_for()
    assert page.evaluate("timer") == 0
    assert page.locator("#play").text_content() == "Play"


def test_snapshots_are_left_out_at_another_image_size(trained, tmp_path):
    run, _ = trained
    path = tmp_path / "page.html"
    write_live_page(path, content(random_model(replace(TINY, img_size=35)), run=run))
    assert path.read_text(encoding="utf-8").count('"weights":') == 1
    other = random_model(replace(TINY, depth=1))
    with pytest.raises(UserError, match="has a different architecture"):
        write_live_page(path, content(other, run=run))


def test_snapshots_are_counted_also_if_one_is_of_the_best_epoch(trained):
    run, model = trained
    for best, num_states in ((3, 4), (4, 3)):
        checkpoints.save_weights(run.folder / "best.safetensors", model.state_dict(),
                                 {"epoch": best, "val_accuracy": 0.9})  # fmt: skip
        found = pages._states(content(model, run=run), model.state_dict())
        assert len(found["states"]) == num_states
        assert found["num_snapshots"] == 3


@pytest.mark.parametrize(("dataset", "size", "box"), [
    ("mnist-5k", 28, 20), ("mnist", 56, 40), ("digits", 16, 16), ("cifar10", 32, None),
])  # fmt: skip
def test_drawings_are_scaled_with_the_images_of_the_dataset(dataset, size, box):
    shown = content(random_model(replace(TINY, img_size=size, patch_size=4)), dataset=dataset)
    found = pages._drawing(shown)
    assert (found and found["box"]) == box


def test_the_page_names_no_folder_of_this_computer(trained):
    run, model = trained
    config = {"command": "python train.py --data-dir /mnt/acme/data", "dataset": {}}
    (run.folder / "config.json").write_text(json.dumps(config))
    (fact, *_) = pages._facts(content(model, run=run))
    assert "python train.py --data-dir data (started" in fact


def test_page_without_snapshots_says_how_to_store_them(show):
    page = show(content())
    assert page.locator("#player").is_hidden()
    assert "set SNAPSHOTS to 10" in page.locator("#learn-text").text_content()


def test_photograph_is_cropped_and_resized_as_in_evaluation(show, tmp_path):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    photograph = small.resize((121, 90), Image.Resampling.BICUBIC)
    photograph.save(tmp_path / "photo.png")
    config = replace(TINY, in_chans=3, img_size=32, patch_size=8)
    preprocess = Preprocess(32, [0.5] * 3, [0.5] * 3, crop_pct=0.875)
    page = show(content(random_model(config), preprocess=preprocess))
    page.locator("#file").set_input_files(tmp_path / "photo.png")
    wanted = np.asarray(square(photograph, preprocess.resized, Image.Resampling.BICUBIC))
    wanted = preprocess.center_crop(torch.tensor(wanted).permute(2, 0, 1)[None])[0] * 255
    page.locator("#examples [aria-pressed=true]").wait_for(state="detached")
    found = np.array(page.evaluate("[...state.image]")).reshape(3, 32, 32)
    assert np.abs(found - wanted.numpy()).max() <= 2  # Pillow rounds between its two passes


def test_other_code_in_model_py_is_reported(browser, tmp_path, monkeypatch):
    shown = content()
    monkeypatch.setattr(shown.model.blocks[0].mlp, "act", torch.nn.ReLU())
    write_live_page(tmp_path / "page.html", shown)
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.locator("#check.warning", has_text="Do not trust this page").wait_for()
    page.close()


@pytest.mark.parametrize("width", [390, 768])
def test_narrow_screen_needs_no_horizontal_scrolling(show, width):
    page = show(content(name="a_long_name_without_a_break_" * 5), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#pad").bounding_box()["width"] > 250


def test_every_control_has_a_name_and_is_large_enough(show):
    page = show(content(), width=390)
    nameless = page.evaluate("""() =>
      [...document.querySelectorAll("button, input, canvas[tabindex]")]
      .filter((x) => !(x.textContent.trim() || x.ariaLabel || x.labels?.length))
      .map((x) => x.outerHTML)""")
    assert nameless == []
    small = page.evaluate("""() => [...document.querySelectorAll("main button")]
      .filter((x) => x.offsetParent && x.getBoundingClientRect().height < 24)
      .map((x) => x.outerHTML)""")
    assert small == []


def test_page_prints_on_one_sheet(show, trained):
    deep = content(random_model(replace(TINY, depth=12)))
    for shown in (content(trained[1], run=trained[0]), deep):
        page = show(shown)
        page.locator("#proof-text", has_text="Rank correlation").wait_for()
        printed = page.pdf(prefer_css_page_size=True, print_background=True)
        assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 1


def test_dark_theme_and_reduced_motion_are_followed(show):
    style = """[getComputedStyle(document.body).backgroundColor,
      getComputedStyle(document.querySelector(".bars i")).transitionDuration]"""
    light, moving = show(content()).evaluate(style)
    dark, still = show(content(), color_scheme="dark", reduced_motion="reduce").evaluate(style)
    assert light != dark
    assert (moving, still) == ("0.12s", "0s")


def test_browser_blocks_connections_and_foreign_scripts(browser, tmp_path):
    write_live_page(tmp_path / "page.html", content())
    page, messages = browser.new_page(), []
    page.on("console", lambda message: messages.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    request = "fetch('https://example.org/').then(() => 'answered', () => 'refused')"
    assert page.evaluate(request) == "refused"
    assert any("Content Security Policy" in text for text in messages)
    page.evaluate("""() => { const made = document.createElement("script");
      made.textContent = "window.ran = true"; document.body.append(made); }""")
    assert page.evaluate("window.ran") is None
    page.close()


# Without a browser.


def test_hostile_text_adds_no_element(tmp_path):
    def tags(path):
        return re.findall(r"<\w+", path.read_text(encoding="utf-8"))

    model, pixels = random_model(), torch.zeros(1, 28, 28, dtype=torch.uint8)
    for name, text in (("plain", "x"), ("nasty", NASTY)):
        shown = content(model, name=text, classes=[text] * 10, examples=[example(pixels, text)])
        write_live_page(tmp_path / f"{name}.html", shown)
    assert tags(tmp_path / "plain.html") == tags(tmp_path / "nasty.html")


def test_page_refers_to_no_other_file_or_server(tmp_path):
    write_live_page(tmp_path / "page.html", content())
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = text.replace('"http://www.w3.org/2000/svg"', "")  # a namespace, not a request
    assert not re.search(r"https?:|@import|url\(|\beval\(|innerHTML", text)


def test_weights_are_embedded_as_fp16(tmp_path):
    shown = content()
    write_live_page(tmp_path / "page.html", shown)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (encoded,) = re.findall(r'"weights":"([^"]+)"', text)
    found = np.frombuffer(io.BytesIO(b64decode(encoded)).read(), "<f2")
    wanted = torch.cat([value.flatten() for value in shown.model.state_dict().values()])
    assert np.array_equal(found.astype(np.float32), wanted.numpy())


def test_shared_page_does_not_call_the_model_its_readers_own(trained, tmp_path):
    run, model = trained
    for others in (False, True):
        write_live_page(tmp_path / "page.html", content(model, run=run, for_others=others))
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert ("Your own ViT" not in text) == others


def test_only_small_plain_vits_run_in_the_browser():
    assert runs_in_browser(random_model())
    assert not runs_in_browser(VisionTransformer(replace(TINY, embed_dim=512, mlp_ratio=8.0)))
    assert not runs_in_browser(VisionTransformer(replace(TINY, num_classes=0)))
    assert not runs_in_browser(torch.nn.Linear(2, 2))
    edited = random_model()
    edited.register_parameter("reg_token", torch.nn.Parameter(torch.zeros(1, 4, 16)))
    assert not runs_in_browser(edited)
    for kernel_size, stride, padding in ((9, 7, 1), (7, 6, 0)):
        overlapping = random_model()
        overlapping.patch_embed.proj = torch.nn.Conv2d(1, 16, kernel_size, stride, padding)
        assert not runs_in_browser(overlapping)
