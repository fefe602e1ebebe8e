"""Turns the results into sentences."""

from lab.core import stats
from lab.report.comparisons import (
    Configuration,
    MainResults,
    Pair,
    compare_pairs,
    distinct_labels,
    finetuning_groups,
    main_results,
    select_models,
    welch,
)
from lab.report.records import Found


def percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f} %"


def plural(count: int, noun: str) -> str:
    """A number and its noun, such as "1 epoch" or "1,295 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def result(c: Configuration) -> str:
    """Test accuracy with its 95 % interval, "98.8 % (97.2 to 99.6 %)", or over seeds with its
    standard deviation, "98.8 ± 0.3 % over 5 seeds"."""
    if c.std is None:
        low, high = c.around
        return f"{percent(c.mean)} ({100 * low:.1f} to {percent(high)})"
    return f"{100 * c.mean:.1f} ± {percent(c.std)} over {len(c.runs)} seeds"


def train_images(c: Configuration) -> int:
    """The number of training images that a run used."""
    dataset = c.first.config["dataset"]
    return int(dataset.get("train_images", dataset["train"]))


def images(c: Configuration) -> str:
    """The number of training images as text, "1,295"."""
    return f"{train_images(c):,}"


def efficiency_sentence(series: list[list[Configuration]]) -> str:
    """How many training images each model needs to come close to its own best result."""
    labels = distinct_labels((line[-1].first.model, "", line[-1].name) for line in series)
    parts = []
    for line, label in zip(series, labels, strict=True):
        least, most = line[0], line[-1]
        close = next(c for c in line if c.mean >= most.mean - 0.05)
        parts.append(
            f"{label} reaches {percent(least.mean)} with "
            f"{plural(train_images(least), 'image')} and {percent(most.mean)} with {images(most)}; "
            f"with {images(close)} it is within 5 percentage points of that. "
        )
    return "".join(parts) + "All runs of a model took the same number of steps."


def pair_sentence(pair: Pair) -> str:
    """The result of a paired test."""
    count = pair.only_a + pair.only_b
    if not count:
        return "Both models are correct on exactly the same images."
    undecided = f"exactly one of them is correct on {plural(count, 'image')}"
    if pair.p_holm < 0.05:
        better = pair.b if pair.only_b > pair.only_a else pair.a
        name = better.model if pair.a.model != pair.b.model else better.folder.name
        return (
            f"{name} is significantly better: {undecided}, and in "
            f"{max(pair.only_a, pair.only_b):,} of these cases it is {name}."
        )
    if pair.p < 0.05:
        return "The difference is significant only without correction for the number of pairs."
    return f"The difference is not significant: {undecided}."


def summary(configs: list[Configuration]) -> list[str]:
    """At most four sentences: one for each of the main results, and one about significance."""
    results = main_results(configs)
    said = [vit_sentence(results), cnn_sentence(results), finetuned_sentence(results, configs),
            pairs_sentence(configs)]  # fmt: skip
    return [text for text in said if text] or ["There are no finished runs of your own yet."]


def vit_sentence(results: MainResults) -> str:
    if not (vit := results.vit):
        return ""
    tie = ""
    if results.tied:
        tie = (f" {plural(results.tied, 'other configuration')} reached the same validation "
               "accuracy; this one has the lowest validation loss.")  # fmt: skip
    parameters = vit.first.config["model"]["parameters"]
    return (f"The ViT {vit.first.model} ({parameters:,} parameters, {vit.first.recipe}) reaches "
            f"{result(vit)} on {vit.first.test_set}.{tie}")  # fmt: skip


def cnn_sentence(results: MainResults) -> str:
    """A CNN and its ViT on an equal budget, with a significance test."""
    vit, cnn = results.vit, results.cnn
    if not cnn:
        return ""
    if not vit or not results.equal:
        return (f"{cnn.first.model} ({cnn.first.recipe}) reaches {result(cnn)} on "
                f"{cnn.first.test_set}.")  # fmt: skip
    budget = f"after the same {plural(cnn.first.constants['EPOCHS'], 'epoch')}"
    if results.equal == "seconds":
        budget = (f"in about the same training time ({cnn.first.recipe}, the ViT "
                  f"{vit.first.recipe})")  # fmt: skip
    equal = {"macs": ", a CNN with as many MACs,", "params": ", a CNN with as many parameters,"}
    match = equal.get(str(cnn.first.config["twin_of"].get("matched")), "")
    text = f"The CNN twin of {vit.first.model}{match} reaches {result(cnn)} {budget}"
    points = 100 * (cnn.mean - vit.mean)
    if round(points, 1) == 0:
        return f"{text}, the same as the ViT."
    order = "higher" if points > 0 else "lower"
    text += f", {abs(points):.1f} percentage points {order} than the ViT"
    p, test = _twin_test(vit, cnn)
    if p is None:
        return f"{text}."
    verdict = "significant" if p < 0.05 else "not significant"
    value = f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
    return f"{text}; the difference is {verdict} ({test}, {value})."


def _twin_test(vit: Configuration, cnn: Configuration) -> tuple[float | None, str]:
    """Welch's t-test over seeds, or McNemar's test on the images if both have a single seed."""
    if (vit.std is None) != (cnn.std is None):
        return None, ""  # a mean and a single run: neither test applies
    if vit.std is None:
        a, b = vit.first.predictions, cnn.first.predictions
        return stats.mcnemar(a.correct, b.correct)[-1], "McNemar's test"
    if vit.std + cnn.std == 0:
        return None, ""
    return welch(vit, cnn), "Welch's t-test over seeds"


def finetuned_sentence(results: MainResults, configs: list[Configuration]) -> str:
    """The best fine-tuned model, beside its head-only and from-scratch runs."""
    if not (tuned := results.finetuned):
        return ""
    text = (f"Fine-tuning {tuned.first.pretrained} ({tuned.first.mode}, {tuned.first.recipe}) "
            f"reaches {result(tuned)} on {tuned.first.test_set}")  # fmt: skip
    group = next((g for g in finetuning_groups(configs) if tuned in g), [])
    names = {"head": "training only the head", "scratch": "training from random weights"}
    for mode, name in names.items():
        others = [c for c in group if c.first.constants["MODE"] == mode and c is not tuned]
        if others:
            other = max(others, key=lambda c: c.validation_score)
            same = other.first.recipe == tuned.first.recipe
            recipe = "" if same else f" ({other.first.recipe})"
            text += f"; {name}{recipe} reaches {percent(other.mean)}"
    return f"{text}."


def pairs_sentence(configs: list[Configuration]) -> str:
    """How many pairs of the user's models differ significantly."""
    own = [c for c in configs if not c.first.is_reference]
    pairs = [pair for some in select_models(own) for pair in compare_pairs(some)]
    if not pairs:
        return ""
    significant = sum(pair.p_holm < 0.05 for pair in pairs)
    if len(pairs) == 1:
        verdict = "differ" if significant else "do not differ"
        return f"The two models on the same test images {verdict} significantly (McNemar's test)."
    test = "McNemar's test with Holm's correction"
    if not significant:
        return f"No two models on the same test images differ significantly ({test})."
    if significant == len(pairs):
        return f"All pairs of models on the same test images differ significantly ({test})."
    return (
        f"{significant} of {plural(len(pairs), 'pair')} of models on the same test images "
        f"{'differs' if significant == 1 else 'differ'} significantly ({test}); for the others, "
        "the differences may be due to chance."
    )


def provenance(found: Found) -> str:
    """The number of runs on the page, and the software and hardware of the user's newest run."""
    finished = [run for run in found.runs if run.metrics and not run.sweep]
    own = [run for run in finished if not run.is_reference]
    text = f"{plural(len(own), 'own run')} and {plural(len(finished) - len(own), 'reference run')}"
    if len(own) == len(finished):
        text = plural(len(own), "run")
    if own:
        newest = max(own, key=lambda run: run.config.get("started", ""))
        config = newest.config
        versions, hardware = config.get("versions", {}), config.get("hardware", {})
        changes = " with uncommitted changes" if config.get("uncommitted_changes") else ""
        commit = config.get("commit")
        made = [
            f"commit {commit[:8]}{changes}" if commit else "",
            f"Python {config.get('python')}",
            *(f"{name} {versions[name]}" for name in ("torch", "timm") if name in versions),
            str(hardware.get("gpu") or hardware.get("cpu") or ""),
        ]
        text += f"; newest run: {', '.join(filter(None, made))}"
    return f"{text}."
