"""Streams that are hostile in known ways, mended finds of fuzzing, and limits of what a stream may cost."""

import os
import pathlib

import pytest
from conftest import ROOT, draw
from hostile import compiled, try_bytes

from goconv_tf import bitstream, codec, limits, zoo
from goconv_tf.errors import BitstreamError

STREAMS = sorted((pathlib.Path(ROOT) / "tests" / "streams").iterdir())


@pytest.fixture(scope="module")
def models(model, crpe, rnn):
    return compiled([model, crpe, rnn])


def test_kept_streams(models):
    assert len(STREAMS) >= 20
    for path in STREAMS:
        try_bytes(path.read_bytes(), models)


@pytest.mark.parametrize("kind", ["model", "crpe", "rnn"])
def test_time_is_bounded(kind, request, monkeypatch):
    """By a clock that each look moves: whichever piece of work the time ends in, decoding stops before the next."""
    model = request.getfixturevalue(kind)
    data = codec.compress(model, draw(200, 260)).data
    now = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now.__setitem__(0, now[0] + 1.0) or now[0])
    codec.decompress(model, data, max_seconds=10_000)
    looks = int(now[0])
    assert looks > len(model.latent_names)
    for limit in (0, looks // 2, looks - 3):
        now[0] = 0.0
        with pytest.raises(BitstreamError, match=f"limit of {limit} s"):
            codec.decompress(model, data, max_seconds=limit)
        assert now[0] <= limit + 2


def test_the_command_keeps_to_its_time(model_dir, tmp_path, capsys, monkeypatch):
    from goconv_tf import commands

    path, target = tmp_path / "a.gcv", tmp_path / "a.png"
    path.write_bytes(codec.compress(zoo.load_pretrained(model_dir), draw(64, 64)).data)
    assert commands.decompress([str(path), str(target)], model_dir, max_seconds=1e-9) == 1
    assert "limit of 1e-09 s" in capsys.readouterr().err
    assert not os.path.exists(target)


def test_size_is_bounded(model):
    """A small stream that claims a large picture is refused by its claim, before anything is allocated for it."""
    stream = bitstream.unpack(codec.compress(model, draw(64, 64)).data, 10**6)
    stream.height = stream.width = 30_000
    data = bitstream.pack(stream)
    with pytest.raises(BitstreamError, match="30000 x 30000"):
        codec.decompress(model, data)
