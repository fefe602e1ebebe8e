"""Training runs and models that were broken on purpose: numbers and curves in broken_recipes.md.

python theory/broken_recipes.py                    # prints the numbers, fails if the text differs
python theory/broken_recipes.py --draw             # draws broken_recipes.png too
python theory/broken_recipes.py --quiz             # writes a page: match curves to mistakes

theory/_broken_runs.py makes the measurements and records them in theory/broken/.
"""

import json
import math
import random
import statistics
import sys
from typing import Any

from _broken_runs import LABEL_SMOOTHING, RECORDS, TITLES
from _text import ROOT, check, claim

QUIZ = ROOT / "results" / "broken_recipes_quiz.html"
PICTURE = ROOT / "theory" / "broken_recipes.png"
CODE = {
    "intact": "intact", "no-scale": "no 1/sqrt(d)", "wrong-axis": "softmax over the wrong axis",
    "no-positions": "no position embeddings",
    "pixels-not-normalized": "pixels from 0 to 255, not normalized",
}  # fmt: skip


def record(name: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    assert len(values) == 5
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f} %"


def mean(values: list[float]) -> float:
    return statistics.mean(values)


def pretrained_said() -> dict[str, str]:
    found = record("pretrained")
    kept, refitted = found["test_accuracy"]["kept"], found["test_accuracy"]["refitted"]
    said = {
        title: f"| {title} | {spread(kept[name])} | {spread(refitted[name])} |"
        for name, title in CODE.items()
    }
    wrong = [name for name in CODE if name != "intact"]
    said["digits"] = (
        f"on {found['train_images']} digits, tested on the other {found['test_images']:,}"
    )
    said["kept"] = claim(
        "accuracy is below 40 % in every row but the first",
        all(max(kept[name]) < 0.4 for name in wrong),
    )
    said["refitted"] = claim(
        "all four broken models are above 65 %", all(min(refitted[name]) > 0.65 for name in wrong)
    )
    said["hidden"] = claim(
        "within 3 points of the intact model",
        abs(mean(refitted["intact"]) - mean(refitted["wrong-axis"])) < 0.03,
    )  # fmt: skip
    return said


def training_said() -> dict[str, str]:
    found = record("training")
    runs = found["runs"]

    def values(name: str, key: str) -> list[float]:
        return [run[key] for run in runs[name]]

    def last(name: str, key: str) -> float:
        return mean([run[key][-1] for run in runs[name]])

    said = {}
    for name, title in TITLES.items():
        said[title] = (
            f"| {title} | {last(name, 'train_loss'):.2f} | {last(name, 'test_loss'):.2f} "
            f"| {spread(values(name, 'test_accuracy'))} |"
        )
    said["recipe"] = (
        f"{found['epochs']} epochs, with batches of {found['batch_size']}, AdamW at "
        f"{found['learning_rate']:g}, label smoothing {found['label_smoothing']:g}"
    )
    flat = [abs(run["test_loss"][-1] - run["test_loss"][-10]) for run in runs["healthy"]]
    said["converged"] = claim(
        "the test loss changes by less than 0.03 in the last ten epochs", max(flat) < 0.03
    )
    said["rate"] = f"With {found['high_rate']} times the usual learning rate"
    # What the training loss of the healthy runs consists of.
    parts = [run["final_loss"] for run in runs["healthy"]]
    names = ("as in training", "without dropout", "without augmentation", "without label smoothing")
    steps = [mean([part[name] for part in parts]) for name in names]
    said["parts"] = ", ".join(
        f"{'then ' * (number > 1)}{name} {value:.2f}"
        for number, (name, value) in enumerate(zip(names, steps, strict=True))
    )
    said["falls"] = claim("the loss of the final weights on the training images falls",
                          steps == sorted(steps, reverse=True))  # fmt: skip
    losses = [last("healthy", key) for key in ("train_loss", "test_loss")]
    said["healthy losses"] = f"is {losses[0]:.2f} and the test loss {losses[1]:.2f}"
    said["which is higher"] = claim(
        "Why is the training loss above the test loss?", losses[0] > losses[1]
    )
    said["order"] = claim(
        "Each step lowers it, label smoothing by far the most",
        steps == sorted(steps, reverse=True),
        steps[2] - steps[3] > 5 * max(steps[0] - steps[1], steps[1] - steps[2]),
    )
    said["average"] = claim(
        "an average over an epoch, during which the loss falls", losses[0] > steps[0]
    )
    on, off = 1 - LABEL_SMOOTHING * 0.9, LABEL_SMOOTHING / 10
    entropy = -on * math.log(on) - 9 * off * math.log(off)
    said["floor of label smoothing"] = f"cannot fall below {entropy:.2f}"
    said["chance"] = f"ln 10 = {math.log(10):.2f}"
    floor = math.log(math.e + 9) - 1
    low = min(min(run["test_loss"]) for run in runs["double-softmax"])
    said["floor of two softmaxes"] = claim(
        f"it cannot fall below ln(e + 9) - 1 = {floor:.2f}", low > floor
    )
    double = mean(values("healthy", "test_accuracy")) - mean(
        values("double-softmax", "test_accuracy")
    )
    said["double softmax"] = claim("The accuracy is less than a point lower", 0 < double < 0.01)
    pairs = list(zip(runs["no-eval"], runs["healthy"], strict=True))
    said["no-eval"] = claim(
        "the test loss is higher in all five seeds",
        all(a["test_loss"][-1] > b["test_loss"][-1] for a, b in pairs),
    )
    difference = mean(values("healthy", "test_accuracy")) - mean(values("no-eval", "test_accuracy"))
    said["no-eval, accuracy"] = f"by only {100 * difference:.1f} points"
    said["leak"] = (
        f"{spread(values('test-in-training', 'test_accuracy'))} on the leaked test images, "
        f"{spread(values('test-in-training', 'unused_accuracy'))} on images that were never used"
    )
    said["leak, order"] = claim(
        "higher on the leaked images in all five seeds",
        all(run["test_accuracy"] > run["unused_accuracy"] for run in runs["test-in-training"]),
    )
    said["shuffled"] = claim(
        f"training loss falls below that of random guessing, ln 10 = {math.log(10):.2f}, while "
        "the test loss rises above it",
        last("shuffled-labels", "train_loss") < math.log(10) < last("shuffled-labels", "test_loss"),
    )
    said["zero_grad"] = claim(
        "no seed gets above 30 %", max(values("no-zero-grad", "test_accuracy")) < 0.3
    )
    warm = [mean(values(name, "test_accuracy")) for name in ("no-warmup", "healthy")]
    deviation = max(
        statistics.stdev(values(name, "test_accuracy")) for name in ("no-warmup", "healthy")
    )
    curves = [run["test_loss"] for run in runs["no-zero-grad"]]
    said["zero_grad, curve"] = claim(
        "The loss rises after a good start", all(max(c[5:]) > min(c[:5]) for c in curves)
    )
    said["leak, curve"] = claim(
        "The curves look better than healthy ones",
        last("test-in-training", "test_loss") < losses[1],
        last("test-in-training", "train_loss") < losses[0],
    )
    said["warm-up"] = claim(
        "the difference is smaller than the deviation between seeds",
        abs(warm[0] - warm[1]) < deviation,
    )
    high = mean(values("healthy", "test_accuracy")) - mean(values("high-rate", "test_accuracy"))
    said["high rate"] = claim(
        "training from scratch loses less than one percentage point",
        0 < high < 0.01,
    )
    wrong = list(zip(runs["wrong-normalization"], runs["healthy"], strict=True))
    said["normalization"] = claim(
        "lower in all five seeds", all(a["test_accuracy"] < b["test_accuracy"] for a, b in wrong)
    )
    return said


def forgetting_said() -> dict[str, str]:
    found = record("forgetting")
    runs = found["runs"]
    said = {"images": f"{found['cifar_images']} CIFAR-10 test images",
            "steps": f"{found['steps'][-1]} steps"}  # fmt: skip
    for name, factor in found["rates"].items():
        kept = [run["cifar_accuracy"][-1] for run in runs[name]]
        tests = [run["test_accuracy"] for run in runs[name]]
        said[f"{name} rate"] = f"| {factor} x usual | {spread(kept)} | {spread(tests)} |"
    said["before"] = f"{100 * runs['usual'][0]['cifar_accuracy'][0]:.1f} % before fine-tuning"
    ends = {name: [run["cifar_accuracy"][-1] for run in runs[name]] for name in runs}
    said["order"] = claim(
        "The higher the learning rate, the more is forgotten, in all five seeds",
        all(
            a > b > c
            for a, b, c in zip(ends["usual"], ends["high"], ends["far too high"], strict=True)
        ),
    )
    digits = {name: mean(run["test_accuracy"] for run in found) for name, found in runs.items()}
    said["speed"] = claim(
        f"the accuracy on digits is highest at {found['rates']['high']} times the usual rate",
        max(digits, key=digits.get) == "high",
    )
    return said


def draw() -> None:
    """Loss curves of all training runs, and the forgetting curves."""
    import matplotlib.pyplot as plt

    from lab.core import plots

    figure, axes = plt.subplots(2, 5, figsize=(16, 6.6), layout="constrained")
    runs = record("training")["runs"]
    for axis, (name, title) in zip(axes.flat, TITLES.items(), strict=False):
        for key, color in (("train_loss", plots.TRAIN_COLOR), ("test_loss", plots.VAL_COLOR)):
            curves = [run[key] for run in runs[name]]
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves:
                axis.plot(epochs, curve, color=color, lw=0.7, alpha=0.35)
            axis.plot(epochs, [mean(v) for v in zip(*curves, strict=True)], color=color, lw=2,
                      label=key.replace("_loss", "").replace("train", "training"))  # fmt: skip
        axis.axhline(math.log(10), color="gray", ls=":", lw=1.2, label="chance, ln 10")
        axis.set(
            title=title, xlabel="epoch", ylabel="loss (log scale)", yscale="log", ylim=(0.08, 5)
        )
        axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=9)
    found, axis = record("forgetting"), axes[1, 4]
    for (name, factor), color in zip(
        found["rates"].items(), ("#2a8a57", "#7b4fa3", "#b03060"), strict=True
    ):
        curves = [run["cifar_accuracy"] for run in found["runs"][name]]
        for curve in curves:
            axis.plot(found["steps"], [100 * v for v in curve], color=color, lw=0.7, alpha=0.35)
        axis.plot(found["steps"], [100 * mean(v) for v in zip(*curves, strict=True)], color=color,
                  lw=2, label=f"{factor} x usual rate")  # fmt: skip
    axis.axhline(10, color="gray", ls=":", lw=1.2, label="chance")
    axis.set(title="forgetting of CIFAR-10", xlabel="fine-tuning step (log scale)",
             ylabel="CIFAR-10 accuracy (%)", xscale="symlog", ylim=(0, 100))  # fmt: skip
    axis.set_xticks(found["steps"], found["steps"])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9)
    figure.suptitle("Some mistakes are obvious in the loss curves, others leave no trace "
                    "(thin: five seeds, thick: their mean)")  # fmt: skip
    plots.save_figure(figure, PICTURE, 100)


def quiz() -> None:
    """A page without network: loss curves without names, to be matched to the mistakes."""
    runs = record("training")["runs"]
    names = list(TITLES)
    random.shuffle(names)
    curves = [
        {"mistake": TITLES[name], "train": runs[name][0]["train_loss"],
         "test": runs[name][0]["test_loss"]} for name in names
    ]  # fmt: skip
    page = (ROOT / "theory" / "_quiz.html").read_text(encoding="utf-8")
    QUIZ.parent.mkdir(exist_ok=True)
    QUIZ.write_text(page.replace("/* CURVES */ []", json.dumps(curves)), encoding="utf-8")
    print(QUIZ.relative_to(ROOT))


def main() -> None:
    if "--quiz" in sys.argv:
        quiz()
        return
    if "--draw" in sys.argv:
        draw()
    said = pretrained_said() | training_said()
    for what, phrase in forgetting_said().items():
        said[f"forgetting: {what}"] = phrase
    sources = {
        "about 3e-5 for a width of 768": "finetune.py, the usual rate of mode full",
        "more for narrower models": "Yang et al. 2022",
        "Gradients of all earlier batches add up": "definition of backward()",
    }
    check(__file__, said, sources)


if __name__ == "__main__":
    main()
