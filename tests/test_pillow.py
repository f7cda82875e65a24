"""Pillow opens and saves .gcv: lazily, with Pillow's own errors."""

import dataclasses
import io
import os
import pathlib
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
from conftest import ROOT, draw
from PIL import Image, ImageFile, UnidentifiedImageError

import goconv_tf.pillow
from goconv_tf import bitstream, codec, zoo


@pytest.fixture(autouse=True)
def test_zoo(model_dir, rnn_dir, monkeypatch):
    monkeypatch.setenv("GOCONV_TF_ZOO", os.pathsep.join(map(os.path.dirname, (model_dir, rnn_dir))))


@pytest.fixture(scope="module")
def data(model):
    return codec.compress(model, draw(40, 56), lmbda=0.02).data


@pytest.fixture(scope="module")
def layered(rnn):
    return codec.compress(rnn, draw(40, 56)).data


def opened(data):
    return Image.open(io.BytesIO(data))


def claiming(data, **fields):
    """The stream with another header and right checksums."""
    return bitstream.pack(dataclasses.replace(bitstream.unpack(data, 10**6), **fields))


def test_opens_what_the_library_wrote(model, data, tmp_path):
    path = tmp_path / "a.gcv"
    path.write_bytes(data)
    expected = codec.decompress(model, data)
    for source in (path, str(path), io.BytesIO(data)):
        with Image.open(source) as image:
            assert (image.format, image.mode, image.size, image.get_format_mimetype()) == ("GCV", "RGB", (56, 40), "image/x-gcv")
            stored = bitstream.dequantize_lmbda(bitstream.quantize_lmbda(0.02))
            assert image.info == {
                "model": "tiny-test",
                "fingerprint": model.info.fingerprint,
                "lmbda": stored,
                "layers": 1,
                "entropy_coder": "tfc",
                "exact": True,
            }
            np.testing.assert_array_equal(np.asarray(image), expected)
            np.testing.assert_array_equal(np.asarray(image.resize((56, 40))), expected)  # loaded once, used again


def test_opening_imports_no_tensorflow(data, tmp_path):
    path = tmp_path / "a.gcv"
    path.write_bytes(data)
    code = """
import sys
import goconv_tf.pillow
from PIL import Image
image = Image.open(sys.argv[1])
Image.open(sys.argv[1]).verify()
print(image.size, image.info["model"], "tensorflow" in sys.modules)
image.load()
print("tensorflow" in sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "(56, 40) tiny-test False\nTrue\n"


def test_saves_what_the_library_writes(model, rnn, model_dir, tmp_path):
    picture = draw(33, 47)
    image, path = Image.fromarray(picture), tmp_path / "a.gcv"
    image.save(path, model=model_dir, lmbda=0.03)
    assert path.read_bytes() == codec.compress(model, picture, lmbda=0.03).data
    buffer = io.BytesIO()
    target = codec.compress(model, picture, lmbda=model.config.lmbda_max, entropy_coder="range-coder").bpp
    image.save(buffer, format="GCV", model="tiny-test", target_bpp=target, entropy_coder="range-coder")
    assert buffer.getvalue() == codec.compress(model, picture, target_bpp=target, entropy_coder="range-coder").data
    with open(path, "wb") as f:
        image.save(f, model="tiny-rnn", layers=2)
    assert path.read_bytes() == codec.compress(rnn, picture, layers=2).data
    with Image.open(path) as image:
        assert image.info["layers"] == 2 and "lmbda" not in image.info
        image.save(path, model="tiny-rnn", layers=1)  # over the file that it is read from
    assert opened(path.read_bytes()).info["layers"] == 1


def test_the_default_model(monkeypatch):
    info = zoo.find_model(goconv_tf.pillow.DEFAULT_MODEL)
    assert info.config.lmbda_min < info.config.lmbda_max and info.path.startswith(ROOT)
    monkeypatch.setattr(goconv_tf.pillow, "DEFAULT_MODEL", "tiny-test")  # tracing the other takes half a minute
    buffer = io.BytesIO()
    Image.fromarray(draw(16, 16)).save(buffer, format="GCV")
    assert opened(buffer.getvalue()).info["model"] == "tiny-test"


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr"])
def test_other_modes_are_coded_as_read_picture_reads_them(model, mode, tmp_path):
    image, buffer = Image.fromarray(draw(20, 24)).convert(mode), io.BytesIO()
    image.save(buffer, format="GCV", model="tiny-test")
    assert buffer.getvalue() == codec.compress(model, np.asarray(image.convert("RGB"))).data


def test_what_cannot_be_saved(tmp_path):
    image, path = Image.fromarray(draw(16, 16)), tmp_path / "a.gcv"
    for bad, error, message in (
        ((image.convert("RGBA"), {}), OSError, "transparency"),
        ((Image.new("I;16", (8, 8)), {}), OSError, "mode I;16"),
        ((Image.new("F", (8, 8)), {}), OSError, "mode F"),
        ((image, {"model": "none-such"}), OSError, "no model 'none-such'"),
        ((image, {"lmbda": 0.9}), ValueError, "outside the model's range"),
        ((image, {"layers": 2}), ValueError, "2 layers were asked for"),
        ((image, {"target_bpp": 1e-9}), ValueError, "out of reach"),
        ((image, {"lmbda": 0.01, "target_bpp": 1}), ValueError, "give target_bpp without"),
    ):
        with pytest.raises(error, match=message):
            bad[0].save(path, **{"model": "tiny-test", **bad[1]})
        assert os.listdir(tmp_path) == []


def test_depth_is_known_after_the_pixels_are_read(tmp_path):
    (tmp_path / "deep.ppm").write_bytes(b"P6 5 4 65535\n" + bytes(5 * 4 * 6))
    with Image.open(tmp_path / "deep.ppm") as image, pytest.raises(OSError, match="not supported"):
        image.save(tmp_path / "a.gcv", model="tiny-test")
    Image.fromarray(draw(16, 16)).save(tmp_path / "shallow.ppm")
    with Image.open(tmp_path / "shallow.ppm") as image:
        image.save(tmp_path / "b.gcv", model="tiny-test")
    assert sorted(os.listdir(tmp_path)) == ["b.gcv", "deep.ppm", "shallow.ppm"]


def test_what_is_not_a_stream_is_unidentified(data, tmp_path):
    other_version = data[:4] + bytes([bitstream.VERSION + 1]) + data[5:]
    claims = claiming(data, coder="tfc", height=0)
    for bad in (
        b"",
        b"hello",
        data[:3],
        data[:4],
        data[:12],
        data[:19],
        other_version,
        b"\x89GCV" + bytes(99),
        claims,
        data[:5] + b"\x7f" + data[6:],
    ):
        path = tmp_path / "bad.gcv"
        path.write_bytes(bad)
        for source in (io.BytesIO(bad), path):
            with pytest.raises(UnidentifiedImageError), warnings.catch_warnings():
                warnings.simplefilter("error")
                Image.open(source)


def test_pillows_limit_of_size_holds(data, monkeypatch):
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(Image.DecompressionBombError):
        opened(claiming(data, height=2 * limit + 1, width=1))
    with pytest.raises(Image.DecompressionBombError):
        opened(claiming(data, height=2**34, width=2**34))
    with pytest.warns(Image.DecompressionBombWarning):
        opened(claiming(data, height=limit + 1, width=1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 56 - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        assert opened(data).getpixel((0, 0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert opened(claiming(data, height=10**5, width=10**5)).size == (10**5, 10**5)


def test_damage_is_an_oserror_at_load(data, layered, monkeypatch):
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    for bad, message in ((data[:-1], "cut short"), (data[:45], "cut short"), (flipped, "checksum"), (data + b"x", "follow its end")):
        for act in (lambda image: image.load(), lambda image: image.verify()):
            with pytest.raises(OSError, match=message):
                act(opened(bad))
    wider = bytearray(data)
    assert wider[19] == 56
    wider[19] = 57
    with pytest.raises(OSError, match="checksum"):
        opened(bytes(wider)).load()
    unknown = opened(claiming(data, model_id=1))
    assert unknown.info["model"] is None and unknown.size == (56, 40)
    with pytest.raises(OSError, match="not in the zoo"):
        unknown.load()
    with pytest.raises(OSError, match="other weights"):
        opened(claiming(data, fingerprint=1)).load()
    # As for Pillow's own formats, a flag asks for what there is.
    cut = layered[:-1]
    with pytest.raises(OSError, match="first 2 of 3 layers"):
        opened(cut).load()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    two = bitstream.pack(bitstream.unpack(layered, 10**6).cut(2))
    np.testing.assert_array_equal(np.asarray(opened(cut)), np.asarray(opened(two)))


def test_models_are_loaded_once_and_not_for_ever(data, model_dir, tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(zoo, "load_pretrained", lambda path: loads.append(path) or types.SimpleNamespace(info=zoo.read_info(path)))
    zoo._shared.cache_clear()
    assert zoo.shared("tiny-test") is zoo.shared(model_dir) and loads == [model_dir]
    config = pathlib.Path(model_dir, zoo.CONFIG_FILE).read_text()
    for k in range(zoo.MAX_SHARED):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / zoo.CONFIG_FILE).write_text(config)
        zoo.shared(str(folder))
    assert zoo._shared.cache_info().currsize == zoo.MAX_SHARED
    folder = str(tmp_path / "0")
    first = zoo.shared(folder)
    changed = config.replace(zoo.read_info(folder).fingerprint, "00000001")
    (tmp_path / "0" / zoo.CONFIG_FILE).write_text(changed)
    assert zoo.shared(folder) is not first
    zoo._shared.cache_clear()
