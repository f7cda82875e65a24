"""Rate and distortion of whole files, really coded and decoded, over a folder of pictures.

Results are JSON in CompressAI's form: {"name", "description", "results": {"bpp": [...], "psnr-rgb": [...], ...}},
parallel lists sorted by bpp, MS-SSIM linear, seconds a picture; `meta` says what made them. Every measured picture is kept in a
line of its own (measured.jsonl), so that an interrupted evaluation goes on where it was.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from goconv_tf import bitstream, codec, memory, metrics, picture_io, published, zoo
from goconv_tf.errors import GoConvError, ImageError, UsageError
from goconv_tf.files import PICTURE_EXTENSIONS, atomic_write, find_inputs

# A part of every measured row's key: counted up when measuring the same weights again would give something else.
MEASURED_BY = 3
MEASURES = ("bpp", "psnr-rgb", "psnr-yuv", "psnr-y", "psnr-u", "psnr-v", "ms-ssim-rgb", "ms-ssim-y", "encoding_time", "decoding_time")


def operating_points(config, count: int = 8) -> List[dict]:
    """What `codec.compress` is to be asked for, so that it spans a model's rates: lambdas, numbers of layers, or nothing.

    count: how many lambdas, spread evenly over the logarithm of the range.
    """
    if config.has_lambda:
        lambdas = np.exp(np.linspace(np.log(config.lmbda_min), np.log(config.lmbda_max), count))
        inside = dict.fromkeys(float(min(max(lmbda, config.lmbda_min), config.lmbda_max)) for lmbda in lambdas)  # a range may be one lambda
        return [{"lmbda": lmbda} for lmbda in inside]
    if len(config.layers) > 1:
        return [{"layers": count} for count in range(1, len(config.layers) + 1)]
    return [{}]


class Coding(NamedTuple):
    """What a subject made of a picture. data: the file; decoded: uint8 [h, w, 3]; times: seconds; more: further measures."""

    data: bytes
    decoded: np.ndarray
    encoding_time: float
    decoding_time: float
    more: Dict[str, float]


class ModelSubject:
    """A model of the zoo as something to evaluate.

    Args:
      name: as `zoo.find_model` takes it, with its CheckpointError.
      entropy_coder: "tfc" or "range-coder".
      points: how many lambdas, of models that have one.
      refine: steps, as of `codec.compress`; its results have a name of their own.
    """

    def __init__(self, name, entropy_coder="tfc", points=8, refine=0):
        self.info = zoo.find_model(name)
        codec.check_refine(self.info.config, refine)
        self.entropy_coder, self.refine = entropy_coder, refine
        self.name = self.info.name + (f"-refined-{refine}" if refine else "")
        self.identity = f"{self.info.name} {self.info.fingerprint} {entropy_coder}" + (f" refined {refine}" if refine else "")
        self.points = operating_points(self.info.config, points)
        self.description = f"{self.info.model}, fingerprint {self.info.fingerprint}, {self.info.config.rates_text}"
        training = self.info.card.get("training")
        steps = training.get("steps") if isinstance(training, dict) else None
        self.meta = {"model": self.info.model, "fingerprint": self.info.fingerprint, "steps": steps, "entropy_coder": entropy_coder}
        if refine:
            self.description += f", latents refined in {refine} steps"
            self.meta["refine"] = refine

    @functools.cached_property
    def model(self):
        return zoo.shared(self.info.path, self.info.fingerprint)

    def code(self, picture, point) -> Coding:
        model = self.model
        if not hasattr(model, "has_coded"):  # what TensorFlow compiles for the first picture is not its time
            codec.decompress(model, codec.compress(model, np.zeros([64, 64, 3], np.uint8)).data)
            model.has_coded = True
        if self.refine and not hasattr(model, "has_refined"):
            codec.compress(model, np.zeros([192, 192, 3], np.uint8), refine=1)
            model.has_refined = True
        begin = time.time()
        data = codec.compress(model, picture, entropy_coder=self.entropy_coder, refine=self.refine, **point).data
        middle = time.time()
        stream = bitstream.unpack(data, picture.shape[0] * picture.shape[1])
        decoded = codec.decode(model, stream)
        end = time.time()
        pixels = picture.shape[0] * picture.shape[1]
        more = {"bpp-strings": 8 * stream.payload / pixels}
        if not self.refine:  # the estimate would be of other latents
            more["bpp-estimated"] = sum(codec.estimate(model, picture, stream.lmbda, len(stream.layers)).values()) / pixels
        strings = dict(zip(model.latent_names, (section for layer in stream.layers for section in layer.sections)))
        more.update({f"bpp-{name}": 8 * len(string) / pixels for name, string in strings.items()})
        return Coding(data, decoded, middle - begin, end - middle, more)


# What `bench_codec` knows: Pillow's format, its settings, and what is varied.
_QUALITY = (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95)
CODECS: Dict[str, Tuple[str, Dict[str, Any], str, Tuple[int, ...]]] = {
    "jpeg": ("JPEG", {"subsampling": "4:2:0", "optimize": True}, "quality", _QUALITY),
    "jpeg2000": ("JPEG2000", {"irreversible": True, "mct": 1, "quality_mode": "rates"}, "rate", (240, 160, 120, 80, 60, 48, 36, 24, 18, 12, 8)),
    "webp": ("WEBP", {"method": 6}, "quality", (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)),
    "avif": ("AVIF", {"speed": 6, "subsampling": "4:2:0"}, "quality", (5, 15, 25, 35, 45, 50, 55, 60, 65, 70, 75, 80)),
}


class PillowSubject:
    """A codec in Pillow as something to evaluate."""

    def __init__(self, name):
        import PIL
        from PIL import Image, features

        Image.init()
        if name not in CODECS:
            raise UsageError(f"unknown codec {name!r}: there are {', '.join(CODECS)}")
        self.format, self.settings, self.varied, values = CODECS[name]
        if self.format not in Image.SAVE:
            raise UsageError(f"this Pillow ({PIL.__version__}) cannot write {name}")
        self.name = name
        self.points = [{self.varied: value} for value in values]
        library = {"jpeg": "jpg", "jpeg2000": "jpg_2000"}.get(name, name)
        version = f"Pillow {PIL.__version__}, library {features.version(library)}"
        self.description = f"{self.format}, {version}, {json.dumps(self.settings)}"
        self.identity = f"{name} {self.description}"
        self.meta = {"codec": name, "version": version, "settings": self.settings}

    def code(self, picture, point) -> Coding:
        from PIL import Image

        image, buffer = Image.fromarray(picture), io.BytesIO()
        changing = {"quality_layers": [point["rate"]]} if "rate" in point else point
        begin = time.time()
        try:
            image.save(buffer, self.format, **self.settings, **changing)
        except (OSError, ValueError) as error:
            raise ImageError(f"{self.name} cannot code {image.width} x {image.height} pixels: {error}") from error
        middle = time.time()
        with picture_io.pillow_limit(picture_io.MAX_PIXELS):
            coded = Image.open(buffer)
        decoded = np.asarray(coded.convert("RGB"))
        return Coding(buffer.getvalue(), decoded, middle - begin, time.time() - middle, {})


def make_subject(kind, *args):
    """A subject of what processes can be sent: ("model", name or folder[, entropy coder[, points[, refine]]]) or ("codec", one of `CODECS`)."""
    return {"model": ModelSubject, "codec": PillowSubject}[kind](*args)


def measure(subject, path, point) -> Dict[str, Optional[float]]:
    """All measures of one picture file at one of the subject's `points`; those that are not defined are None."""
    return measure_picture(subject, picture_io.read_picture(path), point)[0]


def measure_picture(subject, picture, point) -> Tuple[Dict[str, Optional[float]], bytes]:
    """(`measure` of uint8 [h, w, 3], the coded file); GoConvError if measuring needs more memory than there is."""
    height, width = picture.shape[:2]
    memory.check(metrics.QUALITY_BYTES * height * width, f"measures of {width} x {height} pixels")
    coding = subject.code(picture, point)
    row: Dict[str, Any] = {"bpp": metrics.bpp(coding.data, height, width), **metrics.quality(picture, coding.decoded), **coding.more}
    row.update(encoding_time=coding.encoding_time, decoding_time=coding.decoding_time)
    return {key: value if math.isfinite(value) else None for key, value in row.items()}, coding.data


_subjects: Dict[str, Any] = {}


def _measure_task(spec, identity, path, point):
    """`measure` in a process that makes a subject once; identity: what the subject must still be."""
    if identity not in _subjects:
        subject = make_subject(*spec)
        if subject.identity != identity:
            raise GoConvError(f"{subject.name} changed while it was measured")
        _subjects[identity] = subject
    return measure(_subjects[identity], path, point)


class Store:
    """Measured rows, and the machines whose seconds they have, by what made them, in a file of JSON lines that survives being killed at any time."""

    def __init__(self, path):
        self.path = path
        self.rows: Dict[str, dict] = {}
        self.machines: Dict[str, str] = {}
        if os.path.exists(path):
            with open(path, "rb") as f:
                data = f.read()
            for line in data.split(b"\n"):
                try:
                    entry = json.loads(line)
                    self.rows[entry["key"]] = entry["row"]
                    self.machines[entry["key"]] = str(entry.get("machine", "a machine not noted"))
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # the line that was being written
            if data and not data.endswith(b"\n"):
                with open(path, "ab") as f:
                    f.write(b"\n")

    def add(self, key, row, machine):
        self.rows[key], self.machines[key] = row, machine
        with open(self.path, "ab") as f:
            f.write((json.dumps({"key": key, "row": row, "machine": machine}) + "\n").encode())


def this_machine() -> str:
    """The processor and the number of its cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
        name = next((line.partition(":")[2].strip() for line in f if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def _file_hash(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:16]


def evaluate(specs, images, output, jobs=1, per_image=False, as_csv=False) -> List[str]:
    """Measures subjects on a folder of pictures; returns the paths of the JSON files, one a subject.

    Args:
      specs: arguments of `make_subject`.
      images: folder of pictures.
      output: folder for <subject>.json, measured.jsonl and, on request, per_image/ and csv/.
      jobs: processes.
      per_image: also write each picture's measures, per_image/<subject>/<picture>.json.
      as_csv: also write csv/<folder of pictures>/<measure>/<subject>.txt, in tensorflow/compression's form.

    Raises:
      GoConvError: if a picture or a model cannot be used; what was measured before is kept.
    """
    import tqdm

    paths = find_inputs([images], PICTURE_EXTENSIONS)
    if per_image:
        check_stems(images, paths, "files of --per_image do not have")
    subjects: List[Any] = [make_subject(*spec) for spec in specs]
    if len({subject.name for subject in subjects}) < len(subjects):
        raise UsageError("two of the models have the same name")
    # All that cannot be used are found before hours of work.
    each = sorted(hashlib.sha256(picture_io.read_picture(path).tobytes()).hexdigest() for path in paths)
    pixels = hashlib.sha256("".join(each).encode()).hexdigest()[:16]
    hashes = {path: _file_hash(path) for path in paths}
    machine = this_machine() + (f", {jobs} processes" if jobs > 1 else "")
    os.makedirs(output, exist_ok=True)
    store = Store(os.path.join(output, "measured.jsonl"))

    def key(subject, path, point):
        return json.dumps([MEASURED_BY, subject.identity, point, hashes[path]])

    tasks = [(spec, s, path, point) for spec, s in zip(specs, subjects) for point in s.points for path in paths]
    missing = [task for task in tasks if key(*task[1:]) not in store.rows]
    with tqdm.tqdm(total=len(tasks), initial=len(tasks) - len(missing), unit="coding", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:

        def done(subject, path, point, row):
            store.add(key(subject, path, point), row, machine)
            bar.set_description(subject.name, refresh=False)
            bar.update()

        if jobs == 1:
            for _, subject, path, point in missing:
                done(subject, path, point, measure(subject, path, point))
        elif missing:
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
                futures = {pool.submit(_measure_task, spec, s.identity, path, point): (s, path, point) for spec, s, path, point in missing}
                try:
                    for future in concurrent.futures.as_completed(futures):
                        done(*futures[future], future.result())
                except concurrent.futures.process.BrokenProcessPool:
                    raise GoConvError("a process was killed, perhaps for memory: try fewer --jobs; what was measured is kept") from None
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    written = []
    for subject in subjects:
        rows = [{path: store.rows[key(subject, path, point)] for path in paths} for point in subject.points]
        machines = " and ".join(sorted({store.machines[key(subject, path, point)] for path in paths for point in subject.points}))
        written.append(_write(subject, rows, images, pixels, machines, output, as_csv))
        if per_image:
            _write_per_image(subject, rows, output)
    return written


def mean_row(point, by_path) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """(means over pictures with the operating point, {measure: why it is None})."""
    rows = list(by_path.values())
    means: Dict[str, Any] = dict(point)
    reasons = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        absent = sum(value is None for value in values)
        means[name] = float(np.mean(values)) if not absent else None
        if absent:
            why = f"a side is under {metrics.MS_SSIM_SIDE} pixels" if name.startswith("ms-ssim") else "no error at all"
            reasons[name] = f"not defined for {absent} of {len(rows)} pictures: {why}"
    return means, reasons


def _measures(rows):
    """All that rows have, in order: the first layers of a scalable model lack the latents of the others."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _write(subject, rows, images, pixels, machines, output, as_csv):
    pairs = [mean_row(point, by_path) for point, by_path in zip(subject.points, rows)]
    pairs.sort(key=lambda pair: pair[0]["bpp"])
    names = _measures(row for row, _ in pairs)
    reasons = {name: "not in files of fewer layers" for name in names if not all(name in row for row, _ in pairs)}
    reasons.update({name: reason for _, more in pairs for name, reason in more.items()})
    contents = {
        "name": subject.name,
        "description": subject.description,
        "meta": {
            **subject.meta,
            "dataset": os.path.basename(os.path.abspath(images)),
            "pictures": len(rows[0]),
            "pixels": pixels,
            "machine": machines,
            "python": platform.python_version(),
            **({"null": reasons} if reasons else {}),
        },
        "results": {name: [row.get(name) for row, _ in pairs] for name in names},
    }
    path = os.path.join(output, f"{subject.name}.json")
    atomic_write(path, (json.dumps(contents, indent=1) + "\n").encode())
    if as_csv:
        _write_csv(contents, output)
    return path


# tensorflow/compression's folders of rate-distortion files.
_CSV_FOLDERS = {"psnr-rgb": "PSNR_sRGB_RGB", "psnr-y": "PSNR_sRGB_Y", "ms-ssim-rgb": "MS-SSIM_sRGB_RGB", "ms-ssim-y": "MS-SSIM_sRGB_Y"}


def _write_csv(contents, output):
    """One file a measure, of lines "bpp, value" after comments, in tensorflow/compression's form."""
    results, meta = contents["results"], contents["meta"]
    for measure, name in _CSV_FOLDERS.items():
        folder = os.path.join(output, "csv", meta["dataset"], name)
        os.makedirs(folder, exist_ok=True)
        lines = [f"# {contents['name']} ({contents['description']}), mean of {meta['pictures']} pictures of {meta['dataset']}."]
        lines += ["# First column: bits per pixel of whole files. Second column: " + name.replace("_", "/") + ".", ""]
        lines += [f"{rate:.6f}, {value:.6f}" for rate, value in zip(results["bpp"], results[measure]) if value is not None]
        atomic_write(os.path.join(folder, f"{contents['name']}.txt"), ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))


def stem(path) -> str:
    """A picture's name without its folder and extension."""
    return os.path.splitext(os.path.basename(path))[0]


def check_stems(images, paths, what):
    """UsageError if two pictures of a folder have the same `stem`; what: who lacks the extension, and how."""
    if len({stem(path) for path in paths}) < len(paths):
        raise UsageError(f"{images}: two of its pictures have the same name but for the extension, which {what}")


def _write_per_image(subject, rows, output):
    folder = os.path.join(output, "per_image", subject.name)
    os.makedirs(folder, exist_ok=True)
    for path in rows[0]:
        picture = stem(path)
        ordered = sorted(({**point, **by_path[path]} for point, by_path in zip(subject.points, rows)), key=lambda row: row["bpp"])
        results = {name: [row.get(name) for row in ordered] for name in _measures(ordered)}
        contents = {"source": picture, "name": subject.name, "description": subject.description, "results": results}
        atomic_write(os.path.join(folder, f"{picture}.json"), (json.dumps(contents, indent=1) + "\n").encode())


def read_results(path_or_name) -> Dict[str, Any]:
    """A results file, or a published curve as "kodak:bpg444": {"name", "description", "results": {measure: [(bpp, value)]}}.

    Raises:
      UsageError: if it is neither.
    """
    dataset, _, name = path_or_name.partition(":")
    if name and dataset in published.DATASETS:
        return published.curve(dataset, name)
    try:
        with open(path_or_name, encoding="utf-8") as f:
            data = json.load(f)
        results = data["results"]
        rates = results["bpp"]
        curves = {}
        for name, values in results.items():
            if name in MEASURES and name != "bpp":
                if len(values) != len(rates):
                    raise UsageError(f"{path_or_name}: {name} has {len(values)} values for {len(rates)} rates")
                if not all(0 < rate < 1e9 for rate in rates):
                    raise UsageError(f"{path_or_name}: rates must be above 0 bits per pixel, and below a billion")
                pairs = [(float(rate), float(value)) for rate, value in zip(rates, values) if value is not None]
                curves[name] = [pair for pair in pairs if abs(pair[1]) < 1e9]  # lossless points have no place in dB
        meta = dict(data.get("meta", {}))
        if not all(isinstance(meta.get(key, ""), str) for key in ("codec", "model", "fingerprint")) or not isinstance(meta.get("refine", 0), int):
            raise TypeError("codec, model or fingerprint is no text, or refine no number")
        return {"name": str(data.get("name", path_or_name)), "description": str(data.get("description", "")), "results": curves, "meta": meta}
    except FileNotFoundError:
        raise UsageError(f"{path_or_name}: no such file; published curves are named like kodak:bpg444") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(f"{path_or_name}: not a results file ({type(error).__name__}: {error})") from error


class BDRate(NamedTuple):
    """rate: percent of bits that the test needs more than the anchor at equal quality. overlap: the qualities compared; share: of their union."""

    rate: float
    overlap: Tuple[float, float]
    share: float


def rising_points(data, metric) -> List[Tuple[float, float]]:
    """[(bpp, dB)] of a `read_results` that a monotone curve can go through: where it falls back, more bits bought nothing."""
    points = sorted(data["results"].get(metric, ()))
    if metric.startswith("ms-ssim"):
        points = [(rate, metrics.decibels(value)) for rate, value in points if value < 1]
    return [point for k, point in enumerate(points) if all(point[1] > other[1] for other in points[:k])]


def bits_at_equal_quality(anchor, test, metric="psnr-rgb") -> str:
    """What the one point of test has, in bits, beyond the anchor's curve at that quality, as a table's cell.

    Interpolated as in `bd_rate`: PCHIP of the logarithmic rate over dB.
    """
    from scipy.interpolate import PchipInterpolator

    if why := other_pictures(anchor, test):
        return why
    point, points = rising_points(test, metric), rising_points(anchor, metric)
    if not (point and points):
        return "not measured"
    (rate, quality), (rates, qualities) = point[0], np.array(points).T
    if len(points) < 2:
        return f"{anchor['name']} has one point only"
    if not qualities[0] <= quality <= qualities[-1]:
        return "out of its range"
    return f"{rate / np.exp(PchipInterpolator(qualities, np.log(rates))(quality)) - 1:+.1%}"


def other_pictures(one, two) -> str:
    """Why two `read_results` do not compare, as they are of different pictures; empty if they are not, or do not say what they are of."""
    for published_one, other in ((one, two), (two, one)):
        dataset = published_one.get("dataset")
        others = other.get("dataset") or other.get("meta", {}).get("dataset")
        if dataset and others and not published.is_of(dataset, str(others)):
            return f"{published_one['name']} is of different pictures, {dataset}, than {other['name']}, of the folder {others!r}"
    metas = [data.get("meta", {}) for data in (one, two)]
    for key in ("pixels", "pictures"):  # published curves and earlier versions' files do not have all of it
        if None not in (found := [meta.get(key) for meta in metas]) and found[0] != found[1]:
            sets = " and ".join(f"{meta.get('pictures')} of {meta.get('dataset')!r}" for meta in metas)
            return f"{one['name']} and {two['name']} are of different pictures: {sets}"
    return ""


def bd_rate(anchor, test, metric="psnr-rgb") -> BDRate:
    """Bjontegaard delta rate (PCHIP interpolation, `bjontegaard` package) of two `read_results`; metric: of `MEASURES`, MS-SSIM counts in dB.

    PCHIP is monotone: Akima's curves swing out where points are as uneven as those of scalable models can be.

    Raises:
      GoConvError: if they are of different pictures, if either lacks the metric or has under three points, or their qualities do not overlap.
    """
    import bjontegaard

    if why := other_pictures(anchor, test):
        raise GoConvError(why)
    curves = []
    for data in (anchor, test):
        rising = rising_points(data, metric)
        if len(rising) < 3:
            raise GoConvError(f"{data['name']}: {len(rising)} points of {metric}; BD-rate needs three")
        curves.append(np.array(rising))
    (rate_a, quality_a), (rate_b, quality_b) = (curve.T for curve in curves)
    low, high = max(quality_a[0], quality_b[0]), min(quality_a[-1], quality_b[-1])
    union = max(quality_a[-1], quality_b[-1]) - min(quality_a[0], quality_b[0])
    if low >= high:
        raise GoConvError(
            f"the curves do not overlap: {anchor['name']} has {metric} {quality_a[0]:.2f} to {quality_a[-1]:.2f}, "
            f"{test['name']} {quality_b[0]:.2f} to {quality_b[-1]:.2f} dB"
        )
    value = bjontegaard.bd_rate(rate_a, quality_a, rate_b, quality_b, method="pchip", require_matching_points=False, min_overlap=0)
    return BDRate(float(value), (float(low), float(high)), float((high - low) / union))


def bd_rate_cell(anchor, test, metric, digits=1) -> str:
    """`bd_rate` as a table's cell: percent, with so many digits after the point, and the qualities compared, or why there is none."""
    try:
        result = bd_rate(anchor, test, metric)
    except GoConvError as error:
        return str(error)
    return f"{result.rate:+.{digits}f} % ({result.overlap[0]:.1f} to {result.overlap[1]:.1f} dB)"
