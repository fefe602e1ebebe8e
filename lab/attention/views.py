"""Draws the figures and the page of attention_viz.py, except for those of --score."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lab.attention import plots, saliency
from lab.attention.extraction import BlockAttention, attention_maps, patch_grid
from lab.attention.pages import LiveContent, runs_in_browser, write_live_page, write_maps_page
from lab.attention.plots import AttentionExample
from lab.core import Run, UserError, checkpoints
from lab.data import Loaders
from lab.models import Pretrained

FILES = ("overview.jpg", "heads.jpg", "distance.png", "positions.png", "attention.html")
_NUM_CANDIDATES = 200  # large images that are predicted to choose NUM_IMAGES from
_CANDIDATE_PIXELS = 3_000_000  # more candidates if images are small, because mistakes are rare
_MAX_EXAMPLES = 12  # on the live page, besides the chosen images
_QUERY_NAMES = {"token": "the class token", "avg": "the average patch"}


@dataclass(frozen=True)
class ViewConfig:
    """What to show; the constants of attention_viz.py explain each field.

    Raises UserError for a number of images below one.
    """

    method: str = "all"
    layer: int = -1
    head: int | None = None
    target_class: str | None = None
    num_images: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UserError(f"NUM_IMAGES={self.num_images} must be at least 1, such as 6")


class Views:
    """Draws the attention of a model. `trained_by` is the run that trained it, if one did.

    Raises: UserError for a method, block, head or class that the model does not have, before a
        run folder exists.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        loaders: Loaders,
        config: ViewConfig,
        trained_by: Run | None = None,
    ):
        self.model, self.loaders, self.config = pretrained.model, loaders, config
        self.trained_by = trained_by
        self.class_names = pretrained.class_names
        self.target = class_index(config.target_class, self.class_names)
        self.first_image = loaders.normalize(loaders.data.test.images(slice(0, 1)))
        reasons = saliency.unavailable_methods(self.model, self.first_image)
        if config.method in reasons:
            raise UserError(reasons[config.method])
        wanted = saliency.METHODS if config.method == "all" else [config.method]
        self.methods = [name for name in wanted if name not in reasons]
        self.skipped = {name: reasons[name] for name in wanted if name in reasons}
        if "raw" in self.methods:
            saliency.select_map(
                saliency.raw_attention(self.model, self.first_image), config.layer, config.head
            )

    def write(self, run: Run) -> None:
        """Writes the figures, the page and metrics.json."""
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, its in self.skipped.items() if its == reason]
            print(f"skipping {', '.join(names)}: {reason}")
        rows = self._choose_images()
        examples = self._examples(rows, self.methods)
        first = examples[0]
        query = _QUERY_NAMES[saliency.pooled_query(self.model)] if first.raw else "the model"
        title = f"{run.folder.name}: where {query} looks"
        record = {
            "images": [
                {"name": x.name, "label": x.label, "prediction": x.prediction,
                 "confidence": round(x.confidence, 4)} for x in examples
            ],
            "methods": self.methods,
            "skipped": self.skipped,
        }  # fmt: skip
        plots.plot_overview(run.folder / "overview.jpg", examples, title)
        plots.plot_example(run.folder / "example.png", first)
        if first.raw:
            heads_title = f"{first.title}: attention of {query} in every block and head"
            plots.plot_heads(run.folder / "heads.jpg", first, heads_title)
            record["distance"] = self._plot_distances(run, rows)
            self._plot_positions(run)
        page = run.folder / "attention.html"
        record["live"] = runs_in_browser(self.model)
        if record["live"]:
            write_live_page(page, self._live_content(run.folder.name, rows))
        else:
            write_maps_page(page, title, self._notes(), examples)
        checkpoints.write_json(run.folder / "metrics.json", {**record, "open": "attention.html"})
        print("\n".join(str(run.folder / name) for name in FILES if (run.folder / name).exists()))

    def write_live_page(self, path: Path, name: str) -> int | None:
        """Writes only the live page, for others to try a model called `name`.

        Returns: the number of images that it shows; None if there is no page for this model.
        """
        if not runs_in_browser(self.model):
            return None
        content = self._live_content(name, self._choose_images(), for_others=True)
        write_live_page(path, content)
        return len(content.examples)

    def _predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence and class of each image, (B,); zeros for a model without classes."""
        if not saliency.count_classes(self.model):
            return torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.long)
        with torch.no_grad():
            confidence, predicted = self.model(images).softmax(1).max(1)
        return confidence.cpu(), predicted.cpu()

    def _choose_images(self) -> Tensor:
        """Random test images; up to half of them misclassified; those come last."""
        test, count = self.loaders.data.test, self.config.num_images
        img_size = self.loaders.preprocess.img_size
        num_candidates = max(_NUM_CANDIDATES, _CANDIDATE_PIXELS // img_size**2)
        generator = torch.Generator().manual_seed(self.config.seed)
        rows = torch.randperm(len(test), generator=generator)[:num_candidates]
        classes = self.loaders.data.classes
        if not classes:  # the user's images: keep their order
            return rows[:count].sort().values
        if classes != self.class_names:  # predictions are neither right nor wrong
            return rows[:count]
        predicted = [self._predict(self.loaders.normalize(test.images(batch)))[1]
                     for batch in rows.split(self.loaders.batch_size)]  # fmt: skip
        is_correct = torch.cat(predicted) == test.labels[rows]
        correct, wrong = rows[is_correct], rows[~is_correct]
        correct = correct[: count - min(len(wrong), count // 2)]
        return torch.cat([correct, wrong])[:count]

    def _examples(self, rows: Tensor, methods: list[str]) -> list[AttentionExample]:
        """These test images with the predictions of the model and the maps of these methods."""
        return [example for batch in rows.split(self.loaders.batch_size)
                for example in self._batch_examples(batch, methods)]  # fmt: skip

    def _batch_examples(self, rows: Tensor, methods: list[str]) -> list[AttentionExample]:
        data, config = self.loaders.data, self.config
        pixels = data.test.images(rows)
        images = self.loaders.normalize(pixels)
        confidence, predicted = self._predict(images)
        targets = None
        if self.target is not None:
            targets = torch.full((len(rows),), self.target, device=images.device)
        maps, blocks, raw_name = {}, [], None
        for method in methods:
            if method == "raw":
                blocks = saliency.raw_attention(self.model, images)
                block = config.layer if config.layer > 0 else len(blocks) + 1 + config.layer
                head = "mean of heads" if config.head is None else f"head {config.head}"
                raw_name = f"attention, block {block}, {head}"
                maps[raw_name] = saliency.select_map(blocks, config.layer, config.head)
            else:
                depends_on_class = self.target is not None and method != "rollout"
                name = f"{method} for {config.target_class}" if depends_on_class else method
                maps[name] = saliency.compute_map(method, self.model, images, targets)
        crops = (self.loaders.preprocess.center_crop(pixels) * 255).round().byte()
        crops = crops.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        labels = data.test.labels[rows]
        known = data.classes and data.classes == self.class_names  # else not right or wrong
        return [
            AttentionExample(
                pixels=crops[i],
                name=data.test.names[row],
                label=data.classes[labels[i]] if data.classes else None,
                prediction=self.class_names[predicted[i]] if self.class_names else None,
                confidence=float(confidence[i]),
                correct=bool(predicted[i] == labels[i]) if known else None,
                raw=[block[i].cpu().numpy() for block in blocks],
                maps={name: values[i].cpu().numpy() for name, values in maps.items()},
                raw_name=raw_name,
            )
            for i, row in enumerate(rows.tolist())
        ]

    def _live_content(self, name: str, rows: Tensor, for_others: bool = False) -> LiveContent:
        """The live page with the images `rows`: if labels are known, one per class and mistakes."""
        data = self.loaders.data
        if known := data.classes == self.class_names:
            per_class = self._example_of_each_class()
            rows = torch.cat([per_class, rows[~torch.isin(rows, per_class)]])
        examples = self._examples(rows, [])
        if known:
            count = len(per_class)
            examples[count:] = [example for example in examples[count:] if not example.correct]
        return LiveContent(
            name=self.trained_by.folder.name if self.trained_by and not for_others else name,
            model=self.model,
            preprocess=self.loaders.preprocess,
            classes=self.class_names,
            examples=examples,
            dataset=self._dataset(),
            run=self.trained_by,
            for_others=for_others,
        )

    def _dataset(self) -> str | None:
        """The dataset of the run; without a run, the one that is shown."""
        if self.trained_by:
            return self.trained_by.config().get("dataset", {}).get("name")
        return self.loaders.data.name if self.loaders.data.classes else None

    def _example_of_each_class(self) -> Tensor:
        """Rows of test images: for each of at most 12 classes, the first predicted correctly.

        If none of the first batch is, the first image of the class.
        """
        test, chosen = self.loaders.data.test, []
        for label in range(min(_MAX_EXAMPLES, len(self.class_names))):
            rows = (test.labels == label).nonzero()[: self.loaders.batch_size, 0]
            if len(rows):
                predicted = self._predict(self.loaders.normalize(test.images(rows)))[1]
                chosen.append(rows[(predicted == label).int().argmax()])
        return torch.stack(chosen)

    def _plot_distances(self, run: Run, rows: Tensor) -> list[list[float]]:
        """Plots and returns the mean attention distance over the images, by block and head."""
        img_size = self.loaders.preprocess.img_size

        def measure(block: BlockAttention) -> tuple[Tensor, float]:
            patch_size = img_size / block.grid_size[0]
            return block.mean_distance(patch_size), uniform_distance(block.grid_size, patch_size)

        batches = []
        for batch in rows.split(self.loaders.batch_size):
            images = self.loaders.normalize(self.loaders.data.test.images(batch))
            batches.append(attention_maps(self.model, images, measure)[1])
        distances = [
            torch.cat([distance for distance, _ in parts]).mean(0).tolist()
            for parts in zip(*batches, strict=True)
        ]
        uniform = [distance for _, distance in batches[0]]
        title = f"{run.folder.name}: mean attention distance ({len(rows)} images of {img_size} px)"
        plots.plot_distances(run.folder / "distance.png", distances, uniform, title)
        return [[round(value, 3) for value in block] for block in distances]

    def _plot_positions(self, run: Run) -> None:
        """Plots the similarity of position embeddings, for models that have them (not Swin)."""
        pos_embed = getattr(self.model, "pos_embed", None)
        if pos_embed is None:
            return
        rows, columns = patch_grid(self.model, self.first_image)
        patches = pos_embed.detach().cpu()[0, -rows * columns :]
        title = f"{run.folder.name}: similarity of the position embeddings of all pairs of patches"
        plots.plot_positions(run.folder / "positions.png", patches, (rows, columns), title)

    def _notes(self) -> list[str]:
        """Paragraphs at the top of the page that explain the maps."""
        query = _QUERY_NAMES[saliency.pooled_query(self.model)]
        notes = {
            "raw": f"Attention of one block shows how much {query} attends to each patch. Values "
            "are fractions of its total attention. They sum to less than 100 % if some attention "
            "goes to the class token or to registers.",
            "rollout": "Rollout follows attention through all blocks.",
            "gradient-rollout": "Gradient rollout weights the attention of all blocks by its "
            "effect on the logit of the explained class.",
            "grad-cam": "Grad-CAM: bright areas raised the logit of the explained class.",
        }
        return [
            *(notes[name] for name in self.methods),
            "A bright patch does not prove that the model uses it; on Oxford Pets, "
            "`attention_viz.py --score` measures whether it does.",
        ]


def class_index(name: str | None, names: list[str]) -> int | None:
    """The index of TARGET_CLASS, None for none.

    Raises: UserError, with similar names, for a class that the model does not know.
    """
    if name is None:
        return None
    if name in names:
        return names.index(name)
    if not names:
        raise UserError(f"TARGET_CLASS={name!r}: this model has no classification head")
    similar = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
    raise UserError(
        f"TARGET_CLASS={name!r} is not one of the model's {len(names)} classes. Similar names: "
        f"{', '.join(similar)}"
    )


def uniform_distance(grid_size: tuple[int, int], patch_size: float) -> float:
    """Mean distance in pixels of all pairs of patches, each paired with itself too."""
    positions = torch.cartesian_prod(*(torch.arange(n).float() for n in grid_size))
    return float(torch.cdist(positions, positions).mean() * patch_size)
