"""Why a ViT from scratch falls behind: the numbers in training_from_scratch.md, from our records.

python theory/training_from_scratch.py             # prints them, and fails if the text differs
python theory/training_from_scratch.py --draw      # draws training_from_scratch.png too
"""

import sys
from statistics import mean

import torch
from _text import ROOT, check, claim
from torch import Tensor

from lab.core import stats
from lab.report import Record, comparisons, read_runs, sentences
from model import VisionTransformer, ViTConfig

SOURCES = {  # definitions and results of others
    "a 3 x 3 convolution connects a pixel with its 8 neighbors": "definition",
    "With enough data they matter less: pretrained on ImageNet-1k alone (1.3 million images), "
    "ViTs stay behind ResNets; pretrained on JFT-300M (300 million), they are ahead":
        "Dosovitskiy et al. 2021, section 4.3 and figure 3",
    "trains for 300 epochs with strong augmentation": "Touvron et al. 2021",
    "![mnist-5k: the CNN leads": "the name of the data",
    "pretrained by DINOv2 on 142 million images": "Oquab et al. 2023",
}  # fmt: skip
VIT, CNN = "vit_64x4", "CNN twin of vit_64x4"
TUNED, HEAD = "vit_128x6_cifar10, full", "vit_128x6_cifar10, head"
BARE = "mnist-5k-of0.1-vit_128x6_cifar10-scratch"
COLORS = {VIT: "#c2571a", CNN: "#1f5fa8", TUNED: "#2a8a57", HEAD: "#7b4fa3"}
LABELS = {
    VIT: "ViT from scratch, {epochs} epochs",
    CNN: "CNN from scratch, {epochs} epochs",
    TUNED: "larger ViT, pretrained on CIFAR-10, {epochs} epochs",
    HEAD: "the same, head only",
}
CIFAR = {
    "ViT": "cifar10-jpeg-vit_128x6-s0",
    "ViT with Muon": "cifar10-jpeg-vit_128x6-muon-s0",
    "CNN": "cifar10-jpeg-cnn_42-85-168-s0",
}
PETS = "pets-vit_small_patch14_dinov2_saliency"
Lines = dict[str, dict[float, comparisons.Configuration]]  # model, then share of training images


def differing(one: Record, other: Record) -> set[str]:
    """The constants that two runs set differently; older runs lack some constants."""
    shared = one.constants.keys() & other.constants.keys()
    return {key for key in shared if one.constants[key] != other.constants[key]}


def result(run: Record) -> str:
    return sentences.result(comparisons.Configuration([run]))


def images_said(lines: Lines) -> dict[str, str]:
    """The ViT and its CNN twin by the number of training images of mnist-5k."""
    vit, cnn = lines[VIT], lines[CNN]
    few, twin = vit[0.01], cnn[0.01]
    assert all(differing(vit[share].first, cnn[share].first) == set() for share in vit)
    models = [c.first.config["model"] for c in (few, twin)]
    assert abs(models[0]["macs"] / models[1]["macs"] - 1) < 0.01
    assert len({c.first.constants["EPOCHS"] for line in (vit, cnn) for c in line.values()}) == 1
    digits, images = len(few.first.config["dataset"]["classes"]), sentences.train_images(few)
    assert (digits, images) == (10, 40)
    (seeds,) = {len(c.runs) for line in (vit, cnn) for share, c in line.items() if share < 1}
    trained, validated = at_the_end(few)
    fitted, generalized = at_the_end(twin)
    said = {
        "images": f"four images of each digit, {images} in all, and repeat them, so that the run "
                  f"takes as many steps as with all {sentences.images(vit[1.0])} of mnist-5k",
        "learned": f"the ViT classifies {sentences.percent(trained)} of its augmented training "
                   f"images correctly, but only {sentences.percent(validated)} of the validation "
                   f"images (means of {seeds} seeds)",
        "the CNN": claim(
            f"A CNN with as many multiply-adds ({models[1]['parameters']:,} instead of "
            f"{models[0]['parameters']:,} parameters), the same images, augmentation, learning "
            f"rate and number of steps fits its training images too ({sentences.percent(fitted)}), "
            f"but it generalizes better ({sentences.percent(generalized)} of the validation "
            "images)",
            trained > 0.999, fitted > 0.999, generalized > validated),
        "test images": f"on {few.first.metrics['test_images']:,} test images",
    }  # fmt: skip
    gaps, shares = [], sorted(vit)
    p_values = stats.holm([comparisons.welch(vit[share], cnn[share]) for share in shares])
    for share, p in zip(shares, p_values, strict=True):
        one, other = vit[share], cnn[share]
        gaps.append(other.mean - one.mean)
        said[f"{100 * share:g} %"] = (
            f"| {sentences.images(one)} | {sentences.result(one)} | {sentences.result(other)} "
            f"| {100 * gaps[-1]:.1f} | {'< 0.001' if p < 0.001 else f'{p:.3f}'} |"
        )
    clear = [sentences.images(vit[s]) for s, p in zip(shares, p_values, strict=True) if p < 0.05]
    unclear = [n for n in (sentences.images(vit[s]) for s in shares) if n not in clear]
    means = [vit[share].mean for share in shares]
    return said | {
        "gap": claim("The CNN is always ahead, and the fewer images, the larger the gap",
                     min(gaps) > 0, gaps == sorted(gaps, reverse=True)),
        "significant": claim(
            f"With {clear[0]}, {clear[1]} and {clear[2]} images the difference is significant "
            "(Welch's t-test with Holm's correction for five tests, p < 0.05); with "
            f"{unclear[0]} and {unclear[1]} images it is not",
            len(clear) == 3, len(unclear) == 2),
        "more images": claim(
            f"**More images** help most at the start: from {images} to "
            f"{sentences.images(vit[shares[1]])} images the ViT gains "
            f"{100 * (means[1] - means[0]):.1f} points; from {sentences.images(vit[shares[2]])} to "
            f"{sentences.images(vit[1.0])} it gains {100 * (means[-1] - means[2]):.1f} more",
            means[1] - means[0] > means[-1] - means[2]),
    }  # fmt: skip


def at_the_end(c: comparisons.Configuration) -> list[float]:
    """Training and validation accuracy after the last epoch, averaged over seeds."""
    return [mean(run.history[-1][key] for run in c.runs)
            for key in ("train_accuracy", "val_accuracy")]  # fmt: skip


def pixels_said() -> dict[str, str]:
    """A ViT whose pixels are shuffled can be given weights with which it computes the same."""
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(img_size=32, patch_size=8, embed_dim=48, num_heads=4,
                                        depth=3, num_classes=5)).double().eval()  # fmt: skip
    images = torch.randn(4, 3, 32, 32).double()
    within, between = torch.randperm(64), torch.randperm(16)

    def shuffle(images: Tensor) -> Tensor:
        patches = torch.nn.functional.unfold(images, 8, stride=8)  # (B, C * 64, 16)
        mixed = patches.unflatten(1, (3, 64))[:, :, within][..., between].flatten(1, 2)
        return torch.nn.functional.fold(mixed, 32, 8, stride=8)

    with torch.no_grad():
        before = model(images)
        unchanged = (model(shuffle(images)) - before).abs().max().item()
        kernel = model.patch_embed.proj.weight
        kernel.copy_(kernel.flatten(2)[..., within].unflatten(2, (8, 8)))
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:][:, between].clone()
        gap = (model(shuffle(images)) - before).abs().max().item()
    return {"shuffled": claim("gives the same output (within 1e-12)", gap < 1e-12 < unchanged)}


def cifar_said(runs: dict[str, Record]) -> dict[str, str]:
    """Few epochs on many images."""
    vit, muon, cnn = (runs[name] for name in CIFAR.values())
    assert differing(vit, muon) == {"OPTIMIZER"}
    assert {run.constants["OPTIMIZER"] for run in (vit, cnn)} == {"adamw"}
    ends = {name: runs[run].history[-1] for name, run in CIFAR.items()}
    data = vit.config["dataset"]
    trained = [sentences.percent(ends[name]["train_accuracy"]) for name in ("ViT", "CNN")]
    close = [abs(e["train_accuracy"] - e["val_accuracy"]) < 0.02 for e in ends.values()]
    p = stats.mcnemar(muon.predictions.correct, cnn.predictions.correct)[2]
    assert p > 0.05
    macs = [run.config["model"]["macs"] for run in (vit, cnn)]
    both = [runs[f"mnist-5k-{name}-s0"] for name in ("patch4", "cnn")]
    assert differing(*both) == set()
    assert {run.constants["OPTIMIZER"] for run in both} == {"muon"}
    longest = runs["cifar10-jpeg-vit_128x6-pretraining-muon"]
    fast = runs["cifar10-jpeg-cnn_42-85-168-pretraining-muon"]
    mixing = {"MIXUP", "CUTMIX", "MIX_PROBABILITY"}  # off in both runs, in two ways
    assert cnn.constants["MIX_PROBABILITY"] == fast.constants["MIXUP"] == 0
    assert fast.constants["CUTMIX"] == 0
    assert differing(cnn, fast) - mixing == {"OPTIMIZER", "LEARNING_RATE", "CROP_PADDING"}
    apart = accuracy(fast) - accuracy(longest)
    equal = [runs[f"cifar10-jpeg-{name}-equal-seconds-s0"]
             for name in ("vit_128x6", "cnn_42-85-168")]  # fmt: skip
    return {
        "epochs": f"{vit.metrics['epochs']} epochs on {data['train']:,} images of CIFAR-10",
        "results": claim(
            f"the ViT reaches {result(vit)} and a CNN with as many parameters {result(cnn)}",
            vit.metrics["test_accuracy_95"][1] < cnn.metrics["test_accuracy_95"][0],
        ),
        "training accuracy": claim(
            f"Training accuracy is only {trained[0]} for the ViT and {trained[1]} for the CNN, "
            "about the same as their validation accuracies", *close),
        "longer": claim(
            f"With Muon, cutmix and {longest.metrics['epochs']} epochs, the first "
            f"{longest.config['model']['small_images']['epochs']} at half the image size, "
            f"it reaches {result(longest)}",
            longest.constants["OPTIMIZER"] == "muon", longest.constants["CUTMIX"] > 0,
            accuracy(longest) > accuracy(muon)),
        "Muon": f"With Muon instead of AdamW and nothing else changed, the same "
                f"{muon.metrics['epochs']} epochs bring the ViT to {result(muon)}, which cannot be "
                f"distinguished from the CNN with AdamW (McNemar, p = {p:.2f})",
        "CNN with Muon": claim(
            "The CNN gains as much: with Muon, a learning rate of "
            f"{fast.constants['LEARNING_RATE']} and crops with "
            f"{fast.constants['CROP_PADDING']} instead of "
            f"{cnn.constants['CROP_PADDING']} pixels of padding, it reaches {result(fast)} after "
            f"{fast.metrics['epochs']} epochs, about what the ViT reaches after "
            f"{longest.metrics['epochs']}",
            accuracy(fast) - accuracy(cnn) > accuracy(muon) - accuracy(vit), abs(apart) < 0.01),
        "mnist-5k": claim(
            f"After {both[0].metrics['epochs']} epochs on the "
            f"{both[0].config['dataset']['train']:,} images of mnist-5k, with patches of "
            f"{both[0].constants['PATCH_SIZE']} pixels and Muon for both, the CNN "
            f"reaches {result(both[1])} and the ViT {result(both[0])}",
            both[0].metrics["test_accuracy_95"][1] < both[1].metrics["test_accuracy_95"][0]),
        "multiply-adds": f"the CNN needs {macs[1] / macs[0]:.1f} times as many multiply-adds",
        "equal time": claim(
            f"with equal training time it still leads, {sentences.percent(accuracy(equal[1]))} to "
            f"{sentences.percent(accuracy(equal[0]))}",
            equal[1].metrics["test_accuracy_95"][0] > equal[0].metrics["test_accuracy_95"][1]),
    }  # fmt: skip


def accuracy(run: Record) -> float:
    return run.metrics["test_accuracy"]


def pretrained_said(
    runs: dict[str, Record], lines: Lines, bare: comparisons.Configuration
) -> dict[str, str]:
    """The Pets runs, and pretraining on images that differ too much."""
    sample = {name: runs[f"{PETS}-{name}-s0"] for name in ("scratch", "head", "full")}
    breeds = {name: runs[f"pets-3breeds-224-{name}-s0"] for name in ("scratch", "full-decay0.7")}
    small, resnet = runs["pets-vit_192x12-s0"], runs["pets-3breeds-resnet18-s0"]
    data = [run.config["dataset"] for run in (sample["head"], breeds["scratch"])]
    sides = [run.constants["IMG_SIZE"] for run in (sample["head"], breeds["scratch"])]
    assert len(data[0]["classes"]) * 6 == data[0]["train"]
    low = sample["head"].metrics["test_accuracy_95"][0]
    assert low > sample["scratch"].metrics["test_accuracy_95"][1]
    gain = 100 * (accuracy(sample["head"]) - accuracy(sample["scratch"]))
    epochs = [run.metrics["epochs"] for run in (resnet, breeds["scratch"])]
    ahead = stats.mcnemar(resnet.predictions.correct, breeds["scratch"].predictions.correct)[2]
    tuned, head, scratch = (lines[name][0.01] for name in (TUNED, HEAD, VIT))
    epochs_each = [c.first.constants["EPOCHS"] for c in (tuned, scratch)]
    p = comparisons.welch(tuned, scratch)
    assert p > 0.05
    sizes = [c.first.config["model"]["parameters"] for c in (tuned, scratch)]
    assert round(sizes[0] / sizes[1]) == 6
    tenth = [bare, lines[TUNED][bare.first.share]]
    assert {c.first.constants["EPOCHS"] for c in tenth} == {epochs_each[0]}
    return {
        "data": f"| training | {data[0]['train']} images of {len(data[0]['classes'])} breeds, "
                f"{sides[0]} pixels | {data[1]['train']} images of three breeds, "
                f"{sides[1]} pixels |",
        "chance": f"| chance | {sentences.percent(1 / len(data[0]['classes']))} "
                  f"| {sentences.percent(1 / len(data[1]['classes']))} |",
        "scratch": f"| ViT-S/14 from scratch | {result(sample['scratch'])} "
                   f"| {result(breeds['scratch'])} |",
        "small": f"| ViT-Ti/16 from scratch, recipe of `train.py` | {result(small)} | not run |",
        "ResNet": f"| ResNet-18 from scratch | not run | {result(resnet)} |",
        "head": f"| ViT-S/14 pretrained, only the head trained | {result(sample['head'])} "
                "| not run at this size |",
        "full": f"| ViT-S/14 pretrained, fully fine-tuned | {result(sample['full'])} "
                f"| {result(breeds['full-decay0.7'])} |",
        "features": f"Training only the head gains {gain:.0f} points over training from scratch, "
                    "although no weight inside the ViT changes",
        "ResNet epochs": claim(
            "A ResNet-18 from scratch is clearly ahead of the ViT from scratch (McNemar, "
            f"p < 0.001), but it ran for {epochs[0]} epochs, the ViT for {epochs[1]}",
            ahead < 0.001, accuracy(resnet) > accuracy(breeds["scratch"])),
        "too far": f"After {epochs_each[0]} epochs on {sentences.images(tuned)} images of mnist-5k "
                   f"they reach {sentences.result(tuned)}, which cannot be distinguished from the "
                   f"ViT of the first table (Welch's t-test, p = {p:.2f}), a model with a sixth of "
                   f"the parameters that was trained from scratch for {epochs_each[1]} epochs",
        "head lower": claim(
            f"With only the head trained they reach {sentences.result(head)}, clearly less",
            head.around[1] < scratch.around[0]),
        "same steps": f"with {sentences.images(tenth[0])} images and {epochs_each[0]} epochs the "
                      f"pretrained ViT reaches {sentences.result(tenth[1])}, and without "
                      f"pretraining the same architecture reaches {sentences.result(tenth[0])}",
    }  # fmt: skip


def draw(runs: dict[str, Record], lines: Lines) -> None:
    """The figure: accuracy by number of images, and training and validation accuracy by epoch."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 4.4), width_ratios=(1.25, 1), layout="constrained"
    )
    for name, label in LABELS.items():
        line = lines[name]
        counts = [sentences.train_images(line[share]) for share in sorted(line)]
        means = [100 * line[share].mean for share in sorted(line)]
        errors = [[abs(100 * line[share].around[end] - mean)
                   for share, mean in zip(sorted(line), means, strict=True)]
                  for end in (0, 1)]  # fmt: skip
        left.errorbar(counts, means, errors, color=COLORS[name], fmt="o-", capsize=3,
                      label=label.format(epochs=line[1.0].first.constants["EPOCHS"]))  # fmt: skip
    left.set_xscale("log")
    left.set_xticks(counts, [f"{count:,}" for count in counts])
    left.minorticks_off()
    left.set(xlabel="training images (mnist-5k). Bars: standard deviation over 3 or 5 seeds",
             ylabel="test accuracy (%)",
             title="The fewer images, the further the CNN is ahead of the ViT;\n"
                   "pretraining on other images does not replace them")  # fmt: skip
    left.legend(loc="lower right")
    colors = {"ViT": COLORS[VIT], "ViT with Muon": "#e3a23c", "CNN": COLORS[CNN]}
    for name, run in CIFAR.items():
        history = runs[run].history
        epochs = [row["epoch"] for row in history]
        for key, style, label in (("val_accuracy", "o-", name), ("train_accuracy", "--", None)):
            right.plot(epochs, [100 * row[key] for row in history], style, color=colors[name],
                       label=label, markersize=4)  # fmt: skip
    right.plot([], [], "k-", label="validation images")
    right.plot([], [], "k--", label="training images")
    right.set_xticks(epochs)
    right.set(xlabel="epoch (CIFAR-10, JPEG copy)", ylabel="accuracy (%)",
              title="With many images and few epochs the ViT is\nslow, not overfitted; another "
                    "optimizer helps")  # fmt: skip
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / "theory" / "training_from_scratch.png", dpi=130)


def main() -> None:
    found = read_runs(ROOT / "results" / "official").runs
    short = read_runs(ROOT / "theory" / "patch_size").runs
    runs = {run.folder.name: run for run in [*found, *short]}
    configs = comparisons.configurations(found)
    (series,) = comparisons.efficiencies(configs)
    (bare,) = (c for c in configs if c.name == BARE)
    lines = {line[0].first.model: {c.first.share: c for c in line} for line in series}
    if "--draw" in sys.argv:
        draw(runs, lines)
    numbers = (images_said(lines) | pixels_said() | cifar_said(runs)
               | pretrained_said(runs, lines, bare))  # fmt: skip
    check(__file__, numbers, SOURCES)


if __name__ == "__main__":
    main()
