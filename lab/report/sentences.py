"""Turns the results into sentences."""

from pathlib import Path
from typing import Any

from lab.attention import score_report
from lab.report.comparisons import (
    Configuration,
    Pair,
    comparable_key,
    group_by,
    is_reference,
    twins,
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
    parts = []
    for line in series:
        least, most = line[0], line[-1]
        close = next(c for c in line if c.mean >= most.mean - 0.05)
        parts.append(
            f"{most.first.model} reaches {percent(least.mean)} with "
            f"{plural(train_images(least), 'image')} and {percent(most.mean)} with {images(most)}; "
            f"with {images(close)} it is within 5 points of that. "
        )
    return "".join(parts) + "All runs of a model took the same number of steps."


def pair_sentence(pair: Pair) -> str:
    """The result of a paired test."""
    count = pair.only_a + pair.only_b
    if not count:
        return "Both models are correct on exactly the same images."
    undecided = f"exactly one of them is correct on {plural(count, 'image')}"
    if pair.p_holm < 0.05:
        better, worse = (pair.b, pair.a) if pair.only_b > pair.only_a else (pair.a, pair.b)
        return (
            f"{better.model} is significantly better than {worse.model}: {undecided}, and in "
            f"{max(pair.only_a, pair.only_b):,} of these cases it is {better.model}."
        )
    if pair.p < 0.05:
        return "The difference is significant only without correction for the number of pairs."
    return f"The difference is not significant: {undecided}."


def attention_sentence(metrics: dict[str, Any], dataset: str) -> str:
    """The result of a run of attention_viz.py."""
    if "animal_share" in metrics:  # of --score
        return score_report.verdict(metrics)[-1]
    return "Photos: Oxford-IIIT Pet, CC BY-SA 4.0." if dataset == "pets" else ""


def summary(found: Found, configs: list[Configuration], pairs_by_test_set: list[list[Pair]],
            tunings: list[list[Configuration]], place: Path) -> list[str]:  # fmt: skip
    """The most important results, to be read within a minute."""
    said = [_overview(found)]
    main = [c for c in configs if not c.first.sweep and c.first.share == 1]
    own = [c for c in main if not is_reference(c.first, place)]
    pairs = [pair for pairs in pairs_by_test_set for pair in pairs]
    if own and len(own) < len(main):
        said.append("This summary is about your own runs; the page also shows the reference runs "
                    "that come with the project.")  # fmt: skip
        main, tunings = own, [t for t in tunings if not is_reference(t[0].first, place)]
        pairs = [p for p in pairs if not (is_reference(p.a, place) and is_reference(p.b, place))]
    sets = group_by(main, lambda c: comparable_key(c.first, place))
    said += [_best_model(same) for same in sorted(sets, key=len, reverse=True)[:4]]
    said += [_twin_sentence(*pair) for pair in twins(main, place)][:3]
    said += [text for text in map(_tuning_sentence, tunings) if text][:2]
    if pairs:
        significant = sum(pair.p_holm < 0.05 for pair in pairs)
        verb = "differs" if significant == 1 else "differ"
        said.append(
            f"Of {plural(len(pairs), 'pair')} of models on the same test images, {significant} "
            f"{verb} significantly (McNemar's test with Holm's correction). For the others, the "
            "order of the accuracies may be chance."
        )
    return said


def _overview(found: Found) -> str:
    finished = sum(run.metrics is not None for run in found.runs)
    text = f"This report covers {plural(finished, 'finished run')}"
    if stopped := len(found.runs) - finished:
        text += f" and {plural(stopped, 'unfinished run')}"
    if left_out := len(found.left_out):
        text += f"; the end of the page lists {plural(left_out, 'folder')} with problems"
    return f"{text}."


def _best_model(configs: list[Configuration]) -> str:
    """The best configuration by validation accuracy among those with the same test images."""
    best = max(configs, key=lambda c: c.validation_score)
    run = best.first
    dataset, test_images = run.config["dataset"]["name"], run.metrics["test_images"]
    model = f"{run.pretrained} ({run.mode})" if run.pretrained else run.model
    return (
        f"On {dataset} ({plural(test_images, 'test image')}), {model} has the best validation "
        f"accuracy; its test accuracy is {result(best)}."
    )


def _twin_sentence(equal: str, vit: Configuration, cnn: Configuration) -> str:
    """A ViT and its CNN twin on an equal budget; over seeds with Welch's t-test."""
    epochs = [plural(c.first.constants["EPOCHS"], "epoch") for c in (vit, cnn)]
    if equal == "epochs":
        budget = f"After {epochs[0]}"
    else:
        budget = f"In about the same training time ({epochs[0]} of the ViT, {epochs[1]} of the CNN)"
    difference = 100 * (vit.mean - cnn.mean)
    text = (
        f"{budget} on {vit.first.config['dataset']['name']}, the ViT {vit.first.model} reaches "
        f"{result(vit)} and its CNN twin {result(cnn)}, a difference of {difference:+.1f} points"
    )
    if vit.std is None or cnn.std is None or vit.std + cnn.std == 0:
        return f"{text}."
    from scipy.stats import ttest_ind  # slow to import

    p = ttest_ind(vit.accuracies, cnn.accuracies, equal_var=False).pvalue
    verdict = "significant" if p < 0.05 else "not significant"
    return f"{text}, which is {verdict} over seeds (Welch's t-test, p = {p:.2g})."


def _tuning_sentence(group: list[Configuration]) -> str:
    """Head-only and full fine-tuning of the same pretrained model; "" if one is missing."""
    by_mode = {c.first.constants["MODE"]: c for c in group}
    if not {"head", "full"} <= by_mode.keys():
        return ""
    head = by_mode["head"]
    full = max((c for c in group if c.first.constants["MODE"] == "full"),
               key=lambda c: c.validation_score)  # fmt: skip
    model = head.first.config["model"]
    fraction = model["trainable_parameters"] / max(1, model["parameters"])
    text = (
        f"On {head.first.config['dataset']['name']}, full fine-tuning of {head.first.pretrained} "
        f"reaches {percent(full.mean)}. Training only the head ({percent(fraction, 2)} of the "
        f"parameters) reaches {percent(head.mean)}"
    )
    if "scratch" in by_mode:
        text += f", and training from random weights {percent(by_mode['scratch'].mean)}"
    return f"{text}."
