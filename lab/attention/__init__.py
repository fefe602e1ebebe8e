"""Where a model looks: attention weights, maps made from them, and scores of these maps.

Open `extraction.py` first: `attention_maps` records the attention weights of any ViT or Swin.
`saliency.py` turns them into one map per image, `views.py` draws the maps, `scoring.py` compares
them with the outlines of the objects, and `score_report.py` explains the scores.
"""

import lab.models  # noqa: F401  # first, because it decides which file is the module `model`
from lab.attention.extraction import BlockAttention, attention_maps

__all__ = [
    "BlockAttention",
    "attention_maps",
    "saliency",
    "score_report",  # reads records only; this, scoring and views load matplotlib
    "scoring",
    "views",
]
