"""Models by name: our ViT, a CNN of the same size, timm's models, and their pretrained weights.

Open `registry.py` first: it builds a model and rebuilds it from the header of its weights.
`own_model.py` checks an edited model.py before training. `pretrained.py` loads weights from a run,
a file, a folder, the Hugging Face hub or timm:

    model, preprocess, classes = load_model("results/train/<run>")
"""

from lab.core import runtime

runtime.import_model()  # before the imports below, which import it: model.py, or MODEL_FILE

from lab.models.pretrained import Pretrained, load_model, load_pretrained  # noqa: E402
from lab.models.registry import profile_model, save_model  # noqa: E402

__all__ = [
    "Pretrained",
    "cnn",
    "load_model",
    "load_pretrained",
    "lora",
    "own_model",
    "profile_model",
    "registry",
    "save_model",
]
