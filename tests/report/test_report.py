"""The numbers of the report equal those of independent implementations."""

import csv
import io
import json
import re
import shutil
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, confusion_matrix
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from lab.core import UserError
from lab.report import build_content, markdown, read_runs
from lab.report.comparisons import (
    compare_pairs,
    configurations,
    efficiencies,
    hardest_images,
    select_models,
    twins,
)
from lab.report.folders import plot, thumbnail
from lab.report.records import Record
from lab.report.sentences import pair_sentence
from tests.report.json_files import change_json


def predictions(run):
    with open(Path(run["folder"]) / "predictions.csv") as file:
        rows = [line.rstrip("\n").split(",") for line in file][1:]
    return [np.array(column) for column in zip(*rows, strict=True)]


def selected(place):
    (runs,) = select_models(configurations(read_runs(place).runs))
    return runs


def test_numbers_equal_scikit_learn_on_the_predictions(place, tmp_path):
    content = build_content(read_runs(place), tmp_path)
    assert len(content["runs"]) == 9
    assert content["left_out"] == []
    for run in content["runs"]:
        _, label, predicted, _ = predictions(run)
        assert run["accuracy"] == pytest.approx(accuracy_score(label, predicted), abs=1e-6)
        expected = confusion_matrix(label, predicted)
        counts = np.zeros_like(expected)
        for row, column, count in run["confusion"]:
            counts[row, column] = count
        assert (counts == expected).all()
        bins = run["calibration"]
        error = sum(n * abs(confidence - accuracy) for confidence, accuracy, n in bins)
        # Confidences are rounded in predictions.csv.
        assert error / len(label) == pytest.approx(run["calibration_error"], abs=2e-4)


def test_curves_equal_the_history_and_are_shortened(place, tmp_path):
    for run in build_content(read_runs(place), tmp_path)["runs"]:
        with open(Path(run["folder"]) / "history.csv") as file:
            history = list(csv.DictReader(file))
        for name, values in run["curves"].items():
            assert values == pytest.approx([float(row[name]) for row in history], rel=5e-5)
            assert all(len(f"{value}".lstrip("0.")) <= 6 for value in values)


def test_seeds_are_grouped_without_official_runs(place, tmp_path):
    content = build_content(read_runs(place), tmp_path)
    groups = [(c["name"].partition("_")[0], c["task"], len(c["runs"])) for c in content["seeds"]]
    assert groups == [("digits-vit", "From scratch", 2), ("digits-cnn", "CNN twin", 2)]
    for group in content["seeds"]:
        accuracies = [content["runs"][i]["accuracy"] for i in group["runs"]]
        assert group["mean"] == pytest.approx(np.mean(accuracies))
        assert group["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert [run["reference"] for run in content["runs"]].count(True) == 1


def test_runs_of_two_models_are_not_averaged_and_the_newest_of_a_seed_counts(place):
    folder = place / "train" / "digits-vit_16x2-s0"
    for name, code, started in (("edited", "another", "2030"), ("again", None, "2031")):
        copy = folder.with_name(name)
        shutil.copytree(folder, copy)

        def change(config, code=code, started=started):
            config["code"]["model.py"] = code or config["code"]["model.py"]
            config["started"] = started

        change_json(copy / "config.json", change)
    vits = [c for c in configurations(read_runs(place).runs)
            if c.first.folder.parent == folder.parent and c.first.share == 1]  # fmt: skip
    names = [[run.folder.name for run in config.runs] for config in vits]
    assert sorted(names, key=len) == [["edited"], ["again", "digits-vit_16x2-s1"]]


def test_pairs_equal_statsmodels(place):
    runs = selected(place)
    assert len(runs) == 5  # ViT, CNN twin and three modes, but not the run on 10 % of the images
    assert not any("official" in run.folder.parts for run in runs)
    pairs = compare_pairs(runs)
    correct = {r.folder: r.predictions.labels == r.predictions.predicted for r in runs}
    for pair in pairs:
        a, b = correct[pair.a.folder], correct[pair.b.folder]
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert pair.p == pytest.approx(mcnemar(table, exact=True).pvalue)
        better = pair.a if pair.only_a > pair.only_b else pair.b
        significant = f"{better.model} is significantly better:" in pair_sentence(pair)
        assert significant == (pair.p_holm < 0.05)
    expected = multipletests([pair.p for pair in pairs], method="holm")[1]
    assert [pair.p_holm for pair in pairs] == pytest.approx(expected.tolist())


def test_patch_sizes_and_versions_of_model_py_are_compared(place):
    shutil.rmtree(place / "finetune")  # the number of compared models is limited
    before = len(selected(place))
    for name, change in {
        "patch2": lambda record: record["constants"].update(PATCH_SIZE=2),
        "edited": lambda record: record["code"].update({"model.py": "0"}),
    }.items():
        shutil.copytree(place / "train" / "digits-vit_16x2-s0", place / "train" / name)
        change_json(place / "train" / name / "config.json", change)
        before += 1
        assert len(selected(place)) == before


def test_hardest_images_are_misclassified_by_most_runs(place):
    runs = selected(place)
    wrong = sum((r.predictions.labels != r.predictions.predicted).astype(int) for r in runs)
    hardest = hardest_images(runs)
    assert wrong[hardest].tolist() == sorted(wrong, reverse=True)[: len(hardest)]
    assert len(set(hardest)) == len(hardest) > 0


def test_fractions_and_modes_are_sorted(place, tmp_path):
    (head,) = (place / "finetune").glob("*-head-s0")
    second = head.with_name("head-s1")
    shutil.copytree(head, second)
    change_json(second / "config.json", lambda record: record["constants"].update(SEED=1))
    for run, seconds in ((head, 2.0), (second, 3.0)):
        change_json(
            run / "metrics.json", lambda record, s=seconds: record.update(training_seconds=s)
        )
    content = build_content(read_runs(place), tmp_path)
    (efficiency,) = content["efficiency"]
    (series,) = efficiency["series"]
    points = [(p["fraction"], p["images"], p["seeds"]) for p in series["points"]]
    assert points == [(0.1, 129, 1), (1.0, 1295, 2)]
    (tuning,) = content["finetuning"]
    assert {p["label"] for p in tuning["points"]} == {"head", "full", "scratch"}
    head = tuning["points"][0]
    assert head["label"] == "head"  # it trains the fewest parameters
    assert (head["seeds"], head["seconds"]) == (2, 2.5)  # a mean over both seeds


def test_twins_share_every_constant(place):
    """A record that is older than the constant OPTIMIZER counts as trained by AdamW."""

    def pairs():
        return len(twins(configurations(read_runs(place).runs)))

    before = pairs()
    assert before
    for path in (place / "cnn_baseline").rglob("config.json"):
        change_json(path, lambda record: record["constants"].pop("OPTIMIZER"))
    assert pairs() == before
    for path in (place / "train").rglob("config.json"):
        change_json(path, lambda record: record["constants"].update(OPTIMIZER="muon"))
    assert pairs() == 0


def test_a_twin_of_an_edited_model_file_is_still_a_twin(place):
    """cnn_baseline.py has no MODEL_FILE, so that constant cannot distinguish twins."""
    before = len(twins(configurations(read_runs(place).runs)))
    for path in (place / "train").rglob("config.json"):
        change_json(path, lambda record: record["constants"].update(MODEL_FILE="mine.py"))
    assert len(twins(configurations(read_runs(place).runs))) == before > 0


@pytest.mark.parametrize("recorded", [16, 32])  # EMBED_DIM: train.py's, as in old records; VIT's
def test_a_twin_belongs_to_the_vit_of_its_record(place, recorded):
    def pairs():
        found = twins(configurations(read_runs(place).runs))
        return [(vit.first.folder.name, len(cnn.runs)) for _, vit, cnn in found]

    for run in (place / "cnn_baseline").iterdir():

        def change_cnn(record):
            record["constants"].update(VIT="results/train/wide", EMBED_DIM=recorded)
            record["twin_of"].update(model="vit_32x2", parameters=7, macs=8)

        change_json(run / "config.json", change_cnn)
    assert pairs() == []
    wide = place / "train" / "wide"
    shutil.copytree(place / "train" / "digits-vit_16x2-s0", wide)

    def change_vit(record):
        record["constants"].update(EMBED_DIM=32)
        record["model"].update(parameters=7, macs=8)

    change_json(wide / "config.json", change_vit)
    assert pairs() == [("wide", 2)]
    change_json(wide / "config.json", lambda record: record["constants"].update(MODEL="resnet18"))
    assert pairs() == []


def test_a_mode_on_all_images_replaces_only_the_same_mode(place, tmp_path):
    (full,) = (place / "finetune").glob("*-full-s0")
    shutil.copytree(full, place / "finetune" / "all")

    def change(record):
        record["constants"].update(TRAIN_FRACTION=1.0, LEARNING_RATE=1e-4)

    change_json(place / "finetune" / "all" / "config.json", change)
    found = read_runs(place)
    content = build_content(found, tmp_path)
    (tuning,) = content["finetuning"]
    assert len(tuning["points"]) == 3
    table = markdown.results_page(content, found).partition("## Fine-tuning")[2].partition("##")[0]
    assert table.count("](finetune/") == 3
    assert "](finetune/all/)" in table
    assert full.name not in table


def test_runs_on_changed_data_are_kept_apart(place, tmp_path):
    """Another class changes the indices of the classes; more images change only `data`."""
    for name, change in {
        "more-classes": lambda record: record["dataset"]["classes"].insert(0, "-new"),
        "more-images": lambda record: record.update(data="another"),
    }.items():
        run = place / "train" / name
        shutil.copytree(place / "train" / "digits-vit_16x2-s1", run)
        change_json(run / "config.json", lambda record: record["constants"].update(SEED=2))
        change_json(run / "config.json", change)
    found = read_runs(place)
    configs = configurations(found.runs)
    for name in ("more-classes", "more-images"):
        assert [name] in [[run.folder.name for run in config.runs] for config in configs]
    assert not {pair[1].name for pair in twins(configs)} & {"more-classes", "more-images"}
    content = build_content(found, tmp_path)
    assert [len(test_set["classes"]) for test_set in content["test_sets"]] == [10, 11]


def test_twins_of_equal_time_had_the_machine_to_themselves(place):
    for path in (place / "cnn_baseline").rglob("config.json"):
        change_json(path, lambda record: record["constants"].update(EPOCHS=1))
    for path in place.rglob("metrics.json"):
        change_json(path, lambda record: record.update(training_seconds=10.0))
    kinds = {equal for equal, *_ in twins(configurations(read_runs(place).runs))}
    assert kinds == {"seconds"}
    for path in (place / "train").rglob("metrics.json"):
        change_json(path, lambda record: record.update(load=1e6))
    assert twins(configurations(read_runs(place).runs)) == []


def test_runs_of_an_edited_model_are_no_data_efficiency_series(place):
    """They form no series with the runs of the original model."""

    def lines():
        found = efficiencies(configurations(read_runs(place).runs))
        return [[config.first.share for config in line] for series in found for line in series]

    assert lines() == [[0.1, 1.0]]
    edited = place / "train" / "edited"
    shutil.copytree(place / "train" / "digits-vit_16x2-s0", edited)
    change_json(edited / "config.json", lambda record: record["code"].update({"model.py": "0"}))
    assert lines() == [[0.1, 1.0]]


def test_configurations_of_one_model_name_can_be_told_apart(place, tmp_path):
    """Their rows and lines show the folder; others show only the model."""
    page = markdown.results_page(build_content(read_runs(place), tmp_path), read_runs(place))
    assert "| vit_16x2 | digits | 2 |" in page
    for run in [*(place / "train").iterdir(), *(place / "cnn_baseline").iterdir()]:
        copy = run.with_name(re.sub(r"-s(\d)", r"-patch2-s\1", run.name))
        shutil.copytree(run, copy)
        change_json(copy / "config.json", lambda record: record["constants"].update(PATCH_SIZE=2))
    found = read_runs(place)
    content = build_content(found, tmp_path)
    page = markdown.results_page(content, found)
    plain, patch2 = "digits-vit_16x2", "digits-vit_16x2-patch2"
    (efficiency,) = content["efficiency"]
    labels = [line["label"] for line in efficiency["series"]]
    assert sorted(labels) == [f"From scratch: vit_16x2 ({name})" for name in (plain, patch2)]
    for name in (plain, patch2):
        assert f"vit_16x2 ({name}) reaches" in efficiency["summary"]
        assert f"| vit_16x2 ({name}) | digits | 2 |" in page  # seeds
        assert re.search(rf"\| digits \| vit_16x2 \({name}, digits-cnn_\S+\) \| same epochs", page)
        assert f"| From scratch: vit_16x2 ({name}) |" in page  # efficiency


def test_repeated_runs_on_a_fraction_are_listed(place, tmp_path):
    (head,) = (place / "finetune").glob("*-head-s0")
    shutil.copytree(head, head.with_name("head-s1"))
    path = head.with_name("head-s1") / "config.json"
    change_json(path, lambda record: record["constants"].update(SEED=1))
    found = read_runs(place)
    page = markdown.results_page(build_content(found, tmp_path), found)
    assert "| digits-vit_16x2-s0, head | digits, 50 % | 2 |" in page


def test_a_mean_over_seeds_is_not_tested_against_a_single_run(place, tmp_path):
    _, both, *_ = build_content(read_runs(place), tmp_path)["summary"]
    assert "Welch's t-test" in both
    (second,) = (place / "cnn_baseline").glob("*-s1")
    shutil.rmtree(second)
    _, single, *_ = build_content(read_runs(place), tmp_path)["summary"]
    assert "percentage points" in single
    assert "significant" not in single


@pytest.mark.parametrize(("name", "kind"), [
    ("VisionTransformer", "ViT"), ("VisionTransformerDistilled", "ViT"), ("Levit", "ViT"),
    ("SwinTransformerV2", "Swin"), ("ResidualCNN", "CNN"), ("ConvNeXt", "CNN"), ("VGG", "CNN"),
])  # fmt: skip
def test_a_model_belongs_to_the_family_of_its_class(name, kind):
    assert Record(Path("run"), {"model": {"class": name}}, [], None, None, None).kind == kind


def test_summary_has_a_sentence_for_each_main_result(place, tmp_path):
    content = build_content(read_runs(place), tmp_path)
    vit, cnn, tuned, pairs = content["summary"]
    assert "2 epochs, patches of 4 pixels) reaches" in vit
    assert "after the same 2 epochs" in cnn
    assert "digits (10 classes, 359 test images)" in vit
    assert tuned.startswith("Fine-tuning digits-vit_16x2-s0 (")
    assert "1 epoch, 50 % of the training images) reaches" in tuned
    assert "training from random weights reaches" in tuned
    assert "McNemar's test with Holm's correction" in pairs
    assert content["provenance"].startswith("8 own runs and 1 reference run; newest run: ")
    assert [card["sentence"] for card in content["cards"]] == [vit, cnn, tuned]
    links = [f["link"] for run in content["runs"] for f in run["files"]]
    assert links
    assert all((place / link).is_file() for link in links)


def test_a_card_shows_the_attention_of_its_own_run(place, tmp_path):
    """A run of another script may have the same name."""
    content = build_content(read_runs(place), tmp_path)
    name = content["runs"][content["cards"][0]["run"]]["name"]
    for started, script in enumerate(("train", "finetune")):
        run = place / "attention_viz" / f"of-{script}"
        run.mkdir(parents=True)
        config = {"schema": 1, "command": "python attention_viz.py", "started": str(started)}
        config["constants"] = {"MODEL": f"results/{script}/{name}"}
        config["dataset"] = {"name": "digits"}
        (run / "config.json").write_text(json.dumps(config))
        (run / "metrics.json").write_text("{}")
        (run / "attention.html").touch()
    cards = build_content(read_runs(place), tmp_path)["cards"]
    assert cards[0]["page"]["page"] == "attention_viz/of-train/attention.html"


def test_a_tie_in_validation_is_stated(place, tmp_path):
    copy = place / "train" / "digits-vit_16x2-again-s0"
    shutil.copytree(place / "train" / "digits-vit_16x2-s0", copy)
    change_json(copy / "config.json", lambda record: record["constants"].update(EPOCHS=3))
    shutil.rmtree(place / "train" / "digits-vit_16x2-s1", ignore_errors=True)
    shutil.rmtree(place / "cnn_baseline")
    (vit, *_) = build_content(read_runs(place), tmp_path)["summary"]
    assert "1 other configuration reached the same validation accuracy" in vit


def test_one_epoch_is_singular_and_budgets_name_both_epochs(place, tmp_path):
    for path in (place / "cnn_baseline").rglob("config.json"):
        change_json(path, lambda record: record["constants"].update(EPOCHS=1))
    for path in [*(place / "cnn_baseline").rglob("metrics.json"),
                 *(place / "train").rglob("metrics.json")]:  # fmt: skip
        change_json(path, lambda record: record.update(training_seconds=10.0))
    found = read_runs(place)
    content = build_content(found, tmp_path)
    page = markdown.results_page(content, found)
    summary = " ".join(content["summary"])
    assert re.search(r"\b1 epoch\b", summary)
    assert "2 epochs" in summary
    assert "1 epochs" not in summary
    assert "2 epochs, 10 s" in page
    assert "1 epoch, 10 s" in page
    assert "1 epochs" not in page


@pytest.mark.parametrize(
    ("pretrained", "name"),
    [("weights/vit_128x6_cifar10.safetensors", "vit_128x6_cifar10"),
     ("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k"),
     ("results/finetune/digits-full-decay0.7-s0", "digits-full-decay0.7-s0")],
)  # fmt: skip
def test_model_names_keep_their_dots(pretrained, name):
    config = {"constants": {"PRETRAINED": pretrained}}
    assert Record(Path("run"), config, [], None, None, None).pretrained == name


def test_markdown_escapes_text_from_records(place, tmp_path):
    folder = place / "train" / "a|b [x] (y) `z`"
    (place / "train" / "digits-vit_16x2-s0").rename(folder)
    change_json(
        folder / "config.json",
        lambda record: record["dataset"].update(name="<b>*x*</b> ~~_y_~~ $z$ a_b"),
    )
    found = read_runs(place)
    text = markdown.results_page(build_content(found, tmp_path), found)
    (line,) = [row for row in text.splitlines() if row.startswith("| [a")]
    assert line.replace("\\|", "").count("|") == 9
    assert "](train/a%7Cb%20%5Bx%5D%20%28y%29%20%60z%60/)" in line
    assert "\\<b\\>\\*x\\*\\</b\\> \\~\\~\\_y\\_\\~\\~ \\$z\\$ a_b" in text
    assert "<b>" not in text


def test_sweep_summaries_are_escaped(place):
    sweep = place / "sweep" / "s"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text('{"says": "![x](http://x) <img src=y>", "trials": []}')
    tables = "<!-- results: sweeps -->\n<!-- end of results -->"
    filled = markdown.fill(tables, read_runs(place), place)
    assert "!\\[x\\](http://x) \\<img src=y\\>" in filled


def test_markers_are_filled_and_unknown_ones_refused(place):
    text = "before\n<!-- results: seeds -->\nold\n<!-- end of results -->\nafter\n"
    found = read_runs(place)
    filled = markdown.fill(text, found, place.parent)
    assert filled.startswith("before\n<!-- results: seeds -->\n| model |")
    assert filled.endswith("<!-- end of results -->\nafter\n")
    assert "old" not in filled
    assert markdown.fill(filled, found, place.parent) == filled
    with pytest.raises(UserError, match="there is no table 'sed'"):
        markdown.fill(text.replace("seeds", "sed"), found, place.parent)


def decoded(uri):
    return Image.open(io.BytesIO(b64decode(uri.partition(",")[2])))


def test_thumbnails_show_the_image_and_open_no_other_file(tmp_path):
    pixels = np.asarray(decoded(thumbnail("digits", "1713", tmp_path)))
    assert (pixels == np.rint(load_digits().images[1713] * 255 / 16)).all()
    Image.new("RGB", (300, 200), "red").save(tmp_path / "secret.jpg")
    mine = tmp_path / "mine"
    mine.mkdir()
    Image.new("RGB", (300, 200), "red").save(mine / "ok.jpg")
    (mine / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert decoded(thumbnail(str(mine), "ok.jpg", tmp_path)).size == (96, 64)
    for name in ("../secret.jpg", "link.jpg", "missing.jpg", "nul\0.jpg"):
        assert thumbnail(str(mine), name, tmp_path) is None
        assert plot(mine, name) is None
    assert thumbnail("digits", "99999", tmp_path) is None
    assert thumbnail("digits", "many", tmp_path) is None
