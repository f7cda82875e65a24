"""What no benchmark of photographs shows of the shipped models."""

import pathlib

import numpy as np
import pytest
from conftest import ROOT

import goconv_tf
from goconv_tf import zoo

FOLDERS = sorted(path.parent for path in pathlib.Path(ROOT, "checkpoints").glob("*/config.json"))
VIVID = [folder for folder in FOLDERS if zoo.read_info(str(folder)).card["training"].get("vivid")]


@pytest.mark.parametrize("folder", VIVID, ids=lambda folder: folder.name)
def test_saturated_colours(folder):
    """Models trained with --vivid give six squares of saturated colours back; those before them had 22 dB in green, at any rate."""
    colours = np.uint8([[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 255, 255), (255, 0, 255)]])
    picture = np.kron(colours, np.ones((64, 64, 1), np.uint8))
    model = goconv_tf.load_pretrained(str(folder))
    for lmbda in (4 * model.config.lmbda_min, model.config.lmbda_max) if model.has_lambda else (None,):
        decoded = goconv_tf.decompress(model, goconv_tf.compress(model, picture, lmbda=lmbda).data)
        error = np.square(decoded.astype(float) - picture).reshape(2, 64, 3, 64, 3)
        inside = error[:, 16:-16, :, 16:-16].mean((1, 3, 4))
        assert (10 * np.log10(255**2 / (inside + 1e-9)) > 30).all(), (lmbda, inside)


def test_the_main_models_were_trained_with_saturated_colours():
    assert {"variable-rate-small-mse", "variable-rate-small-mix", "crpe-small-mse-0.01"} <= {folder.name for folder in VIVID}
