"""What no benchmark of photographs shows of the shipped models."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import CHECKPOINTS, ROOT, draw, load_script

import goconv_tf
from goconv_tf import bitstream, codec, zoo

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


def test_all_models_were_trained_with_saturated_colours():
    assert VIVID == CHECKPOINTS and len(VIVID) >= 6


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=os.path.basename)
def test_odd_sizes_cost_nothing(folder):
    """A picture whose sides no stride divides is coded as well as a larger one; the scalable RNN once lost 10 dB, and a quarter of its bits."""
    whole = draw(256, 256)
    model = goconv_tf.load_pretrained(folder)
    rates, qualities = [], []
    for height, width in ((256, 256), (253, 239)):
        picture = whole[:height, :width]
        data = goconv_tf.compress(model, picture).data
        rates.append(len(data) / picture.size)
        qualities.append(goconv_tf.metrics.psnr(picture[:224, :224], goconv_tf.decompress(model, data)[:224, :224]))
    assert rates[1] < 1.12 * rates[0], rates
    assert qualities[1] > qualities[0] - 0.3, qualities
    floating = len(goconv_tf.compress(model, whole, exact=False).data)
    assert abs(rates[0] * whole.size - floating) <= 0.002 * floating + 4  # on Kodak 0.0005, as measured below
    lmbda = math.sqrt(model.config.lmbda_min * model.config.lmbda_max) if model.has_lambda else None
    assert sum(codec.estimate(model, picture, lmbda).values()) == pytest.approx(8 * bitstream.unpack(data, 10**6).payload, rel=0.03)


def test_cards_say_how_to_train_on():
    """Each card's command is one that the training command takes, for the settings that it is of."""
    card = load_script(os.path.join(ROOT, "experiments", "card.py"))
    commands, wanted = [], []
    for folder in CHECKPOINTS:
        info = zoo.read_info(folder)
        commands.append(card.train_command(info.card["training"]))
        wanted.append({name: value for name, value in info.card["training"].items() if name not in card.UNSAID})
        with open(os.path.join(folder, "README.md"), encoding="utf-8") as f:
            assert f"\n    {commands[-1]}\n" in f.read()
        assert info.card["training"]["init"] == "pca" or info.card["training"]["warm_start"]
    wanted.append({"model": "crpe", "lambdas": [], "settings": ["estimation_widths=[64, 96]", "if_weight=0"], "name": "mine, again"})
    commands.append(card.train_command(wanted[-1]))
    code = """
import dataclasses, json, shlex, sys
from absl import flags
from goconv_tf import train
found = []
for line in sys.argv[1:]:
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.flags_by_module_dict()["goconv_tf.train"]:
        flag.unparse()
    flags.FLAGS(shlex.split(line)[2:])
    found.append(dataclasses.asdict(train._options()))
print(json.dumps(found))
"""
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", code, *commands], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for settings, found in zip(wanted, json.loads(done.stdout)):
        assert {name: found[name] for name in settings} == settings


def test_the_table_of_models_is_of_these():
    card = load_script(os.path.join(ROOT, "experiments", "card.py"))
    with open(os.path.join(ROOT, "checkpoints", "README.md"), encoding="utf-8") as f:
        assert card.models_table() + "\n\n" in f.read()


def test_what_exact_parameters_cost_is_measured():
    """Of every model that is shipped, with the weights it has now: what docs/guarantees.md promises."""
    with open(os.path.join(ROOT, "benchmarks", "results", "checkpoints.json"), encoding="utf-8") as f:
        rows = {row["fingerprint"]: row for row in json.load(f)["rows"]}
    for folder in CHECKPOINTS:
        row = rows[zoo.read_info(folder).fingerprint]
        assert row["pictures"] == 24 and row["bits"] < 0.0005 and row["decode ratio"] < 1.5, row
