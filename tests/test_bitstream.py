"""The container: what goes in comes out, and damage is noticed."""

import numpy as np
import pytest

from goconv_tf import bitstream
from goconv_tf.errors import BitstreamError

LIMIT = 10**6


def stream(**changes):
    fields = dict(coder="tfc", model_id=0xDEADBEEF, fingerprint=7, lmbda_code=bitstream.quantize_lmbda(0.01), height=512, width=768)
    return bitstream.Stream(**{**fields, "layers": [layer(b"a" * 100, b"b" * 400, b"", b"c" * 30000)], **changes})


def layer(*sections):
    return bitstream.Layer(2**32 - 1, list(sections))


def test_round_trip():
    for s in (stream(), stream(coder="range-coder", layers=[layer(b"a", b"b"), layer(b"c", b"")]), stream(height=1, width=1)):
        assert bitstream.unpack(bitstream.pack(s), LIMIT) == s


def test_header_and_framing_on_a_kodak_picture():
    s = stream()
    assert len(bitstream.pack(s)) - s.payload <= 48


def test_every_changed_byte_every_cut_and_every_tail_is_noticed():
    data = bitstream.pack(stream(layers=[layer(b"abc" * 9, b""), layer(b"de" * 20, b"f")]))
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(BitstreamError):
                bitstream.unpack(bytes(damaged), LIMIT)
        with pytest.raises(BitstreamError):
            bitstream.unpack(data[:position], LIMIT)
    with pytest.raises(BitstreamError, match="2 bytes follow"):
        bitstream.unpack(data + b"xy", LIMIT)


def test_only_what_is_damaged_is_named():
    """A changed checksum is a damaged section as well, but the section after it is whole."""
    data = bitstream.pack(stream(layers=[layer(b"abc" * 9, b"xyz" * 9), layer(b"de" * 20, b"f" * 9)]))
    for place, number in ((b"abc", "1 of 2 in layer 1"), (b"xyz", "2 of 2 in layer 1"), (b"de", "1 of 2 in layer 2")):
        for back in (-2, -1, 0, 1):  # its checksum, its own bytes
            flipped = bytearray(data)
            flipped[data.index(place) + back] ^= 4
            problems = []
            bitstream.unpack(bytes(flipped), LIMIT, problems=problems)
            assert len(problems) == 1 and f"section {number} is" in problems[0], problems


def test_damage_everywhere_takes_few_looks_at_the_file(monkeypatch):
    sections, looks, original = 64, [], bitstream.binascii.crc_hqx
    data = bitstream.pack(stream(layers=[layer(*[bytes([k]) * 3 for k in range(sections)])]))
    damaged = bytearray(data)
    for k in range(sections):
        damaged[data.index(bytes([k]) * 3) - 1] ^= 255
    monkeypatch.setattr(bitstream.binascii, "crc_hqx", lambda part, crc: looks.append(len(part)) or original(part, crc))
    problems = []
    bitstream.unpack(bytes(damaged), LIMIT, problems=problems)
    assert len(problems) == sections and sum(looks) < 10 * len(data)


def test_layers_before_a_cut_or_damage_can_be_had():
    s = stream(layers=[layer(b"abc" * 9, b"x"), layer(b"de" * 20, b"f"), layer(b"g", b"h" * 50)])
    data = bitstream.pack(s)
    sizes = s.layer_bytes()
    assert sizes[-1] == len(data) and [bitstream.pack(s.cut(k)) for k in (1, 2, 3)][2] == data
    assert bitstream.unpack(bitstream.pack(s.cut(2)), LIMIT) == s.cut(2)  # a whole file of two layers
    for position in range(len(data)):
        whole = sum(size <= position for size in sizes)
        flipped = bytearray(data)
        flipped[position] ^= 16
        for copy in (data[:position], bytes(flipped)):
            with pytest.raises(BitstreamError, match=f"first {whole} of 3" if whole else None):
                bitstream.unpack(copy, LIMIT)
            if whole:
                part = bitstream.unpack(copy, LIMIT, allow_truncated=True)
                assert (part.layers, part.missing) == (s.layers[:whole], 3 - whole)
            else:
                with pytest.raises(BitstreamError):
                    bitstream.unpack(copy, LIMIT, allow_truncated=True)
    with pytest.raises(BitstreamError, match="follow"):
        bitstream.unpack(data + b"x", LIMIT, allow_truncated=True)


def test_swapped_sections_are_noticed():
    a = bitstream.pack(stream(layers=[layer(b"first", b"other")]))
    assert a.count(b"first") == 1
    swapped = a.replace(b"first", b"12345").replace(b"other", b"first").replace(b"12345", b"other")
    with pytest.raises(BitstreamError, match="damaged"):
        bitstream.unpack(swapped, LIMIT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n", "not a goconv_tf file"),
        (b"GCV", "not a goconv_tf file"),
        (b"\x89GCV", "cut short"),
        (b"\x89GCV\x01" + bytes(100), "version 1"),
        (b"\x89GCV\x02" + b"\xff" * 100, "too long"),
    ],
)
def test_foreign_files(data, message):
    with pytest.raises(BitstreamError, match=message):
        bitstream.unpack(data, LIMIT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [(dict(height=2000), "limit"), (dict(height=0), "limit"), (dict(lmbda_code=2**31), "lambda")]
    + [(dict(layers=layers), "layers of") for layers in ([layer(*[b""] * 65)], [layer(b"")] * 33, [layer()])],
)
def test_hostile_fields_with_right_checksums(changes, message):
    with pytest.raises(BitstreamError, match=message):
        bitstream.unpack(bitstream.pack(stream(**changes)), LIMIT)


def test_lambda_survives_to_a_thousandth():
    for lmbda in (1e-6, 1e-4, 0.0123, 0.5):
        code = bitstream.quantize_lmbda(lmbda)
        assert 0 < code < 2**31
        np.testing.assert_allclose(bitstream.dequantize_lmbda(code), lmbda, rtol=1e-3)
        assert bitstream.quantize_lmbda(bitstream.dequantize_lmbda(code)) == code
    for bad in (0, 1, -1, 2):
        with pytest.raises(ValueError, match="lambda"):
            bitstream.quantize_lmbda(bad)


def test_the_largest_and_smallest_that_a_header_may_say():
    layers = [layer(*[b"x"] * bitstream.MAX_SECTIONS)] * bitstream.MAX_LAYERS
    largest = stream(height=1000, width=LIMIT // 1000, layers=layers, exact=False)
    assert bitstream.unpack(bitstream.pack(largest), LIMIT) == largest
    for lmbda in (1e-12, 1 - 1e-12):
        assert 0 < bitstream.quantize_lmbda(lmbda) < 2**31


def test_unknown_entropy_coders():
    data = bytearray(bitstream.pack(stream()))
    for number in (len(bitstream.CODER_NAMES), 127, 128 + len(bitstream.CODER_NAMES)):
        data[5] = number
        with pytest.raises(BitstreamError, match="entropy coder this program does not know"):
            bitstream.unpack_header(bytes(data), LIMIT)
