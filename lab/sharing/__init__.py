"""Runs a trained model on the user's images, and shares it with others.

Open `predictions.py` for predict.py; `leakage.py` finds images that the model may have been trained
on. For share.py, `formats.py` writes the model in the formats of timm, transformers and ONNX,
`card.py` writes the model card, and `hub.py` uploads the folder.
"""

from lab.sharing import card, formats, hub, leakage, predictions

__all__ = ["card", "formats", "hub", "leakage", "predictions"]
