"""What attention_viz.py draws: images are chosen, looked at, and become pictures and a page."""

import difflib
from collections.abc import Callable
from types import SimpleNamespace

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from lab.attention import plots as plots
from lab.attention.extraction import BlockAttention, attention_maps, grid_of
from lab.attention.page import PageImage, write_page
from lab.attention.plots import AttentionExample
from lab.attention.saliency import METHODS, classes_of, map_of, methods_of, pick, raw, reads
from lab.core import Run, UserError, checkpoints
from lab.data.augment import center_crop
from lab.data.loaders import Loaders
from lab.models.pretrained import Pretrained

RAW = "attention"
CHOICE = 200  # photographs of the test split that are predicted, to choose from
CHOICE_PIXELS = 3_000_000  # so many pixels of small images: digits and CIFAR have few mistakes
FILES = ("overview.jpg", "heads.jpg", "distance.png", "positions.png", "attention.html")
WHO = {"class": "the class token", "mean": "the mean patch"}


def viewing(pretrained: Pretrained, loaders: Loaders, c: SimpleNamespace) -> Callable[[Run], None]:
    """What attention_viz.py does without --score, once a run's folder is open.

    Raises: UserError, for a method, block, head or class that this model has not.
    """
    model, names = pretrained.model, class_names(pretrained)
    first = loaders.normalised(loaders.data.test.images(slice(0, 1)))
    reasons = methods_of(model, first)
    if c.METHOD != "all" and reasons[c.METHOD]:
        raise UserError(reasons[c.METHOD])
    methods = [m for m in METHODS if not reasons[m] and c.METHOD in ("all", m)]
    skipped = {m: why for m, why in reasons.items() if why and c.METHOD == "all"}
    target = class_index(c.TARGET_CLASS, names)
    if "raw" in methods:
        pick(raw(model, first), c.LAYER, c.HEAD)

    def view(run: Run) -> None:
        for why in dict.fromkeys(skipped.values()):
            print(f"without {', '.join(m for m in skipped if skipped[m] == why)}: {why}")
        rows = choose(model, loaders, names, c.NUM_IMAGES, c.SEED)
        looked = []
        for part in rows.split(c.BATCH_SIZE):
            looked += look(model, loaders, part, names, methods, target, c)
        shown = [{"name": x.name, "label": x.label, "prediction": x.prediction,
                  "confidence": round(x.confidence, 4)} for x in looked]  # fmt: skip
        record = {"images": shown, "methods": methods, "skipped": skipped}
        who = WHO[reads(model)] if looked[0].raw else "the model"
        title = f"{run.folder.name}: where {who} looks"
        plots.overview(run.folder / "overview.jpg", looked, title)
        if looked[0].raw:
            what = f"{looked[0].title}: what {who} attends to, in every block and head"
            plots.heads(run.folder / "heads.jpg", looked[0], what)
            record["distance"] = distances(run, model, loaders, rows)
            draw_positions(run, model, first)
        pages = []
        for x in looked:
            others = {name: m for name, m in x.maps.items() if not name.startswith(RAW)}
            pages.append(PageImage(x.pixels, x.title, x.correct, x.raw, others))
        notes = notes_for(model, bool(looked[0].raw))
        write_page(run.folder / "attention.html", title, notes, pages)
        checkpoints.write_json(run.folder / "metrics.json", {**record, "open": "attention.html"})
        print("\n".join(str(run.folder / name) for name in FILES if (run.folder / name).exists()))

    return view


def class_names(pretrained: Pretrained) -> list[str]:
    """The names of the model's classes: its own, ImageNet's, or numbers; []: it has no head."""
    count = classes_of(pretrained.model)
    if pretrained.classes:
        return pretrained.classes
    subset = infer_imagenet_subset(pretrained.model) if count else None
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(count)]
    return [f"class {i}" for i in range(count)]


def class_index(name: str | None, names: list[str]) -> int | None:
    """The number of TARGET_CLASS.

    Raises: UserError, with names like it, for a class that the model does not know.
    """
    if name is None or name in names:
        return names.index(name) if name else None
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
    raise UserError(
        f"TARGET_CLASS={name!r} is none of the model's {len(names)} classes"
        + (f", such as {', '.join(close)}" if names else ": it came without a head")
    )


def predict(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and class of each image (B,); zeros for a model without classes."""
    if not classes_of(model):
        return torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.long)
    with torch.no_grad():
        return tuple(x.cpu() for x in model(images).softmax(1).max(1))


def choose(model: nn.Module, loaders: Loaders, names: list[str], count: int, seed: int) -> Tensor:
    """Indices of test images: by chance, but half of them wrong where so many are."""
    test = loaders.data.test
    enough = max(CHOICE, CHOICE_PIXELS // loaders.preprocess.img_size**2)
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:enough]
    if loaders.data.classes != names:  # nothing is right or wrong
        return rows[:count].sort().values if not loaders.data.classes else rows[:count]
    found = [predict(model, loaders.normalised(test.images(part)))[1]
             for part in rows.split(loaders.batch_size)]  # fmt: skip
    right = torch.cat(found) == test.labels[rows]
    wrong = rows[~right][: count // 2]
    good = rows[right][: count - len(wrong)]
    return torch.cat([good, wrong, rows[~right][len(wrong) :]])[:count]


def look(
    model: nn.Module,
    loaders: Loaders,
    rows: Tensor,
    names: list[str],
    methods: list[str],
    target: int | None,
    c: SimpleNamespace,
) -> list[AttentionExample]:
    """These test images with the model's predictions and maps."""
    data = loaders.data
    pixels = data.test.images(rows)
    images = loaders.normalised(pixels)
    confidence, predicted = predict(model, images)
    targets = None if target is None else torch.full((len(rows),), target, device=images.device)
    maps, blocks = {}, []
    for method in methods:
        if method == "raw":
            blocks = raw(model, images)
            where = f"block {c.LAYER if c.LAYER > 0 else len(blocks) + 1 + c.LAYER}"
            head = "mean of heads" if c.HEAD is None else f"head {c.HEAD}"
            maps[f"{RAW}, {where}, {head}"] = pick(blocks, c.LAYER, c.HEAD)
        else:
            about = "" if target is None or method == "rollout" else f" for {names[target]}"
            maps[method + about] = map_of(method, model, images, targets)
    shown = (center_crop(pixels, loaders.preprocess) * 255).round().byte()
    shown = shown.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    labels = data.test.labels[rows]
    return [
        AttentionExample(
            pixels=shown[i],
            name=data.test.names[row],
            label=data.classes[labels[i]] if data.classes else None,
            prediction=names[predicted[i]] if names else None,
            confidence=float(confidence[i]),
            correct=bool(predicted[i] == labels[i]) if data.classes == names else None,
            raw=[block[i].cpu().numpy() for block in blocks],
            maps={name: values[i].cpu().numpy() for name, values in maps.items()},
        )
        for i, row in enumerate(rows.tolist())
    ]


def distances(run: Run, model: nn.Module, loaders: Loaders, rows: Tensor) -> list[list[float]]:
    """Draws the mean attention distance over the chosen images; pixels, by block and head."""
    size = loaders.preprocess.img_size

    def measure(block: BlockAttention) -> tuple[Tensor, float]:
        pixels = size / block.grid[0]
        return block.distance(pixels), evenly(block.grid, pixels)

    parts = []
    for part in rows.split(loaders.batch_size):
        images = loaders.normalised(loaders.data.test.images(part))
        parts.append(attention_maps(model, images, measure)[1])
    found = [torch.cat([block[0] for block in blocks]).mean(0).tolist()
             for blocks in zip(*parts, strict=True)]  # fmt: skip
    uniform = [expected for _, expected in parts[0]]
    what = f"how far patches look ({size} x {size} pixels, mean of {len(rows)} images)"
    plots.distances(run.folder / "distance.png", found, uniform, f"{run.folder.name}: {what}")
    return [[round(value, 3) for value in block] for block in found]


def evenly(grid: tuple[int, int], pixels: float) -> float:
    """The mean distance between two patches of a grid, a patch and itself included, in pixels."""
    at = torch.cartesian_prod(*(torch.arange(n).float() for n in grid))
    return float(torch.cdist(at, at).mean() * pixels)


def draw_positions(run: Run, model: nn.Module, image: Tensor) -> None:
    """The similarity of position embeddings, for models that have them (a Swin has none)."""
    embeddings = getattr(model, "pos_embed", None)
    if embeddings is None:
        return
    rows, columns = grid_of(model, image)
    patches = embeddings.detach().cpu()[0, -rows * columns :]
    plots.positions(run.folder / "positions.png", patches, (rows, columns), f"{run.folder.name}: "
                    "similarity of the position embedding of a patch with all others")  # fmt: skip


def notes_for(model: nn.Module, attends: bool) -> list[str]:
    """What the page says of itself."""
    if not attends:
        return ["Grad-CAM: bright places raised the logit of the class that is explained."]
    return [
        f"Attention of one block: how much {WHO[reads(model)]} takes from each patch. Values are "
        "shares of all attention; what class token and registers keep is missing to 100 %.",
        "Rollout follows attention through all blocks. Gradient rollout and Grad-CAM ask what "
        "raised the logit of one class. A bright patch is no proof that the model uses it; "
        "SCORE = True in attention_viz.py measures that.",
    ]
