"""What the runs say, in sentences made from their records."""

from pathlib import Path
from typing import Any

from scipy.stats import ttest_ind

from lab.attention.score_report import verdict
from lab.report.comparisons import Configuration, Pair, groups, is_reference, setting, twins
from lab.report.records import Found


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def result(c: Configuration) -> str:
    """Accuracy with what surrounds it: "98.8 % (97.2 to 99.6 %)", or over seeds "98.8 ± 0.3 %"."""
    if c.deviation is None:
        low, high = c.around
        return f"{percent(c.mean)} ({100 * low:.1f} to {percent(high)})"
    return f"{100 * c.mean:.1f} ± {percent(c.deviation)} over {len(c.runs)} seeds"


def counted(found: Found) -> str:
    """How many runs there are, and of what kind."""
    finished = sum(run.metrics is not None for run in found.runs)
    parts = [f"{finished:,} finished run{'s' * (finished != 1)}"]
    if stopped := len(found.runs) - finished:
        parts.append(f"{stopped:,} that stopped early")
    if found.left_out:
        parts.append(f"{len(found.left_out):,} folders with a remark, see the end")
    return f"{', '.join(parts)}."


def best_on(configs: list[Configuration]) -> str:
    """The best configuration by validation of those tested on the same images."""
    best = max(configs, key=lambda c: c.validation)
    run = best.first
    where = f"{run.config['dataset']['name']} ({run.metrics['test_images']:,} test images)"
    return (
        f"{where}: validation chooses {run.model} ({run.task.lower()}), which has {result(best)} "
        "of the test images right."
    )


def twin(equal: str, vit: Configuration, cnn: Configuration) -> str:
    """A ViT and its CNN twin on an equal budget; over seeds by Welch's t-test."""
    where, epochs = vit.first.config["dataset"]["name"], vit.first.constants["EPOCHS"]
    budget = f"{epochs} epochs each" if equal == "epochs" else "as many seconds"
    said = (
        f"On {where}, {budget}, the ViT {vit.first.model} has {result(vit)}, its CNN twin "
        f"{result(cnn)}: {100 * (vit.mean - cnn.mean):+.1f} points"
    )
    if vit.deviation is None or cnn.deviation is None:
        return f"{said}."
    p = ttest_ind(vit.accuracies, cnn.accuracies, equal_var=False).pvalue
    told = "more than seeds explain" if p < 0.05 else "no more than seeds explain"
    return f"{said}, {told} (Welch's t-test, p = {p:.2g})."


def tuning(group: list[Configuration]) -> str:
    """The head alone beside all of the weights, of the same pretrained model."""
    by_mode = {c.first.constants["MODE"]: c for c in group}
    if not {"head", "full"} <= by_mode.keys():
        return ""
    head = by_mode["head"]
    fulls = [c for c in group if c.first.constants["MODE"] == "full"]
    full = max(fulls, key=lambda c: c.validation)
    model = head.first.config["model"]
    share = model["trainable_parameters"] / model["parameters"]
    said = (
        f"Fine-tuned on {head.first.config['dataset']['name']}, "
        f"{head.first.model.partition(',')[0]} reaches {percent(full.mean)} in full and "
        f"{percent(head.mean)} by the head alone, which is {percent(share, 2)} of its weights"
    )
    if "scratch" in by_mode:
        said += f"; without pretraining it is {percent(by_mode['scratch'].mean)}"
    return f"{said}."


def efficiency(series: list[list[Configuration]]) -> str:
    """Which model needs how few images: the smallest share that comes near its own best."""
    said = []
    for line in series:
        least, most = line[0], line[-1]
        near = next(c for c in line if c.mean >= most.mean - 0.05)
        said.append(
            f"{most.first.model} goes from {percent(least.mean)} "
            f"({images(least)} images) to {percent(most.mean)} ({images(most)}) and is within 5 "
            f"points of that from {images(near)} images on"
        )
    return "; ".join(said) + ". The runs of each model all took the same number of steps."


def images(c: Configuration) -> str:
    """Training images that the runs saw."""
    data = c.first.config["dataset"]
    return f"{data.get('train_images', data['train']):,}"


def attention(metrics: dict[str, Any], dataset: str) -> str:
    """What a folder of attention_viz.py shows."""
    if "animal_share" in metrics:  # of --score
        return verdict(metrics)[-1]
    return "Photographs: Oxford-IIIT Pet, CC BY-SA 4.0." if dataset == "pets" else ""


def summary(found: Found, configs: list[Configuration], tested_pairs: list[list[Pair]],
            tunings: list[list[Configuration]], place: Path) -> list[str]:  # fmt: skip
    """What a person can read in a minute."""
    said = [counted(found)]
    plain = [c for c in configs if not c.first.sweep and c.first.share == 1]
    own = [c for c in plain if not is_reference(c.first, place)]
    if own and len(own) < len(plain):
        said[0] += " Of your own, and not those that come with the project:"
        plain, tunings = own, [t for t in tunings if not is_reference(t[0].first, place)]
    sets = groups(plain, lambda c: setting(c.first, place))
    said += [best_on(same) for same in sorted(sets, key=len, reverse=True)[:4]]
    said += [twin(*pair) for pair in twins(plain, place)][:3]
    said += [text for text in map(tuning, tunings) if text][:2]
    told = [pair for pairs in tested_pairs for pair in pairs]
    if plain is own:
        told = [p for p in told if not all(is_reference(r, place) for r in (p.one, p.other))]
    if told:
        sure = sum(pair.p_holm < 0.05 for pair in told)
        said.append(
            f"Of {len(told)} pairs of models compared on the same test images, {sure} differ by "
            "more than chance explains; the order of the others' accuracies means nothing."
        )
    return said
