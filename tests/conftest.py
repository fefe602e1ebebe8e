"""Data that several files of tests share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pets(tmp_path_factory) -> Path:
    """A small Oxford Pets: 2 breeds, 24 photographs of several shapes with trimaps."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("pets data")
    base = root / "oxford-iiit-pet"
    for folder in ("images", "annotations/trimaps"):
        (base / folder).mkdir(parents=True)
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for i in range(24):
        breed = ("Abyssinian", "Bengal")[i % 2]
        name = f"{breed}_{i}"
        size = ((60, 40), (40, 40), (37, 61))[i % 3]
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "images" / f"{name}.jpg")
        trimap = np.full((size[1], size[0]), 2, np.uint8)
        trimap[8:30, 10:33], trimap[8:30, 9], trimap[8:30, 33] = 1, 3, 3
        Image.fromarray(trimap).save(base / "annotations" / "trimaps" / f"{name}.png")
        lines["trainval" if i < 12 else "test"].append(f"{name} {1 + i % 2} 1 1")
    for split, text in lines.items():
        (base / "annotations" / f"{split}.txt").write_text("\n".join(text) + "\n")
    return root
