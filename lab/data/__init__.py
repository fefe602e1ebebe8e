"""A dataset name or a folder of images in, batches on the device out.

Open `datasets.py` first: `load_data` returns the three splits of a dataset. `sources.py` finds or
downloads the images, and `splits.py` divides them. `loaders.py` turns splits into batches,
`augment.py` augments whole batches, and `preprocess.py` holds what a model expects of its input.
`images.py` reads single images, and `cache.py` keeps decoded photographs on disk.
"""

from lab.data.augment import Augmentation, to_device
from lab.data.datasets import Dataset, load_data
from lab.data.loaders import Loaders
from lab.data.preprocess import Preprocess

__all__ = [
    "Augmentation",
    "Dataset",
    "Loaders",
    "Preprocess",
    "datasets",
    "images",
    "load_data",
    "to_device",
]
