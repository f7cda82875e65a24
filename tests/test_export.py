"""Exported models, in a process where this library cannot be imported: the same bytes, the same pixels, the same refusals."""

import binascii
import dataclasses
import os
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, draw
from test_commands import one_line
from test_faults import full_disk

from goconv_tf import bitstream, codec, crc, export, zoo
from goconv_tf.entropy import CODERS, CodingTable, graph

# What a stranger runs. Takes the job from a file beside it, leaves the results there.
STRANGER = """
import builtins, os, pickle, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "goconv_tf":
            raise ImportError("there is no goconv_tf here")

sys.meta_path.insert(0, Refuse())
import tensorflow as tf
import tensorflow_compression

def attempt(call, **inputs):
    try:
        (output,) = call(**{name: tf.constant(value) for name, value in inputs.items()}).values()
        return output.numpy()
    except tf.errors.InvalidArgumentError as error:
        return "refused: " + str(error)

with open(sys.argv[1], "rb") as f:
    jobs = pickle.load(f)
results = []
for path, compressions, streams in jobs:
    model = tf.saved_model.load(path)
    results.append(
        {
            "coded": [attempt(model.signatures["compress"], **inputs) for inputs in compressions],
            "decoded": [attempt(model.signatures["decompress"], data=data) for data in streams],
            "info": {name: value.numpy() for name, value in model.signatures["info"]().items()},
        }
    )
assert not any(name.split(".")[0] == "goconv_tf" for name in sys.modules)
with open(sys.argv[1], "wb") as f:
    pickle.dump(results, f)
"""


def changed(stream, **changes):
    return bitstream.pack(dataclasses.replace(stream, **changes))


def damaged(model, other, data, picture):
    """{reason: [files that must be refused for it]}."""
    stream = bitstream.unpack(data, 10**6)
    first = stream.layers[0]
    layers = [first._replace(checksum=first.checksum ^ 1), *stream.layers[1:]]
    point = {"lmbda": 0.03125} if model.has_lambda else {}
    wrapping = {"height": 2**34 + 131057, "width": 2**30 - 8191}  # 253,937 pixels modulo 2^64
    return {
        "not a goconv_tf file": [b"hello there, how are you", b"\x89GCX" + data[4:], b"h"],
        "empty": [b""],
        "another version": [data[:4] + b"\x01" + data[5:]],
        "cut short": [data[:n] for n in range(1, len(data), 5)],
        "follows its end": [data + b"\0"],
        "another entropy coder": [codec.compress(model, picture, entropy_coder="range-coder", **point).data, changed(stream, exact=False)],
        "another model": [other],
        "other weights": [changed(stream, fingerprint=stream.fingerprint ^ 1)],
        "more pixels": [
            changed(stream, height=20_000, width=20_000),
            changed(stream, width=0),
            changed(stream, **wrapping),
            changed(stream, height=1, width=900_000),
        ],
        "lambda is out of range": [changed(stream, lmbda_code=0 if model.has_lambda else 1), changed(stream, lmbda_code=2**31 + 1)],
        "latents differ": [changed(stream, layers=layers), changed(stream, height=stream.height + 16 * model.alignment)],
        # Every byte, and the lengths and sizes among them.
        "": [data[:k] + bytes([data[k] ^ 1 << k % 8]) + data[k + 1 :] for k in range(len(data))],
    }


@pytest.fixture(scope="module")
def models(model, crpe, rnn):
    return {"variable_rate": model, "crpe": crpe, "scalable_rnn": rnn}


@pytest.fixture(scope="module")
def elsewhere(models, model_dir, crpe_dir, rnn_dir, tmp_path_factory):
    """({kind: what goconv_tf makes of a picture}, {kind: what a stranger's process made of the same})."""
    folder = tmp_path_factory.mktemp("exported")
    picture = draw(45, 71)
    ours, jobs = {}, []
    points = {"variable_rate": {"lmbda": 0.03125}, "crpe": {}, "scalable_rnn": {"layers": 2}}
    coded = {kind: codec.compress(models[kind], picture, reconstruct=True, **point) for kind, point in points.items()}
    for kind, path in zip(models, (model_dir, crpe_dir, rnn_dir)):
        # In a process of its own, where the first thing that TensorFlow does is this.
        args = [sys.executable, "-m", "goconv_tf", "export", path, folder / kind, "--max_megapixels", "1"]
        done = subprocess.run(args, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and models[kind].info.name in done.stdout and not done.stderr, done.stderr[-2000:]
        point = {name: np.array(value, np.float32 if name == "lmbda" else np.int32) for name, value in points[kind].items()}
        compressions = [{"image": picture, **point}]
        compressions += [
            {"image": np.zeros([*size, 3], np.uint8), **point} for size in ((0, 5), (1000, 1001), (1, 900_000))
        ]  # a row is 16 when computed
        others = (
            picture[None],
            np.stack(4 * [picture]),
            picture[..., 0],
            picture[..., :1],
            np.repeat(picture, 2, axis=2),
            picture[0, 0],
            picture[0, 0, 0],
        )
        compressions += [{"image": image, **point} for image in others]
        compressions += [{"image": picture, name: np.array(9, value.dtype)} for name, value in point.items()]
        other = coded["crpe" if kind != "crpe" else "variable_rate"].data
        reasons = damaged(models[kind], other, coded[kind].data, picture)
        whole = codec.compress(models[kind], draw(16, 33), reconstruct=True)  # other sizes, all layers
        ours[kind] = {"coded": coded[kind], "whole": whole, "reasons": [reason for reason, files in reasons.items() for _ in files]}
        streams = [coded[kind].data, whole.data, *(data for files in reasons.values() for data in files)]
        jobs.append((str(folder / kind), compressions, streams))
    job = folder / "job"
    job.write_bytes(pickle.dumps(jobs))
    (folder / "empty").mkdir()
    done = subprocess.run([sys.executable, "-I", "-c", STRANGER, job], cwd=folder / "empty", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return ours, dict(zip(models, pickle.loads(job.read_bytes())))


@pytest.mark.parametrize("kind", ["variable_rate", "crpe", "scalable_rnn"])
def test_files_travel_both_ways(elsewhere, models, kind):
    ours, theirs = elsewhere[0][kind], elsewhere[1][kind]
    assert theirs["coded"][0] == ours["coded"].data
    for coded, decoded in zip((ours["coded"], ours["whole"]), theirs["decoded"]):
        np.testing.assert_array_equal(decoded, coded.reconstruction)
    assert theirs["info"]["name"].decode() == models[kind].info.name and theirs["info"]["max_pixels"] == 10**6


@pytest.mark.parametrize("kind", ["variable_rate", "crpe", "scalable_rnn"])
def test_what_is_wrong_is_refused_with_the_reason(elsewhere, kind):
    ours, theirs = elsewhere[0][kind], elsewhere[1][kind]
    for number, (reason, answer) in enumerate(zip(ours["reasons"], theirs["decoded"][2:])):
        assert isinstance(answer, str) and answer.startswith("refused: ") and reason in answer, (number, reason, answer)
    assert len(ours["reasons"]) == len(theirs["decoded"]) - 2
    outside = "lambda is outside" if kind == "variable_rate" else "layers must be 1 to 3"
    for answer, reason in zip(theirs["coded"][1:], (*3 * ["1 to 1000000 pixels"], *7 * ["must be [height, width, 3]"], outside)):
        assert isinstance(answer, str) and reason in answer
    assert len(theirs["coded"]) == (11 if kind == "crpe" else 12)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 1000, 65537])
def test_checksums(count):
    rng = np.random.default_rng(count)
    data, before = rng.bytes(count), int(rng.integers(2**16))
    assert int(crc.crc16(data, before)) == binascii.crc_hqx(data, before)
    integers, before = rng.integers(-(2**31), 2**31, count).astype(np.int32), int(rng.integers(2**32))
    assert int(crc.crc32(integers, before)) == zlib.crc32(integers.astype("<i4").tobytes(), before)


@pytest.mark.parametrize("spread", [0, 1, 5, 2**20])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_coding_in_a_graph_gives_the_same_bytes(spread, count):
    """With two rows, of three symbols from -1 and of two from 5, of which the last are escapes."""
    table = CodingTable([-16, 0, 30000, 60000, 65536, -16, 0, 65000, 65536], [-1, 5])
    rng = np.random.default_rng(spread)
    symbols, indexes = rng.integers(-spread, spread, count, np.int32, True), rng.integers(2, size=count, dtype=np.int32)
    string = graph.encode(tf.constant(symbols), tf.constant(indexes), table)
    assert string.numpy() == CODERS["tfc"].encode(symbols, indexes, table)
    decoded, whole = graph.decode(string, tf.constant(indexes), table)
    assert whole
    np.testing.assert_array_equal(decoded, symbols)


def test_command_refuses_in_one_line(command, command_here, model_dir, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    monkeypatch.setattr(zoo, "load_pretrained", lambda name: pytest.fail("was loaded"))
    assert "exists" in one_line(command_here("export", model_dir, tmp_path / "full"))
    assert "exists" in one_line(command_here("export", model_dir, tmp_path / "full" / "a"))
    assert "no such folder" in one_line(command_here("export", model_dir, tmp_path / "none" / "a"))
    monkeypatch.undo()
    assert "no model" in one_line(command_here("export", "unheard-of", tmp_path / "b"))
    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["a"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    large = tf.function(lambda: {"a": tf.zeros([2000]) + np.arange(2000, dtype=np.float32)}, input_signature=[])
    monkeypatch.setattr(export, "make_signatures", lambda *args: {"a": large})
    model = tf.Module()
    with full_disk(5000), pytest.raises(OSError, match="cannot be written"):
        export.save(model, str(tmp_path / "a"))
    assert not os.listdir(tmp_path)
    export.save(model, str(tmp_path / "a"))
    assert os.listdir(tmp_path) == ["a"] and os.path.exists(tmp_path / "a" / "saved_model.pb")
