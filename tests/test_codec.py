"""Picture files to streams and back: sizes, modes, rate control, damage."""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from conftest import ROOT, draw
from PIL import Image, ImageOps

from goconv_tf import bitstream, codec, commands, evaluation, limits, memory, metrics, picture_io, presets, training, zoo
from goconv_tf.errors import BitstreamError, CheckpointError, GoConvError, ImageError, ModelMismatchError, RateError, UsageError


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 3), (31, 33), (150, 203)])
@pytest.mark.parametrize("coder", ["tfc", "range-coder"])
def test_any_size(model, size, coder):
    picture = draw(*size)
    result = codec.compress(model, picture, lmbda=0.02, entropy_coder=coder, reconstruct=True)
    decoded = codec.decompress(model, result.data)
    assert decoded.shape == picture.shape
    np.testing.assert_array_equal(decoded, result.reconstruction)
    assert result.bpp == 8 * len(result.data) / (size[0] * size[1])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
def test_modes_that_are_converted(tmp_path, mode):
    path = tmp_path / "picture.tif"
    image = Image.fromarray(draw(20, 30)).convert(mode)
    image.save(path)
    np.testing.assert_array_equal(picture_io.read_picture(str(path)), np.asarray(Image.open(path).convert("RGB")))


def deep_rgb_png(path):
    """A PNG with 16 bits a sample, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(6 * 5) for _ in range(4))
    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return str(path)


def deep_rgb_ppm(path):
    path.write_bytes(b"P6 5 4 65535\n" + bytes(5 * 4 * 6))
    return str(path)


def deep_jp2(path, image, before=b""):
    """A JPEG 2000 file whose header says 16 bits a sample, which Pillow cannot write; with a box before the codestream."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG2000")
    data = bytearray(buffer.getvalue())
    start = data.index(b"\xff\x4f\xff\x51")
    assert data[start + 42 : start + 51 : 3] == b"\x07\x07\x07"
    data[start + 45] = 15
    path.write_bytes(data[: start - 8] + struct.pack(">I4s", 8 + len(before), b"free") + before + data[start - 8 :])
    return str(path)


def deep_avif(path, image):
    """An AVIF file whose configuration says 10 bits a sample, which Pillow cannot write."""
    buffer = io.BytesIO()
    image.save(buffer, "AVIF")
    data = bytearray(buffer.getvalue())
    data[data.index(b"av1C") + 6] |= 0x40
    pixi = data.index(b"pixi") + 9
    data[pixi : pixi + 3] = b"\x0a\x0a\x0a"
    path.write_bytes(data)
    return str(path)


def icon(path, image):
    """An icon that says 16 x 16 pixels and holds a PNG of any size."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path.write_bytes(struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, buffer.tell(), 22) + buffer.getvalue())
    return str(path)


def test_turned_as_the_camera_says(tmp_path):
    image = Image.fromarray(draw(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(picture_io.read_picture(str(tmp_path / "turned.png")), np.rot90(draw(20, 30), -1))


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tif"])
def test_all_eight_ways_to_turn(tmp_path, extension):
    for orientation in range(10):
        image = Image.fromarray(draw(20, 30))
        exif = image.getexif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{extension}"
        image.save(path, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        assert expected.shape == ((30, 20, 3) if 5 <= orientation <= 8 else (20, 30, 3))
        np.testing.assert_array_equal(picture_io.read_picture(str(path)), expected)


def test_odd_tags_do_not_matter(tmp_path):
    """What cameras and programs write is not always what EXIF says: a resolution as text, a block that is none."""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 2, b"7")
    for name, exif, turns in (("a.jpg", b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4), -1), ("b.webp", b"none", 0)):
        Image.fromarray(draw(20, 30)).save(tmp_path / name, exif=exif)
        expected = np.rot90(np.asarray(Image.open(tmp_path / name).convert("RGB")), turns)
        np.testing.assert_array_equal(picture_io.read_picture(str(tmp_path / name)), expected)


def test_pictures_that_are_refused(tmp_path):
    def save(image, name, **kwargs):
        image.save(tmp_path / name, **kwargs)
        return str(tmp_path / name)

    rgb = Image.fromarray(draw(20, 30))
    palette = rgb.convert("P")
    (tmp_path / "text.png").write_text("no picture")
    save(rgb, "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for path, message in (
        (save(rgb.convert("RGBA"), "alpha.png"), "transparency"),
        (save(rgb.convert("LA"), "la.png"), "transparency"),
        (save(palette, "key.png", transparency=3), "transparency"),
        (save(Image.fromarray(np.full((4, 4), 40000, np.uint16)), "deep.png"), "not supported"),
        (deep_rgb_png(tmp_path / "deep_rgb.png"), "not supported"),
        (deep_rgb_ppm(tmp_path / "deep_rgb.ppm"), "not supported"),
        (deep_jp2(tmp_path / "deep.jp2", rgb), "not supported"),
        (deep_jp2(tmp_path / "boxes.jp2", rgb, bytes(2**17)), "not supported"),
        (deep_avif(tmp_path / "deep.avif", rgb), "not supported"),
        (save(rgb, "deep.sgi", bpc=2), "not supported"),
        (save(Image.new("LAB", (20, 30)), "lab.tif"), "mode LAB"),
        (save(rgb, "pages.tif", save_all=True, append_images=[rgb]), "has several pictures"),
        (save(palette, "moving.gif", save_all=True, append_images=[rgb.rotate(90).convert("P")]), "has several pictures"),
        (str(tmp_path / "text.png"), "cannot be read"),
        (str(tmp_path / "cut.png"), "cannot be read"),
        (str(tmp_path / "missing.png"), "no such file"),
        (str(tmp_path), "cannot be read"),
    ):
        with pytest.raises(ImageError, match=message) as error:
            picture_io.read_picture(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match="limit"):
        picture_io.read_picture(str(tmp_path / "whole.png"), max_pixels=599)
    # What Pillow also knows, by content and not by name: it decodes what is in an icon when it opens it, and has Ghostscript run EPS.
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop\n")
    for path in (icon(tmp_path / "bomb.png", Image.new("1", (3000, 3000))), str(tmp_path / "program.png")):
        with pytest.raises(ImageError, match=r"cannot be read as a picture \(it is none of PNG, JPEG"):
            picture_io.read_picture(path)
    with pytest.raises(ImageError, match="transparency"):
        picture_io.from_pillow(rgb.convert("RGBA").quantize(8), "palette")
    # 5, 6 and 5 bits a sample are not more than 8.
    header = struct.pack("<2sIII", b"BM", 66 + 8, 0, 66) + struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0)
    (tmp_path / "565.bmp").write_bytes(header + struct.pack("<III", 0xF800, 0x07E0, 0x001F) + struct.pack("<4H", 0xF800, 0x07E0, 0x001F, 0xFFFF))
    np.testing.assert_array_equal(picture_io.read_picture(str(tmp_path / "565.bmp"))[1], [[255, 0, 0], [0, 255, 0]])
    for name in ("shallow.jp2", "shallow.sgi", "shallow.avif"):
        assert np.abs(picture_io.read_picture(save(rgb, name)).astype(int) - draw(20, 30)).mean() < 10


def test_tiffs_are_as_large_as_they_may_be(tmp_path, monkeypatch):
    """Pillow holds them against its own limit once more when it loads them."""
    path = str(tmp_path / "a.tif")
    Image.fromarray(draw(40, 60)).save(path, compression="tiff_lzw")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    np.testing.assert_array_equal(picture_io.read_picture(path), draw(40, 60))
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(ImageError, match="the limit is 1100"):
        picture_io.read_picture(path, max_pixels=1100)


def test_what_libtiff_says_is_not_shown(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path, compression="tiff_adobe_deflate")
    data = bytearray(path.read_bytes())
    data[1000:1300] = 300 * b"\xff"
    path.write_bytes(data)
    code = "import os, sys\nfrom goconv_tf import commands, picture_io\nstatus = commands.status_of(picture_io.read_picture, sys.argv[1])\n"
    code += "os.write(2, b'still there')\nsys.exit(status)"
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, check=False)
    line, rest = done.stderr.split("\n")
    assert done.returncode == 1 and line.startswith(f"error: {path}: cannot be read") and rest == "still there"


def test_lambda_is_carried_exactly(model):
    result = codec.compress(model, draw(40, 40), lmbda=0.0123456789)
    stream = bitstream.unpack(result.data, 10**6)
    assert bitstream.dequantize_lmbda(stream.lmbda_code) == result.lmbda == pytest.approx(0.0123456789, rel=1e-6)
    for outside in (0.0009, 0.11):
        with pytest.raises(RateError, match=r"outside the model's range, 0.001 to 0.1"):
            codec.compress(model, draw(40, 40), lmbda=outside)


def fake_coder(rate):
    calls = []

    def code(lmbda):
        calls.append(lmbda)
        return codec.Compressed(b"", lmbda, rate(lmbda), len(calls))

    return code, calls


@pytest.mark.parametrize(
    "rate",
    [
        lambda lm: lm**0.5,
        lambda lm: 0.02 + 3 * lm,
        lambda lm: 0.01 + 0.3 * (1 + math.tanh(4 * (math.log10(lm) + 2))),
        lambda lm: round(2000 * lm**0.45) / 2000,
        lambda lm: lm**2 * 50 + 0.001,
    ],
)
def test_rate_search_converges_within_twelve_codings(rate):
    for share in np.linspace(0.01, 0.99, 25):
        target = math.exp((1 - share) * math.log(rate(1e-3)) + share * math.log(rate(0.1)))
        code, calls = fake_coder(rate)
        assert abs(codec.search_rate(code, target, 1e-3, 0.1).bpp / target - 1) <= 0.01
        assert len(calls) <= 12


def test_arrays_that_are_no_pictures(model):
    for array in (draw(8, 8) / 255, draw(8, 8).astype(np.uint16), draw(8, 8)[..., 0], np.zeros([8, 8, 4], np.uint8), np.zeros([0, 8, 3], np.uint8)):
        for action in (codec.compress, codec.estimate):
            with pytest.raises(ImageError, match=r"a picture is uint8 \[h, w, 3\], not"):
                action(model, array)
    for thing in (Image.new("RGB", (8, 8)), draw(8, 8).tolist(), "photo.png", None, tf.zeros([8, 8, 3], tf.uint8)):
        with pytest.raises(ImageError, match=f"is a NumPy array.*, not a {type(thing).__name__}"):
            codec.compress(model, thing)
    with pytest.raises(UsageError, match="entropy_coder must be tfc or range-coder, not zip"):
        codec.compress(model, draw(8, 8), entropy_coder="zip")


def test_bytes_of_any_kind(model):
    picture = draw(20, 30)
    data = codec.compress(model, picture).data
    decoded = codec.decompress(model, data)
    for same in (bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(codec.decompress(model, same), decoded)
    for other in ("a.gcv", 5, None, tf.constant(data)):
        with pytest.raises(BitstreamError, match=f"is bytes, not a {type(other).__name__}"):
            codec.decompress(model, other)


def test_threads_compile_a_model_once(model_dir, monkeypatch):
    """Six threads that use a new model at once compile it once, and code as one thread does."""
    model, pictures = zoo.load_pretrained(pathlib.Path(model_dir)), [draw(20 + k, 30, seed=k) for k in range(12)]
    traced, method, function = [], model.g_a[0].call, tf.function
    monkeypatch.setattr(tf, "function", lambda *args, **kwargs: time.sleep(0.2) or function(*args, **kwargs))  # so that all come to it
    model.g_a[0].call = lambda *args: traced.append(1) or method(*args)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        coded = list(pool.map(lambda picture: codec.compress(model, picture).data, pictures))
    assert len(traced) == 1
    assert coded == [codec.compress(model, picture).data for picture in pictures]


def test_lambdas_at_the_ends_of_the_range_may_come_back(model):
    """Files round them, perhaps outwards."""
    for end in (model.config.lmbda_min, model.config.lmbda_max):
        first = codec.compress(model, draw(16, 16), lmbda=end)
        assert codec.compress(model, draw(16, 16), lmbda=first.lmbda).data == first.data
    with pytest.raises(RateError, match="outside"):
        codec.compress(model, draw(16, 16), lmbda=1.001 * model.config.lmbda_max)


def test_no_picture_stays_in_memory(model, rnn):
    """Compiled stages keep what a call looked like, not what it was given."""
    for one in (model, rnn):
        codec.compress(one, draw(32, 32))
        kept = [cell.cell_contents for f in one.__dict__["_stages"].values() for cell in f.python_function.func.__closure__]
        assert kept and not any(tf.is_tensor(part) for value in kept if value is not one for part in tf.nest.flatten(value))


def test_rate_search_says_what_it_reaches():
    code, calls = fake_coder(lambda lm: lm**0.5)
    with pytest.raises(RateError, match=r"0.0316 to 0.3162 bpp"):
        codec.search_rate(code, 0.5, 1e-3, 0.1)
    assert len(calls) == 2
    code, calls = fake_coder(lambda lm: 0.1 if lm < 0.02 else 0.3)
    with pytest.raises(RateError, match="nearest"):
        codec.search_rate(code, 0.2, 1e-3, 0.1)
    assert len(calls) == 12
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(RateError):
            codec.search_rate(code, bad, 1e-3, 0.1)


def test_target_rate_on_a_picture(model):
    picture = draw(192, 160)
    reach = [codec.compress(model, picture, lmbda=lm).bpp for lm in (0.001, 0.1)]
    target = sum(reach) / 2
    result = codec.compress(model, picture, target_bpp=target)
    assert abs(result.bpp / target - 1) <= 0.01 and result.codings <= 12


def resealed(data, change):
    """The stream with its fields changed and its checksums right again: damage that only a hostile hand makes."""
    stream = bitstream.unpack(data, 10**9)
    change(stream)
    return bitstream.pack(stream)


def test_500_damaged_copies(model, model_dir, tmp_path, capsys, monkeypatch):
    """Each ends in one line, and nothing is written."""
    data = codec.compress(model, draw(96, 112), lmbda=0.05).data
    rng = np.random.default_rng(0)
    copies = []
    for _ in range(150):  # a few bits flipped
        copy = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 6)):
            copy[position] ^= 1 << rng.integers(8)
        copies.append(bytes(copy))
    copies += [data[:n] for n in rng.integers(0, len(data), 100)]  # cut
    copies += [data + rng.bytes(rng.integers(1, 50)) for _ in range(50)]  # extended
    for _ in range(50):  # two stretches swapped
        a, b, c, d = sorted(rng.choice(len(data), 4, replace=False))
        copies.append(data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:])
    copies += [rng.bytes(rng.integers(1, 500)) for _ in range(50)]  # foreign
    copies += [data[:4] + rng.bytes(rng.integers(1, 500)) for _ in range(50)]

    def random_section(stream):
        sections = stream.layers[0].sections
        k = rng.integers(len(sections))
        sections[k] = rng.bytes(len(sections[k]) + 1)

    copies += [resealed(data, random_section) for _ in range(20)]
    copies += [resealed(data, lambda s: s.layers[0].sections.reverse()) for _ in range(5)]
    copies += [resealed(data, lambda s: s.layers[0].sections.__delitem__(slice(rng.integers(1, 4), None))) for _ in range(10)]
    copies += [resealed(data, lambda s: setattr(s, "height", s.height + int(rng.integers(16, 99)))) for _ in range(10)]
    copies += [resealed(data, lambda s: setattr(s, "layers", [s.layers[0]._replace(checksum=int(rng.integers(2**32)))])) for _ in range(3)]
    copies.append(resealed(data, lambda s: setattr(s, "layers", s.layers * 2)))  # more layers than the model has
    copies.append(resealed(data, lambda s: setattr(s, "lmbda_code", 0)))
    damaged = [copy for copy in copies if copy != data]
    assert len(damaged) >= 490 and len(copies) == 500
    source, target = tmp_path / "streams", tmp_path / "pictures"
    source.mkdir()
    for k, copy in enumerate(damaged):
        (source / f"{k:03d}.gcv").write_bytes(copy)
    monkeypatch.setattr(zoo, "load_pretrained", lambda path: model)
    assert commands.decompress([str(source)], model_dir, str(target)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(damaged) and all(line.startswith(f"error: {source}") for line in lines)
    assert os.listdir(target) == [] and len(os.listdir(source)) == len(damaged)
    (source / "000.gcv").write_bytes(data)
    commands.decompress([str(source / "000.gcv")], model_dir, str(target))
    assert os.listdir(target) == ["000.png"]


def test_force_writes_a_damaged_picture_and_names_the_damage(model, model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(zoo, "load_pretrained", lambda path: model)
    data = codec.compress(model, draw(96, 112), lmbda=0.05).data
    flipped = bytearray(data)
    flipped[-40] ^= 8
    wrong = resealed(data, lambda s: setattr(s, "layers", [s.layers[0]._replace(checksum=7)]))
    for name, copy, words in (
        ("flip", bytes(flipped), ["checksum of section 4 of 4 is wrong", "entropy parameters differ"]),
        ("latents", wrong, ["entropy parameters differ between encoder and decoder"]),
        ("tail", data + b"xyz", ["3 bytes follow"]),
        ("whole", data, []),
    ):
        source, target = tmp_path / f"{name}.gcv", tmp_path / f"{name}.png"
        source.write_bytes(copy)
        assert commands.decompress([str(source), str(target)], model_dir) == (1 if words else 0)
        assert target.exists() != bool(words)
        assert commands.decompress([str(source), str(target)], model_dir, force=True) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert Image.open(target).size == (112, 96) and all(word in line for word in words) and ("--force" in line) == bool(words)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "latents.png")), np.asarray(Image.open(tmp_path / "whole.png")))


def test_a_lack_of_memory_is_said_beforehand(model, monkeypatch):
    data = codec.compress(model, draw(40, 40), lmbda=0.02).data
    monkeypatch.setattr(memory, "available_memory", lambda: 1e4)
    for action in (lambda: codec.compress(model, draw(40, 40), lmbda=0.02), lambda: codec.decompress(model, data)):
        with pytest.raises(GoConvError, match="48 x 48 pixels need about"):
            action()
    monkeypatch.undo()
    assert memory.available_memory() > 1e6


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4096e3),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/memory.max": "3000000\n", "/sys/fs/cgroup/a/memory.current": "2000000\n"}, 1e6),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "2000000\n"}, 4096e3),
        (
            {
                "/proc/self/cgroup": "5:cpu:/x\n4:hugetlb,memory:/job\n0::/\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
                "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000000\n",
                "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": "2500000\n",
                "/sys/fs/cgroup/memory/job/memory.stat": "cache 7\ntotal_inactive_file 1500000\n",
            },
            2e6,
        ),
    ],
)
def test_limits_of_containers_count(files, expected, monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000 kB\n", **files}

    def fake(path, **kwargs):
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])

    monkeypatch.setattr(memory, "open", fake, raising=False)
    assert memory.available_memory() == expected


def test_pillows_own_limit_comes_back_after_threads_that_overlap(photo):
    before = Image.MAX_IMAGE_PIXELS
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: picture_io.read_picture(photo), range(64)))
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ["model", "crpe", "rnn"])
def test_estimates_are_those_of_files_also_in_tiles(kind, request, monkeypatch):
    model, picture = request.getfixturevalue(kind), draw(300, 270)
    lmbda = 0.02 if model.has_lambda else None
    stream = bitstream.unpack(codec.compress(model, picture, lmbda=lmbda).data, 10**6)
    whole = codec.estimate(model, picture, lmbda)
    assert sum(whole.values()) == pytest.approx(8 * stream.payload, rel=0.1)
    assert list(codec.estimate(model, picture, lmbda, layers=1)) == list(model.config.layers[0])
    if model.has_lambda:
        middle = bitstream.unpack(codec.compress(model, picture).data, 10**6)
        assert codec.estimate(model, picture) == codec.estimate(model, picture, bitstream.dequantize_lmbda(middle.lmbda_code))
        for end in (model.config.lmbda_min, model.config.lmbda_max):
            codec.estimate(model, draw(32, 32), bitstream.dequantize_lmbda(bitstream.quantize_lmbda(end)))
    with pytest.raises(RateError):
        codec.estimate(model, picture, 0.9)
    monkeypatch.setattr(memory, "WHOLE_BYTES", 0)
    monkeypatch.setattr(memory, "TILE_BYTES", 0)
    tiled = codec.estimate(model, picture, lmbda)
    for name, bits in whole.items():
        assert tiled[name] == pytest.approx(bits, rel=0.01, abs=4), name


def test_crc_is_the_one_the_format_names():
    """CRC-16/XMODEM, whose check value is 0x31C3, little-endian before a section; of all up to that section's end but for checksums."""

    def crc(data):
        value = 0
        for byte in data:
            value ^= byte << 8
            for _ in range(8):
                value = (value << 1 ^ (0x1021 if value & 0x8000 else 0)) & 0xFFFF
        return value.to_bytes(2, "little")

    assert crc(b"123456789") == bytes([0xC3, 0x31])
    data = bitstream.pack(bitstream.Stream("tfc", 1, 2, 3, 16, 16, [bitstream.Layer(0, [b"", b"123456789"])]))
    start, length, section = data[:-14], data[-12:-11], data[-9:]
    assert data[-14:-12] == crc(start) and data[-11:-9] == crc(start + length + section)


def test_streams_of_other_models_and_weights(model, model_dir, tmp_path):
    data = codec.compress(model, draw(40, 40), lmbda=0.02).data
    other = zoo.load_pretrained(model_dir, fold=False)
    renamed = zoo.save_pretrained(other, str(tmp_path / "a"), "another-name")
    stream = bitstream.unpack(data, 10**6)
    with pytest.raises(ModelMismatchError, match="another model than another-name"):
        codec.check_model(stream, renamed)
    other.g_s[0].high.bias_parameter.assign_add([0.1] * 4)
    changed = zoo.save_pretrained(other, str(tmp_path / "b"), "tiny-test")
    with pytest.raises(ModelMismatchError, match="other weights"):
        codec.check_model(stream, changed)


def test_zoo_round_trip_in_both_precisions(model, model_dir, tmp_path):
    source = zoo.load_pretrained(model_dir, fold=False)
    picture = draw(64, 64)
    same = zoo.save_pretrained(source, str(tmp_path / "same"), "tiny-test")
    assert same.fingerprint == model.info.fingerprint
    data = codec.compress(model, picture, lmbda=0.02).data
    np.testing.assert_array_equal(codec.decompress(zoo.load_pretrained(same.path), data), codec.decompress(model, data))
    half = zoo.save_pretrained(source, str(tmp_path / "half"), "tiny-test", dtype="float16")
    loaded = zoo.load_pretrained(half.path)
    result = codec.compress(loaded, picture, lmbda=0.02, reconstruct=True)
    np.testing.assert_array_equal(codec.decompress(loaded, result.data), result.reconstruction)


def test_a_broken_folder_does_not_hide_the_zoo(model, model_dir, tmp_path, monkeypatch):
    for name in ("broken", "stale", "good"):
        shutil.copytree(model_dir, tmp_path / name)
    (tmp_path / "broken" / zoo.CONFIG_FILE).write_text("{")
    stale = (tmp_path / "stale" / zoo.CONFIG_FILE).read_text()
    (tmp_path / "stale" / zoo.CONFIG_FILE).write_text(stale.replace(model.info.fingerprint, "00000000"))
    monkeypatch.setenv("GOCONV_TF_ZOO", str(tmp_path))
    assert "tiny-test" in [info.name for info in zoo.list_models()]
    listdir = os.listdir

    def refused(path):  # as root may read everything, modes do not show it here
        if path == str(tmp_path / "locked"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refused)
        patch.setenv("GOCONV_TF_ZOO", os.pathsep.join([str(tmp_path / "locked"), str(tmp_path)]))
        (tmp_path / "locked").mkdir()
        assert "tiny-test" in [info.name for info in zoo.list_models()]
    stream = bitstream.unpack(codec.compress(model, draw(40, 40), lmbda=0.02).data, 10**6)
    assert codec.find_stream_model(stream).path == str(tmp_path / "good")
    with pytest.raises(CheckpointError, match="cannot be read"):
        zoo.find_model("broken")
    # Whatever is listed can be asked for, also where its folder is called otherwise, or holds a run.
    shutil.copytree(model_dir, tmp_path / "run" / "export")
    shutil.rmtree(tmp_path / "good")
    assert zoo.find_model("tiny-test").path == str(tmp_path / "run" / "export") == zoo.find_model("run").path


@pytest.mark.parametrize(
    "damage",
    [
        *({"name": name} for name in ("../victim", 5, "", "..", "a\nb")),
        *({"card": card} for card in ([], {"kodak": [{}]}, {"kodak": 3}, {"kodak": [{"bpp": "0.5"}]}, {"kodak": [3]}, {"kodak": [{"bpp": 10**400}]})),
        *({"config": {"lmbda_min": value}} for value in (0.0, -1, 0.9)),
        *(
            {"config": {key: value}}
            for key, value in (("lmbda_min", "x"), ("filters", 1e300), ("filters", 4096), ("hyper_width", 1), ("estimation_widths", [0, 16]))
        ),
        {"fingerprint": "xyz"},
        {"sha256": 7},
    ],
)
def test_configs_that_say_what_cannot_be(damage, model_dir, tmp_path, monkeypatch):
    config = json.loads(pathlib.Path(model_dir, zoo.CONFIG_FILE).read_text())
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / zoo.CONFIG_FILE).write_text(json.dumps({**config, **damage}))
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        zoo.read_info(str(tmp_path / "m"))
    assert "\n" not in str(error.value)
    monkeypatch.setenv("GOCONV_TF_ZOO", str(tmp_path))
    assert "variable-rate-small-mse" in [info.name for info in zoo.list_models()]


def test_cards_are_free_but_for_what_is_read(model, tmp_path):
    info = zoo.save_pretrained(model, str(tmp_path), "free", card={"training": "3 days on one GPU", "kodak": [{"bpp": 0.3, "machine": "x86"}]})
    assert evaluation.ModelSubject(str(tmp_path)).meta["steps"] is None
    with pytest.raises(UsageError, match="card cannot be read"):
        zoo.save_pretrained(model, str(tmp_path), "free", card={"kodak": [{"bpp": "0.3"}]})
    assert zoo.read_info(str(tmp_path)).sha256 == info.sha256


def test_a_picture_within_iptc_data_is_not_read(tmp_path):
    """Pillow shows its size and mode only when it is loaded, past every limit."""

    def field(record, dataset, data):
        return bytes([0x1C, record, dataset]) + len(data).to_bytes(2, "big") + data

    buffer = io.BytesIO()
    Image.fromarray(np.zeros([50, 40, 4], np.uint8)).save(buffer, "PNG")
    data = field(3, 60, bytes([1, 0])) + field(3, 20, b"\0\1") + field(3, 30, b"\0\1") + field(3, 120, b"\0\1")
    (tmp_path / "a.jpg").write_bytes(data + field(8, 10, buffer.getvalue()))
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "IPTC" and image.size == (1, 1)
        with pytest.raises(ImageError, match="IPTC"):
            picture_io.from_pillow(image, "a.jpg")
    with pytest.raises(ImageError, match="cannot be read as a picture"):
        picture_io.read_picture(str(tmp_path / "a.jpg"), max_pixels=100)


def test_files_are_read_where_there_is_memory_for_them(model, tmp_path, monkeypatch):
    Image.fromarray(draw(40, 48)).save(tmp_path / "a.png")
    data = codec.compress(model, draw(40, 48), lmbda=0.02).data
    (tmp_path / "a.gcv").write_bytes(data)
    monkeypatch.setattr(memory, "available_memory", lambda: 15 * 40 * 48 - 1)
    with pytest.raises(GoConvError, match=r"a\.png: 48 x 40 pixels need about"):
        picture_io.read_picture(str(tmp_path / "a.png"))
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * len(data) - 1)
    with pytest.raises(GoConvError, match=r"a\.gcv: \d+ bytes need about"):
        commands.read_stream_file(str(tmp_path / "a.gcv"))
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * len(data))
    assert commands.read_stream_file(str(tmp_path / "a.gcv")) == data


def test_weights_that_are_none(model_dir, tmp_path):
    """Not finite, too few for what config.json claims, or not finite in 16 bits: the model goes on as it was."""
    model = zoo.load_pretrained(model_dir, fold=False)
    beta = model.g_a[0].high_activation.beta.variable
    before = beta.numpy()
    beta.assign(np.where(np.arange(before.size) == 1, 1e5, before))
    with pytest.raises(CheckpointError, match="not finite, or not in float16, such as g_a/0"):
        zoo.save_pretrained(model, str(tmp_path / "half"), "half", dtype="float16")
    assert not (tmp_path / "half").exists() and model.has_exact
    beta.assign(before)
    path = tmp_path / "model"
    shutil.copytree(model_dir, path)
    config = json.loads((path / "config.json").read_text())

    def change(arrays, **fields):
        data = safetensors.numpy.save(arrays)
        (path / "model.safetensors").write_bytes(data)
        (path / "config.json").write_text(
            json.dumps({**config, "config": {**config["config"], **fields}, "sha256": hashlib.sha256(data).hexdigest()})
        )

    arrays = safetensors.numpy.load((path / "model.safetensors").read_bytes())
    name = next(name for name in arrays if name.endswith("quantization_offset"))
    change({**arrays, name: np.full_like(arrays[name], np.nan)})
    with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
        zoo.load_pretrained(str(path))
    for widths in (dict(filters=2048), dict(latents=2048), dict(hyper_width=2048), dict(estimation_widths=[2048, 2048])):
        change(arrays, **widths)
        with pytest.raises(CheckpointError, match="too few weights"):
            zoo.load_pretrained(str(path))


def test_saving_in_16_bits_leaves_a_model_its_integers(model_dir, tmp_path, monkeypatch):
    """Whether the file's integers can be made or not."""
    model = zoo.load_pretrained(model_dir, fold=False)
    before = zoo.integers_hash(model)
    assert zoo.save_pretrained(model, str(tmp_path), "half", dtype="float16").integers != before == zoo.integers_hash(model)
    last, calls = list(model.exact_layers().values())[-1], []
    quantize = last.quantize

    def fail_once():
        calls.append(None)
        if len(calls) == 1:
            raise ValueError("too large")
        return quantize()

    monkeypatch.setattr(last, "quantize", fail_once)
    with pytest.raises(CheckpointError, match=r"no integer form: .*too large"):
        zoo.save_pretrained(model, str(tmp_path / "more"), "half", dtype="float16")
    assert len(calls) == 2 and before == zoo.integers_hash(model)


@pytest.mark.parametrize("kind", sorted(presets.PRESETS))
def test_fewest_weights_are_fewer_than_there_are(kind, request):
    model = request.getfixturevalue({"variable_rate": "model", "crpe": "crpe", "scalable_rnn": "rnn"}[kind])
    assert model.config.fewest_weights < sum(int(np.prod(v.shape)) for v in model.variables)


def test_weights_behind_a_link_stay_there(model_dir, tmp_path):
    model = zoo.load_pretrained(model_dir, fold=False)
    zoo.save_pretrained(model, str(tmp_path / "a"), "a")
    weights = tmp_path / "a" / "model.safetensors"
    shutil.move(weights, tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    zoo.save_pretrained(model, str(tmp_path / "a"), "b", dtype="float16")
    assert weights.is_symlink() and zoo.load_pretrained(str(tmp_path / "a")).info.name == "b"


def test_a_fingerprint_is_of_what_the_folder_holds(model_dir, tmp_path):
    """Another synthesis changes no table, integer or latent: only the fingerprint keeps files from being decoded by it."""
    folder = tmp_path / "m"
    shutil.copytree(model_dir, folder)
    weights, config = folder / zoo.WEIGHTS_FILE, folder / zoo.CONFIG_FILE
    arrays, before = safetensors.numpy.load(weights.read_bytes()), json.loads(config.read_text())
    name = next(name for name in arrays if name.startswith("g_s/") and "bias" in name)

    def change(key, value, **fields):
        weights.write_bytes(safetensors.numpy.save({**arrays, key: value}))
        config.write_text(json.dumps({**before, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), **fields}))

    change(name, arrays[name] + 1)
    with pytest.raises(CheckpointError, match="its fingerprint is not that of its name, settings and weights"):
        zoo.load_pretrained(str(folder))
    change(name, arrays[name], sha256=before["sha256"], name="another")
    weights.write_bytes(pathlib.Path(model_dir, zoo.WEIGHTS_FILE).read_bytes())
    with pytest.raises(CheckpointError, match="its fingerprint is not"):
        zoo.load_pretrained(str(folder))
    change(name, arrays[name].astype(np.float64))
    with pytest.raises(CheckpointError, match="numbers of type float64, not float32 or float16"):
        zoo.load_pretrained(str(folder))
    table = next(name for name in arrays if name.endswith("/cdf"))
    change(table, arrays[table].astype(np.int64))
    with pytest.raises(CheckpointError, match="numbers of type int64, not int32"):
        zoo.load_pretrained(str(folder))


def test_any_change_of_a_kernel_is_one_of_the_model(model_dir):
    loaded = zoo.load_pretrained(model_dir, fold=False)
    assert not loaded.has_changed
    kernel = loaded.g_s[1].high.kernel_parameter
    before = [v.numpy() for v in kernel.trainable_variables]
    for variable in kernel.trainable_variables:
        variable.assign(np.round(variable.numpy(), 3))
    with pytest.raises(UsageError, match="no model folder"):
        codec.compress(loaded, draw(40, 40))
    for variable, value in zip(kernel.trainable_variables, before):
        variable.assign(value)
    assert not loaded.has_changed


def test_keras_set_to_float64(model_dir):
    tf.keras.mixed_precision.set_global_policy("float64")
    try:
        with pytest.raises(UsageError, match="not in float64"):
            zoo.load_pretrained(model_dir)
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")


def test_an_original_beside_its_stream_stays(model, model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(zoo, "load_pretrained", lambda path: model)
    stream, original = tmp_path / "a.gcv", tmp_path / "a.gcv.png"
    stream.write_bytes(codec.compress(model, draw(40, 48), lmbda=0.02).data)
    Image.fromarray(draw(40, 48)).save(original)
    before = original.read_bytes()
    assert commands.decompress([str(stream)], model_dir) == 1 and original.read_bytes() == before
    assert "not marked as decompress marks what it writes" in capsys.readouterr().err
    assert commands.decompress([str(stream), str(original)], model_dir) == 0 and original.read_bytes() != before  # as it was told to
    assert commands.decompress([str(stream)], model_dir) == 0


def test_one_way_to_choose_a_rate(model):
    for rates in ({"lmbda": 0.02, "target_bpp": 0.5}, {"layers": 1, "target_bpp": 0.5}):
        with pytest.raises(RateError, match="give target_bpp without"):
            codec.compress(model, draw(32, 32), **rates)


def test_a_model_that_is_replaced_while_it_is_read(model_dir, tmp_path, monkeypatch):
    """Its config.json is read, then both files change: what is loaded is the new one."""
    source, path = zoo.load_pretrained(model_dir, fold=False), str(tmp_path / "m")
    zoo.save_pretrained(source, path, "m")
    read, saved = zoo._read_weights, []

    def slow(info):
        if not saved:
            saved.append(zoo.save_pretrained(source, path, "m", dtype="float16"))
        return read(info)

    monkeypatch.setattr(zoo, "_read_weights", slow)
    assert zoo.load_pretrained(path).info.fingerprint == saved[0].fingerprint
    pathlib.Path(path, zoo.WEIGHTS_FILE).write_bytes(b"damage")
    with pytest.raises(CheckpointError, match="is damaged"):
        zoo.load_pretrained(path)


def test_weights_that_are_not_those_asked_for(model, model_dir):
    assert zoo.shared(model_dir, model.info.fingerprint).info.fingerprint == model.info.fingerprint
    with pytest.raises(CheckpointError, match=f"has weights {model.info.fingerprint} by now, not 00000000"):
        zoo.shared(model_dir, "00000000")


def test_coding_tables_that_are_none(model_dir, tmp_path):
    for change in (
        lambda table: setattr(table, "offset", table.offset[:-1]),
        lambda table: setattr(table, "cdf", table.cdf[: len(table.cdf) // 2]),
        lambda table: setattr(table, "cdf", np.where(table.cdf == 2**16, 2**16 - 1, table.cdf)),
        lambda table: setattr(table, "offset", table.offset - 2**30),
    ):
        model = zoo.load_pretrained(model_dir, fold=False)
        change(next(iter(model.entropy_models().values())).table)
        model.info = None  # else `save_pretrained` would make them anew
        zoo.save_pretrained(model, str(tmp_path / "m"), "m")
        with pytest.raises(CheckpointError, match="does not fit its config: tables/"):
            zoo.load_pretrained(str(tmp_path / "m"))


def test_damaged_model_folders(model_dir, tmp_path):
    with pytest.raises(CheckpointError, match="no model 'nowhere'"):
        zoo.find_model("nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        zoo.find_model(str(tmp_path))
    copy = str(tmp_path / "copy")

    def rewrite(change):
        """Weights that are not an encoder's, with a SHA-256 that says they are."""
        path, config_path = pathlib.Path(copy, zoo.WEIGHTS_FILE), pathlib.Path(copy, zoo.CONFIG_FILE)
        data, config = path.read_bytes(), json.loads(config_path.read_text())
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        config_path.write_text(json.dumps({**config, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))

    huge = {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}
    for damage, message in (
        (lambda: rewrite(lambda header: {**header, "more": huge}), "cannot be read"),
        (lambda: os.truncate(os.path.join(copy, zoo.WEIGHTS_FILE), 5000), "damaged"),
        (lambda: os.remove(os.path.join(copy, zoo.WEIGHTS_FILE)), "cannot be read"),
        (lambda: pathlib.Path(copy, zoo.CONFIG_FILE).write_text("{}"), "cannot be read"),
        (lambda: pathlib.Path(copy, zoo.CONFIG_FILE).write_text('{"format": 99}'), "format 99"),
    ):
        shutil.copytree(model_dir, copy, dirs_exist_ok=True)
        damage()
        with pytest.raises(CheckpointError, match=message) as error:
            zoo.load_pretrained(copy)
        assert "\n" not in str(error.value)


def test_tiles_where_memory_is_short(model, monkeypatch):
    size = (11904, 11904)
    whole = size[0] * size[1] * model.bytes_per_pixel
    assert memory.TILE_BYTES < 0.6 * whole < whole < memory.WHOLE_BYTES
    cells = []
    for share in (1.01, 0.9, 0.5):
        monkeypatch.setattr(memory, "available_memory", lambda share=share: share * whole)
        cells.append(memory.choose_tile(model, size))
    assert cells[0] is None and cells[1] > cells[2] > 1  # smaller tiles where there is less
    least = size[0] * size[1] * model.bytes_per_tiled_pixel
    monkeypatch.setattr(memory, "available_memory", lambda: least)
    with pytest.raises(GoConvError, match=r"11904 x 11904 pixels need about 1\.2 GiB of memory"):
        memory.choose_tile(model, size)


def test_tables_of_rounded_weights(model_dir, tmp_path):
    """What float16 leaves of weights has other tables than the folder, whose streams are coded with those of the weights before."""
    path = str(tmp_path / "half")
    zoo.save_pretrained(zoo.load_pretrained(model_dir, fold=False), path, "half", dtype="float16")
    for rebuild in ("build_tables", "update_offsets"):
        model = zoo.load_pretrained(path)
        assert model.info.name == "half"
        getattr(model, rebuild)()
        with pytest.raises(UsageError, match="no model folder"):
            codec.compress(model, draw(32, 32))


def test_memory_that_tensorflow_lacks(model, monkeypatch):
    data = codec.compress(model, draw(32, 32)).data

    def exhausted(*args, **kwargs):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating a tensor\non a GPU")

    validator = training.Validator(model, [], (0.01,))
    validator.pictures.append(draw(32, 32))
    monkeypatch.setattr(metrics, "_compiled_ms_ssim", lambda: exhausted)
    for name in ("compress", "decompress", "bits"):
        monkeypatch.setattr(type(model), name, exhausted)
    for action in (
        lambda: codec.compress(model, draw(32, 32)),
        lambda: codec.decompress(model, data),
        lambda: codec.estimate(model, draw(32, 32)),
        lambda: validator(model),
        lambda: metrics.ms_ssim(draw(161, 161), draw(161, 161)),
    ):
        with pytest.raises(GoConvError, match=r"^not enough memory: OOM when allocating a tensor$"):
            action()


def test_limits_and_marks_of_picture_files(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture_io.picture_bytes(draw(20, 30), decoded=True))
    assert picture_io.read_picture(str(path), max_pixels=600).shape == (20, 30, 3)
    assert [picture_io.is_decoded(str(path), size) for size in (None, (30, 20), (20, 30))] == [True, True, False]


def test_the_clock_is_looked_at_before_the_synthesis(model, monkeypatch):
    data, events = codec.compress(model, draw(64, 64)).data, []
    walk, synthesis = model.walk, model.synthesis
    monkeypatch.setattr(limits, "check", lambda: events.append("look"))
    monkeypatch.setattr(type(model), "walk", lambda self, walker: (walk(walker), events.append("walked"))[0])
    monkeypatch.setattr(type(model), "synthesis", lambda self, *args: events.append("synthesis") or synthesis(*args))
    codec.decompress(model, data)
    assert events[events.index("walked") :][:3] == ["walked", "look", "synthesis"]


def test_the_zoos_first_folder_wins(model_dir, tmp_path, monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(model_dir, tmp_path / name / "m")
    monkeypatch.setenv("GOCONV_TF_ZOO", os.pathsep.join(str(tmp_path / name) for name in "ba"))
    (listed,) = (info for info in zoo.list_models() if info.name == "tiny-test")
    assert listed.path == zoo.find_model("tiny-test").path == str(tmp_path / "b" / "m")


def test_models_that_are_not_what_their_config_says(model_dir, tmp_path):
    source = zoo.load_pretrained(model_dir, fold=False)
    infos = [zoo.save_pretrained(source, str(tmp_path / "a"), "tiny-test")]
    source.config = dataclasses.replace(source.config, lmbda_max=0.09)
    infos.append(zoo.save_pretrained(source, str(tmp_path / "b"), "tiny-test"))
    assert infos[0].sha256 == infos[1].sha256 and infos[0].fingerprint != infos[1].fingerprint
    table = next(iter(source.entropy_models().values())).table
    table.cdf = np.where(np.append(table.cdf[1:] == 2**16, False), 2**16, table.cdf)  # symbols of frequency zero
    source.info = None  # else `save_pretrained` would make them anew
    zoo.save_pretrained(source, str(tmp_path / "flat"), "m")
    with pytest.raises(CheckpointError, match="does not fit its config: tables/"):
        zoo.load_pretrained(str(tmp_path / "flat"))
    path = tmp_path / "a" / zoo.CONFIG_FILE
    config = json.loads(path.read_text())
    config["config"]["hyper_width"] += 2
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not fit its config: .* has shape"):
        zoo.load_pretrained(str(tmp_path / "a"))
