r"""Bytes of a compressed file <-> named fields. No TensorFlow, and nothing else of this library but errors.

    offset  bytes
    0       4      magic  89 47 43 56  ("\x89GCV")
    4       1      version of this layout
    5       1      entropy coder
    6       4      model id: CRC-32 of the model's name
    10      4      fingerprint of its weights and coding tables
    14      4      operating point: lambda * 2^31, rounded
    18      4      CRC-32 of all coded integers ("latents")
    22      1-5    height, as a little-endian base-128 number
            1-5    width
            1      number of sections
    then for each section
            1-5    its length
            2      CRC-16 of everything before it and of its payload
            n      payload

Numbers of fixed size are little-endian.
"""

import binascii
import dataclasses
import struct
from typing import List

from goconv_tf.errors import BitstreamError

MAGIC = b"\x89GCV"
VERSION = 1
CODER_NAMES = ("tfc", "range-coder")
LMBDA_SCALE = 2**31
MAX_SECTIONS = 64

_FIXED = struct.Struct("<4sBBIIII")


def quantize_lmbda(lmbda: float) -> int:
    """The int32 that stands for a lambda in (0, 1)."""
    if not 0 < lmbda < 1:
        raise ValueError(f"lambda must be between 0 and 1, not {lmbda}")
    return min(max(round(lmbda * LMBDA_SCALE), 1), LMBDA_SCALE - 1)


def dequantize_lmbda(code: int) -> float:
    """The lambda that encoder and decoder use for an int32."""
    return code / LMBDA_SCALE


@dataclasses.dataclass
class Stream:
    """A compressed picture. height, width: of the picture, pixels; sections: the substreams in coding order."""

    coder: str
    model_id: int
    fingerprint: int
    lmbda_code: int
    checksum: int
    height: int
    width: int
    sections: List[bytes]


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def pack(stream: Stream) -> bytes:
    """The file's bytes."""
    out = bytearray(
        _FIXED.pack(
            MAGIC,
            VERSION,
            CODER_NAMES.index(stream.coder),
            stream.model_id,
            stream.fingerprint,
            stream.lmbda_code,
            stream.checksum,
        )
    )
    out += _varint(stream.height) + _varint(stream.width) + _varint(len(stream.sections))
    crc = binascii.crc_hqx(bytes(out), 0)
    for section in stream.sections:
        length = _varint(len(section))
        crc = binascii.crc_hqx(section, binascii.crc_hqx(length, crc))
        out += length + struct.pack("<H", crc) + section
    return bytes(out)


class _Reader:
    def __init__(self, data):
        self.data, self.position = data, 0

    def take(self, count):
        if self.position + count > len(self.data):
            raise BitstreamError("the file is cut short")
        self.position += count
        return self.data[self.position - count : self.position]

    def varint(self):
        number = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise BitstreamError("the file is damaged: a number in it is too long")


def unpack(data: bytes, max_pixels: int) -> Stream:
    """The stream in a file's bytes.

    Raises:
      BitstreamError: if it is not a stream of ours or of another version, is cut short, damaged,
        continued by other data, or claims more than max_pixels pixels.
    """
    if not data:
        raise BitstreamError("the file is empty")
    if not data.startswith(MAGIC[: len(data)]):
        raise BitstreamError("not a goconv_tf file")
    if len(data) > 4 and data[4] != VERSION:
        raise BitstreamError(f"a goconv_tf file of version {data[4]}; this program reads version {VERSION}")
    reader = _Reader(data)
    _, _, coder, model_id, fingerprint, lmbda_code, checksum = _FIXED.unpack(reader.take(_FIXED.size))
    height, width, count = reader.varint(), reader.varint(), reader.varint()
    if count > MAX_SECTIONS:
        raise BitstreamError("the file is damaged: too many sections")
    crc = binascii.crc_hqx(data[: reader.position], 0)
    sections = []
    for number in range(count):
        start = reader.position
        length = reader.varint()
        crc = binascii.crc_hqx(data[start : reader.position], crc)
        stored = struct.unpack("<H", reader.take(2))[0]
        section = reader.take(length)
        crc = binascii.crc_hqx(section, crc)
        if crc != stored:
            raise BitstreamError(f"the file is damaged: the checksum of section {number + 1} of {count} is wrong")
        sections.append(section)
    if reader.position != len(data):
        raise BitstreamError(f"the file is damaged: {len(data) - reader.position} bytes follow its end")
    if coder >= len(CODER_NAMES):
        raise BitstreamError(f"the file needs an entropy coder this program does not know (number {coder})")
    if not 0 < height * width <= max_pixels:
        raise BitstreamError(f"the file claims {width} x {height} pixels; the limit is {max_pixels} (see --max_megapixels)")
    if not 0 < lmbda_code < LMBDA_SCALE:
        raise BitstreamError("the file is damaged: lambda is out of range")
    return Stream(CODER_NAMES[coder], model_id, fingerprint, lmbda_code, checksum, height, width, sections)
