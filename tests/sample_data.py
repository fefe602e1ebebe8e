"""Images and folders that tests create, and torchvision's version of an image to compare with."""

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import transforms

BICUBIC = transforms.InterpolationMode.BICUBIC


def noise(width, height, seed=0, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def noise_image(width=12, height=12, seed=0):
    return Image.fromarray(noise(width, height, seed))


def reference(image, size):
    """An opened image after torchvision's own transforms, uint8 (3, size, size)."""
    crop = transforms.Compose([transforms.Resize(size, BICUBIC), transforms.CenterCrop(size)])
    return np.asarray(crop(image.convert("RGB"))).transpose(2, 0, 1)


def make_folder(root, counts):
    """Creates images for `counts`, such as {"train/cat": 3}.

    The left half of an image is filled with its class (times 10), the right half with its number.
    Images of 12 x 12 pixels are stored unchanged, so tests can read both back.
    """
    shades = {name: 10 * i for i, name in enumerate(sorted({Path(key).name for key in counts}))}
    for key, count in counts.items():
        (root / key).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = np.full((12, 12, 3), shades[Path(key).name], dtype=np.uint8)
            image[:, 6:] = number
            Image.fromarray(image).save(root / key / f"{number:03}.png")
    return root


def two_classes(root, train=4, others=2):
    return make_folder(
        root,
        {f"{s}/{c}": n for s, n in (("train", train), ("val", others), ("test", others))
         for c in ("cat", "dog")},
    )  # fmt: skip


def says(error, *parts):
    """Asserts that an error's message contains all parts."""
    for part in parts:
        assert str(part) in str(error.value), f"{part!r} is not in: {error.value}"


def same(left, right):
    """Whether two datasets have equal pixels and labels in every split."""
    return left.summary()["fingerprint"] == right.summary()["fingerprint"]
