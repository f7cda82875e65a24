"""What was written once decodes for ever, and on every machine: a tiny untrained model of each kind, and streams of it, as they were on 2026-11-22.

A change that breaks these breaks every file there is: it needs another `bitstream.VERSION` or `zoo.FORMAT`, and code that still reads these.
"""

import glob
import os

import numpy as np
import pytest
from PIL import Image

from goconv_tf import bitstream, codec, zoo
from goconv_tf.entropy import coders

STREAMS = sorted(glob.glob(os.path.join(os.path.dirname(__file__), "frozen", "*", "*.gcv")))


def test_they_are_there():
    """Each kind has both coders' and, in "noise", integers outside their tables."""
    kinds = ("variable_rate", "crpe", "scalable_rnn")
    assert {os.sep.join(path.split(os.sep)[-2:]) for path in STREAMS} == {
        os.path.join(f"frozen-{kind}", f"{name}.gcv") for kind in kinds for name in ("picture", "noise", "coder")
    }


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: os.sep.join(path.split(os.sep)[-2:]))
def test_decodes(path, monkeypatch):
    decode_escapes, escapes = coders._Coder._decode_escapes, []

    def spy(decode, outside, *rest):
        escapes.append(len(outside))
        return decode_escapes(decode, outside, *rest)

    monkeypatch.setattr(coders._Coder, "_decode_escapes", staticmethod(spy))
    with open(path, "rb") as f:
        data = f.read()
    assert bitstream.unpack(data, 10**6).coder == ("range-coder" if "coder.gcv" in path else "tfc")
    decoded = codec.decompress(zoo.shared(os.path.dirname(path)), data)
    with Image.open(path[:-4] + ".png") as image:
        assert np.std(image) > 20 and (sum(escapes) or "noise" not in path)
        assert np.abs(decoded.astype(int) - np.asarray(image)).max() <= 1  # latents are exact; the synthesis rounds
