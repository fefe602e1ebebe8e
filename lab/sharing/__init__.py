"""Uses a trained model on images of the user, and gives it to others.

Open `predictions.py` for predict.py. For share.py, `formats.py` writes the model in the formats of
timm, transformers and ONNX, `card.py` writes the model card, and `hub.py` uploads the folder.
"""

from lab.sharing import card, formats, hub, predictions

__all__ = ["card", "formats", "hub", "predictions"]
