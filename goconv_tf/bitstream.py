r"""Bytes of a compressed file <-> named fields. No TensorFlow, and nothing else of this library but errors.

    offset  bytes
    0       4      magic  89 47 43 56  ("\x89GCV")
    4       1      version of this format
    5       1      entropy coder; plus 128 where entropy parameters were computed in floating point
    6       4      model id: CRC-32 of the model's name
    10      4      fingerprint of its weights and coding tables
    14      4      operating point: lambda * 2^31, rounded; 0 for models without one
    18      1-5    height, as a little-endian base-128 number
            1-5    width
            1      number of layers, most important first; 1 for models that are not scalable
            1      number of sections of a layer
    then for each layer
            4      CRC-32 (zlib's) of all coded integers ("latents") of it and the layers before, as int32 in the order of coding
      and for each of its sections
            1-5    its length
            2      CRC-16 (XMODEM: polynomial 0x1021, from 0) of everything before it but other CRC-16s, and of its payload
            n      payload

Numbers of fixed size are little-endian.
"""

import binascii
import dataclasses
import struct
from typing import List, NamedTuple, Optional

from goconv_tf.errors import BitstreamError

MAGIC = b"\x89GCV"
VERSION = 2
CODER_NAMES = ("tfc", "range-coder")
LMBDA_SCALE = 2**31
MAX_LAYERS = 32
MAX_SECTIONS = 64  # of a layer

_INEXACT = 128

_FIXED = struct.Struct("<4sBBIII")
HEADER_BYTES = _FIXED.size + 4 * 5  # the most that comes before the first layer


def quantize_lmbda(lmbda: float) -> int:
    """The int32 that stands for a lambda in (0, 1); ValueError for others."""
    if not 0 < lmbda < 1:
        raise ValueError(f"lambda must be between 0 and 1, not {lmbda}")
    return min(max(round(lmbda * LMBDA_SCALE), 1), LMBDA_SCALE - 1)


def dequantize_lmbda(code: int) -> float:
    """The lambda that encoder and decoder use for an int32."""
    return code / LMBDA_SCALE


class Layer(NamedTuple):
    """What adds one step of quality. checksum: of the integers so far; sections: the substreams in coding order."""

    checksum: int
    sections: List[bytes]


@dataclasses.dataclass
class Stream:
    """A compressed picture. height, width: of the picture, pixels; missing: layers that the file should have but has not."""

    coder: str
    model_id: int
    fingerprint: int
    lmbda_code: int
    height: int
    width: int
    layers: List[Layer]
    missing: int = 0
    exact: bool = True  # entropy parameters were computed with integers

    @property
    def lmbda(self) -> Optional[float]:
        """The lambda that it was coded with; None for models without one."""
        return dequantize_lmbda(self.lmbda_code) or None

    @property
    def pixels(self) -> int:
        """How many the picture has."""
        return self.height * self.width

    @property
    def payload(self) -> int:
        """Bytes of all sections."""
        return sum(len(section) for layer in self.layers for section in layer.sections)

    def layer_bytes(self) -> List[int]:
        """Bytes of the file up to the end of each layer."""
        return [len(pack(self.cut(count))) for count in range(1, len(self.layers) + 1)]

    def cut(self, count: int) -> "Stream":
        """The stream with its first `count` layers only, whole in itself."""
        return dataclasses.replace(self, layers=self.layers[:count], missing=0)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def pack(stream: Stream) -> bytes:
    """The file's bytes, of a stream of at least one layer; ValueError for entropy coders that are not in CODER_NAMES."""
    out = bytearray(
        _FIXED.pack(
            MAGIC,
            VERSION,
            CODER_NAMES.index(stream.coder) + (0 if stream.exact else _INEXACT),
            stream.model_id,
            stream.fingerprint,
            stream.lmbda_code,
        )
    )
    out += _varint(stream.height) + _varint(stream.width) + _varint(len(stream.layers)) + _varint(len(stream.layers[0].sections))
    crc = 0
    checked = 0  # how much of `out` the checksum covers
    for layer in stream.layers:
        out += struct.pack("<I", layer.checksum)
        for section in layer.sections:
            out += _varint(len(section))
            crc = binascii.crc_hqx(section, binascii.crc_hqx(bytes(out[checked:]), crc))
            out += struct.pack("<H", crc) + section
            checked = len(out)
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


def _report(problem, problems):
    if problems is None:
        raise BitstreamError(problem)
    problems.append(problem)


def _start(reader):
    """(fields of the file's start, number of layers, sections of each) from a reader at its beginning."""
    data = reader.data
    if not data:
        raise BitstreamError("the file is empty")
    if not data.startswith(MAGIC[: len(data)]):
        raise BitstreamError("not a goconv_tf file")
    if len(data) > 4 and data[4] != VERSION:
        raise BitstreamError(f"a goconv_tf file of version {data[4]}; this program reads version {VERSION}")
    fixed = _FIXED.unpack(reader.take(_FIXED.size))
    height, width, layer_count, section_count = (reader.varint() for _ in range(4))
    if not 0 < layer_count <= MAX_LAYERS or not 0 < section_count <= MAX_SECTIONS:
        raise BitstreamError(f"the file is damaged: {layer_count} layers of {section_count} sections")
    return (*fixed[2:], height, width), layer_count, section_count


def _stream(fields, layers, missing, max_pixels) -> Stream:
    """The stream of `_start`'s fields, if they are within bounds."""
    coder, model_id, fingerprint, lmbda_code, height, width = fields
    exact, coder = coder < _INEXACT, coder % _INEXACT
    if coder >= len(CODER_NAMES):
        raise BitstreamError(f"the file needs an entropy coder this program does not know (number {coder})")
    if not 0 < height * width <= max_pixels:
        raise BitstreamError(f"the file claims {width} x {height} pixels; the limit is {max_pixels} (see --max_megapixels)")
    if lmbda_code >= LMBDA_SCALE:
        raise BitstreamError("the file is damaged: lambda is out of range")
    return Stream(CODER_NAMES[coder], model_id, fingerprint, lmbda_code, height, width, layers, missing, exact)


def unpack_header(data: bytes, max_pixels: float) -> Stream:
    """The stream that a file's first `HEADER_BYTES` tell of, with no layers; `missing` counts them. BitstreamError as `unpack`."""
    fields, layer_count, _ = _start(_Reader(data))
    return _stream(fields, [], layer_count, max_pixels)


def unpack(data: bytes, max_pixels: int, allow_truncated: bool = False, problems: Optional[List[str]] = None) -> Stream:
    """The stream in a file's bytes.

    Args:
      max_pixels: the largest picture that is accepted.
      allow_truncated: of a file that is cut short or damaged, give the layers before that; `missing`
        of the stream counts the others.
      problems: if given, wrong checksums and what follows the end are added to it instead of raised.

    Raises:
      BitstreamError: if it is not a stream of ours or of another version, is cut short, damaged,
        continued by other data, or claims more than max_pixels pixels.
    """
    reader = _Reader(data)
    fields, layer_count, section_count = _start(reader)
    layers: List[Layer] = []
    crcs = {0}  # of what is before
    checked = 0  # how much of the file the checksum covers
    try:
        for number in range(layer_count):
            layer = Layer(struct.unpack("<I", reader.take(4))[0], [])
            for _ in range(section_count):
                length = reader.varint()
                head = data[checked : reader.position]
                stored = struct.unpack("<H", reader.take(2))[0]
                section = reader.take(length)
                found = {binascii.crc_hqx(section, binascii.crc_hqx(head, crc)) for crc in crcs}
                crcs = {stored}
                if stored not in found:
                    # Either the section or its checksum is damaged, and no sound section after it shall be named.
                    crcs |= found if len(found) < 8 else set()  # each is another look at the file
                    place = f"section {len(layer.sections) + 1} of {section_count}" + (f" in layer {number + 1}" if layer_count > 1 else "")
                    _report(f"the file is damaged: the checksum of {place} is wrong", problems)
                layer.sections.append(section)
                checked = reader.position
            layers.append(layer)
        if reader.position != len(data):
            _report(f"the file is damaged: {len(data) - reader.position} bytes follow its end", problems)
    except BitstreamError as error:
        partial = 0 < len(layers) < layer_count
        if not partial:
            raise
        if not allow_truncated:
            raise BitstreamError(f"{error}; its first {len(layers)} of {layer_count} layers are whole (see --allow_truncated)") from None
    return _stream(fields, layers, layer_count - len(layers), max_pixels)
