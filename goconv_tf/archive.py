"""Archives of pictures as an Apache Beam pipeline, on any filesystem and runner that Beam has; the command is `python -m goconv_tf.beam`.

Every input ends as an output file or as a dead letter. Outputs appear under their names only when they are whole, so that what is there
is done: a second run looks at the outputs, makes those that are missing, and writes the reports anew.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import posixpath
import re
import threading
import uuid
from typing import Any, Dict, Iterable, List, Optional, Tuple

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes, FileSystem
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from goconv_tf import bitstream, codec, commands, evaluation, picture_io, zoo
from goconv_tf.errors import BitstreamError, CheckpointError, GoConvError, UsageError

EXTENSIONS = {"compress": commands.STREAM_EXTENSION, "decompress": commands.PICTURE_EXTENSION, "evaluate": ".json"}
SETTINGS, METRICS, DEAD_LETTERS, SUMMARY = "_settings.json", "_metrics.jsonl", "_dead_letters.jsonl", "_summary.json"
TEMPORARY = "_goconv_temporary"
_RAW = CompressionTypes.UNCOMPRESSED  # or Beam would unpack files named .gz

_coding = threading.Lock()  # a picture at a time in each process: TensorFlow uses the cores, and memory is checked before each


@dataclasses.dataclass(frozen=True)
class Task:
    """What is done to every input.

    model: as `zoo.find_model` takes it; None: decompress looks it up. fingerprint: of its weights. input_folder: inputs of other
    folders may have the same names.
    """

    command: str
    output: str
    model: Optional[str] = None
    fingerprint: Optional[str] = None
    lmbda: Optional[float] = None
    target_bpp: Optional[float] = None
    layers: Optional[int] = None
    entropy_coder: str = "tfc"
    allow_truncated: bool = False
    max_pixels: int = picture_io.MAX_PIXELS
    input_folder: str = ""

    @property
    def point(self) -> Dict[str, Any]:
        return {name: getattr(self, name) for name in ("lmbda", "target_bpp", "layers") if getattr(self, name) is not None}

    @property
    def settings(self) -> Dict[str, Any]:
        """What the outputs depend on."""
        names = ("command", "input_folder", "fingerprint", "lmbda", "target_bpp", "layers", "entropy_coder")
        return {name: getattr(self, name) for name in names}


def make_task(command, output, model=None, **settings) -> Task:
    """A Task whose model is there and reaches what is asked of it; UsageError, CheckpointError or RateError otherwise."""
    if re.search(r"[*?\[]", output):
        raise UsageError(f"{output}: --output must not have wildcards")
    if model is None:
        return Task(command, output, **settings)
    info = zoo.find_model(model)
    task = Task(command, output, model, info.fingerprint, **settings)
    if command != "decompress":
        codec.check_operating_point(info.config, **task.point)
    return task


def fixed_part(pattern) -> str:
    """The folder that a pattern with a slash names before its first wildcard, with a slash."""
    return re.split(r"[*?\[]", pattern)[0].rpartition("/")[0] + "/"


def _anchored(path) -> str:
    """A path, or pattern, that does not depend on the working directory."""
    return path if "://" in path else os.path.abspath(path)


def plan(task, pattern) -> List[Tuple[str, str]]:
    """[(input, output)] of the files that match, with their folders below the pattern's fixed part; UsageError if two share an output."""
    base = fixed_part(pattern)
    sources = sorted({found.path for found in FileSystems.match([pattern])[0].metadata_list})
    if not sources:
        raise UsageError(f"{pattern}: no files match")
    taken: Dict[str, str] = {}
    reserved = {FileSystems.join(task.output, name) for name in (SETTINGS, METRICS, DEAD_LETTERS, SUMMARY)}
    inputs = re.compile(FileSystem.translate_pattern(_anchored(pattern + "*" if pattern.endswith("/") else pattern)))  # as Beam takes a folder
    for source in sources:
        if {".", ".."} & set(source[len(base) :].split("/")):  # which names in object stores may have
            raise UsageError(f"{source}: has . or .. as a folder, which would be another one below --output")
        target = FileSystems.join(task.output, *posixpath.splitext(source[len(base) :])[0].split("/")) + EXTENSIONS[task.command]
        if target in taken:
            raise UsageError(f"{taken[target]} and {source} would both be written to {target}")
        kept = target in reserved or target.startswith(FileSystems.join(task.output, TEMPORARY, ""))
        if kept or inputs.match(_anchored(target)):
            raise UsageError(
                f"{source} would be written to {target}, which is " + ("kept for reports and temporary files" if kept else "an input itself")
            )
        taken[target] = source
    return [(source, target) for target, source in taken.items()]


def read(path) -> bytes:
    with FileSystems.open(path, compression_type=_RAW) as f:
        return f.read()


def write(task, target, parts: Iterable[bytes], replace=False) -> None:
    """Writes a file whole or not at all; one that is there stays, unless it is to be replaced."""
    temporary = FileSystems.join(task.output, TEMPORARY, uuid.uuid4().hex)
    with FileSystems.create(temporary, compression_type=_RAW) as f:
        for part in parts:
            f.write(part)
    folder = FileSystems.split(target)[0]
    if not FileSystems.exists(folder):
        with contextlib.suppress(OSError):  # another process was faster
            FileSystems.mkdirs(folder)
    try:
        FileSystems.rename([temporary], [target])
    except OSError:
        # Some filesystems do not rename to what is there.
        if not FileSystems.exists(target):
            raise
        if replace:
            FileSystems.delete([target])
            FileSystems.rename([temporary], [target])


def describe(data, whole=None) -> Dict[str, Any]:
    """What a stream's header and length say; with `whole`, its layers that are, also how many of them there are and are missing."""
    stream = bitstream.unpack_header(data, math.inf)
    size = {"width": stream.width, "height": stream.height, "pixels": stream.pixels}
    layers = {"layers": len(whole.layers), "missing": whole.missing} if whole else {"layers": stream.missing}
    return {"bytes": len(data), "bpp": 8 * len(data) / stream.pixels, "lmbda": stream.lmbda, **layers, **size}


def finished(task, source, target) -> Dict[str, Any]:
    """The measures of an output that is there; GoConvError if it is not one."""
    data = read(target)
    if task.command == "decompress":
        coded = read(source)
        stream = bitstream.unpack(coded, task.max_pixels, task.allow_truncated)
        row = describe(coded, stream if task.allow_truncated else None)
        if picture_io.is_decoded(io.BytesIO(data), (row["width"], row["height"])):
            return row
        raise GoConvError(f"{target} is in the way: it is not what decompress makes of {source}")
    if task.command == "evaluate":
        with contextlib.suppress(ValueError):
            row = json.loads(data)
            if isinstance(row, dict) and "bytes" in row and all(isinstance(value, (int, float, type(None))) for value in row.values()):
                return row
        raise GoConvError(f"{target} is in the way: it is no result of evaluate")
    try:
        if bitstream.unpack(data, task.max_pixels).fingerprint == int(task.fingerprint, 16):
            return describe(data)
    except BitstreamError:
        pass
    raise GoConvError(f"{target} is in the way: {task.model} did not write it, or it is damaged")


def make(task, source) -> Tuple[bytes, Dict[str, Any]]:
    """(the output's bytes, its measures)."""
    data = read(source)
    if task.command == "decompress":
        stream = bitstream.unpack(data, task.max_pixels, task.allow_truncated)
        info = codec.find_stream_model(stream, task.model)
        picture = codec.decode(zoo.shared(info.path, info.fingerprint), stream, task.layers)
        return picture_io.picture_bytes(picture, decoded=True), describe(data, stream if task.allow_truncated else None)
    picture = picture_io.read_picture(source, task.max_pixels, io.BytesIO(data))
    model = zoo.shared(task.model, task.fingerprint)
    if task.command == "evaluate":
        measures, coded = evaluation.measure_picture(evaluation.ModelSubject(model.info.path, task.entropy_coder), picture, task.point)
        row = {**describe(coded), **measures}
        return (json.dumps(row) + "\n").encode(), row
    coded = codec.compress(model, picture, entropy_coder=task.entropy_coder, **task.point).data
    return coded, describe(coded)


def _shown(path) -> str:
    """A path as text: names of files may hold bytes that are none."""
    return path.encode("utf-8", "backslashreplace").decode()


class Work(beam.DoFn):
    """(input, output) -> its measures; or, tagged "dead", why there are none."""

    def __init__(self, task):
        self.task = task

    def process(self, pair):
        source, target = (path.decode("utf-8", "surrogateescape") for path in pair)
        try:
            if FileSystems.exists(target):
                row = finished(self.task, source, target)
            else:
                with _coding:
                    data, row = make(self.task, source)
                write(self.task, target, [data])
        except CheckpointError:
            raise  # no picture's fault
        except Exception as error:  # one picture must not stop the others
            kind = "" if isinstance(error, (GoConvError, OSError)) else f"{type(error).__name__}: "
            yield beam.pvalue.TaggedOutput("dead", {"path": _shown(source), "reason": _shown(kind + " ".join(str(error).split()))})
        else:
            yield {"path": _shown(source), "output": _shown(target), **row}


class _Means:
    """Sums of measures while their rows are written."""

    def __init__(self):
        self.count = self.bytes = self.pixels = 0
        self.sums: Dict[str, Tuple[float, int]] = {}

    def lines(self, rows):
        for row in rows:
            self.count += 1
            self.bytes += row.get("bytes", 0)
            self.pixels += row.get("pixels", 0)
            for name in ("lmbda", *evaluation.MEASURES):
                if row.get(name) is not None:
                    total, count = self.sums.get(name, (0.0, 0))
                    self.sums[name] = (total + row[name], count + 1)
            yield (json.dumps(row) + "\n").encode()


def report(task, rows, dead) -> None:
    """Writes the three reports; the summary last."""

    def path(name):
        return FileSystems.join(task.output, name)

    means, letters = _Means(), _Means()
    write(task, path(METRICS), means.lines(rows), replace=True)
    write(task, path(DEAD_LETTERS), letters.lines(dead), replace=True)
    summary = {
        **task.settings,
        "inputs": means.count + letters.count,
        "done": means.count,
        "dead_letters": letters.count,
        "bytes": means.bytes,
        "bpp_overall": 8 * means.bytes / means.pixels if means.pixels else None,
        "means": {name: {"mean": total / count, "pictures": count} for name, (total, count) in means.sums.items()},
    }
    write(task, path(SUMMARY), [(json.dumps(summary, indent=1) + "\n").encode()], replace=True)


def check_settings(task) -> None:
    """Remembers what a folder's outputs were made with; UsageError if that was something else."""
    path = FileSystems.join(task.output, SETTINGS)
    if not FileSystems.exists(path):
        write(task, path, [(json.dumps(task.settings, indent=1) + "\n").encode()])
        return
    try:
        before = {"input_folder": task.input_folder, **json.loads(read(path))}  # earlier versions did not write it
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: is not what an earlier run has written ({error}): name another --output") from error
    other = [f"{name} {before.get(name)}, not {value}" for name, value in task.settings.items() if before.get(name) != value]
    if other:
        raise UsageError(f"{task.output} holds outputs of other settings ({'; '.join(other)}): name another --output")


def clean(folder) -> None:
    """Removes what killed runs left."""
    left = [found.path for found in FileSystems.match([FileSystems.join(folder, "**")])[0].metadata_list]
    if left:
        FileSystems.delete(left)
    if FileSystems.exists(folder):
        FileSystems.delete([folder])


def make_options(flags) -> PipelineOptions:
    """Beam's options; UsageError for what Beam does not know, which is more likely a mistyped flag of ours."""
    parsers: List[Any] = []
    PipelineOptions([]).get_all_options(add_extra_args_fn=parsers.append)
    unknown = parsers[0].parse_known_args(flags)[1]
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]}: neither this command nor Beam has it (--input needs quotes in a shell)")
    options = PipelineOptions(list(flags))
    if options.view_as(StandardOptions).runner is None:
        # DirectRunner may choose Prism, which it downloads, and which has no --direct_running_mode.
        options.view_as(StandardOptions).runner = "FnApiRunner"
    return options


def run(task, pattern, options) -> Dict[str, Any]:
    """Runs the pipeline; returns its summary.

    Raises:
      UsageError: before anything is written, if nothing matches or outputs would collide.
      GoConvError: if the pipeline itself failed; what it wrote stays.
    """
    FileSystems.set_options(options)
    if "/" not in pattern:
        pattern = "./" + pattern
    try:
        pairs = plan(task, pattern)
        folder = fixed_part(pattern)
        task = dataclasses.replace(task, input_folder=_shown(_anchored(folder)))
        check_settings(task)
    except ValueError as error:  # Beam's, for schemes it does not know
        raise UsageError(str(error)) from error
    try:
        with beam.Pipeline(options=options) as pipeline:
            rows, dead = (
                pipeline
                | "Inputs" >> beam.Create([tuple(path.encode("utf-8", "surrogateescape") for path in pair) for pair in pairs], reshuffle=False)
                | "Spread" >> beam.Reshuffle()
                | "Work" >> beam.ParDo(Work(task)).with_outputs("dead", main="rows")
            )
            once = pipeline | "Once" >> beam.Create([task])
            once | "Report" >> beam.Map(report, beam.pvalue.AsIter(rows), beam.pvalue.AsIter(dead))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise GoConvError(f"the pipeline failed: {lines[-1] if lines else type(error).__name__}") from error
    clean(FileSystems.join(task.output, TEMPORARY))
    return json.loads(read(FileSystems.join(task.output, SUMMARY)))
