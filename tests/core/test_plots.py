"""The palettes stay distinguishable for color-blind readers, and figures show what they claim."""

from itertools import combinations

import numpy as np
import pytest
import torch
from colorspacious import cspace_convert, deltaE
from matplotlib.cbook import is_math_text
from matplotlib.colors import to_rgb

from lab.core import plots
from lab.training.results import label_smoothing_floor
from tests.figures import real_figures


@pytest.mark.parametrize("vision", [None, "deuteranomaly", "protanomaly", "tritanomaly"])
@pytest.mark.parametrize("concept", plots.PALETTES)
def test_colors_of_a_concept_stay_apart(concept, vision):
    """Simulates vision by Machado et al. 2009, full severity; measures CAM02-UCS differences."""
    colors = [to_rgb(style.color) for style in plots.PALETTES[concept].values()]
    if vision:
        space = {"name": "sRGB1+CVD", "cvd_type": vision, "severity": 100}
        colors = [np.clip(cspace_convert(color, space, "sRGB1"), 0, 1) for color in colors]
    assert min(deltaE(a, b, input_space="sRGB1") for a, b in combinations(colors, 2)) >= 15


def test_markers_are_a_second_cue_and_the_page_has_the_same_colors():
    for concept, styles in plots.PALETTES.items():
        assert len({style.marker for style in styles.values()}) == len(styles)
        for name, style in styles.items():
            assert f"--{concept}-{name}: {style.color};".lower() in plots.css_palette()


def test_a_class_called_dollar_is_no_formula(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: shown.append(figure))
    matrix = np.array([[1, 2], [0, 3]])
    with real_figures():
        plots.plot_confusion(tmp_path / "x.png", matrix, ["$5", "$10"], "prices $1 and $2")
    figure = shown[0]
    texts = [figure.get_suptitle(), figure.get_supxlabel()]
    texts += [label.get_text() for label in figure.axes[0].get_xticklabels()]
    for text in texts:
        assert "$" in text
        assert not is_math_text(text)
    plots.plt.close(figure)


@pytest.mark.parametrize(("smoothing", "classes"), [(0.1, 10), (0.3, 3), (0.0, 5)])
def test_no_prediction_is_below_the_floor_of_label_smoothing(smoothing, classes):
    floor = label_smoothing_floor(smoothing, classes)
    logits = torch.randn(1, classes, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(
            logits, torch.tensor([0]), label_smoothing=smoothing
        )
        value.backward()
        return value

    optimizer.step(loss)
    assert loss().item() == pytest.approx(floor, abs=1e-4)
