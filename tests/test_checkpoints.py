"""What no benchmark of photographs shows of the shipped models."""

import os

import numpy as np
import pytest
from conftest import CHECKPOINTS

import goconv_tf
from goconv_tf import zoo

VIVID = [folder for folder in CHECKPOINTS if zoo.read_info(folder).card["training"].get("vivid")]


@pytest.mark.parametrize("folder", VIVID, ids=os.path.basename)
def test_saturated_colours(folder):
    """Models trained with --vivid give six squares of saturated colours back; those before them had 22 dB in green, at any rate."""
    colours = np.uint8([[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 255, 255), (255, 0, 255)]])
    picture = np.kron(colours, np.ones((64, 64, 1), np.uint8))
    model = goconv_tf.load_pretrained(folder)
    for lmbda in (4 * model.config.lmbda_min, model.config.lmbda_max) if model.has_lambda else (None,):
        decoded = goconv_tf.decompress(model, goconv_tf.compress(model, picture, lmbda=lmbda).data)
        insides = [np.s_[top + 16 : top + 48, left + 16 : left + 48] for top in (0, 64) for left in (0, 64, 128)]
        qualities = [goconv_tf.metrics.psnr(picture[inside], decoded[inside]) for inside in insides]
        assert min(qualities) > 30, (lmbda, qualities)


def test_the_main_models_were_trained_with_saturated_colours():
    assert {"variable-rate-small-mse", "variable-rate-small-mix", "crpe-small-mse-0.01"} <= set(map(os.path.basename, VIVID))
