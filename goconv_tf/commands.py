"""What the commands do, shared by `python -m goconv_tf` and the scripts in experiments/."""

import contextlib
import json
import os
import signal
import sys
import time
import warnings

from goconv_tf import bitstream, codec, evaluation, limits, memory, metrics, picture_io, plots, zoo
from goconv_tf.errors import BitstreamError, GoConvError, UsageError, printable
from goconv_tf.files import PICTURE_EXTENSION, PICTURE_EXTENSIONS, STREAM_EXTENSION, atomic_write, check_new_folder, check_parent, plan

# How decoded pictures are written where Pillow's own settings lose much; and the formats that lose nothing.
PICTURE_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95, "subsampling": "4:4:4"}}
LOSSLESS = ("PNG", "BMP", "DDS", "DIB", "IM", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")


def quiet_tensorflow():
    """Keeps TensorFlow's notes off the terminal; before it is first imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def status_of(action, *args, prefix="error"):
    """The exit status of action(*args), None counting as 0; our errors become one line on stderr and 1, SIGTERM and SIGHUP one line and 128 more.

    So that what was not written whole is removed before the process ends.
    """

    def end(number, _):
        raise SystemExit(128 + number)

    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, end)
    warnings.filterwarnings("ignore", module="PIL")  # two lines about what is in a picture's tags
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be in the terminal's encoding
    try:
        status = action(*args) or 0
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:
        if error.code in (128 + signal.SIGTERM, 128 + signal.SIGHUP):
            print(f"{prefix}: ended by {signal.Signals(error.code - 128).name}", file=sys.stderr)
        raise
    except (GoConvError, OSError, MemoryError) as error:
        print(f"{prefix}: {printable(error) or 'not enough memory'}", file=sys.stderr)
        return 1
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # a closed pipe or a full disk: Python would try, and complain, again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_output(path, source):
    """UsageError unless path can be written, and is not the source."""
    if path == "-":
        raise UsageError("-: files are not written to the standard output; name one (./- if it shall be called that)")
    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
        raise UsageError(f"{path}: would be overwritten by its own output")
    if os.path.isdir(path) or path.endswith(os.sep):
        raise UsageError(f"{path}: is a folder; give a file's name, or --output_dir")
    check_parent(path)


def check_replaceable(path):
    """UsageError if path is a file that is not a stream: a picture, perhaps, which nothing could give back."""
    if os.path.isfile(path):
        with open(path, "rb") as f:
            start = f.read(len(bitstream.MAGIC))
        if start not in (b"", bitstream.MAGIC):
            raise UsageError(f"{path}: is there already, and no compressed file; remove it first, or name another output")


def read_stream_file(path) -> bytes:
    """A file's bytes, or its first ones if it is not a stream; BitstreamError if it cannot be read, GoConvError if memory is too short for it."""
    try:
        with open(path, "rb") as f:
            start = f.read(len(bitstream.MAGIC))
            if start != bitstream.MAGIC:
                return start
            size = os.fstat(f.fileno()).st_size  # 0 of a pipe, which has to be read to be known
            parts, available = [start], memory.available_memory()
            while True:
                memory.check(3 * size, f"{path}: {size} bytes", available)  # as they are, and as substreams
                parts.append(f.read(2**26))
                if not parts[-1]:
                    return b"".join(parts)
                size = max(size, sum(map(len, parts)))
    except MemoryError:
        raise BitstreamError(f"{path}: is too large for this machine's memory") from None
    except FileNotFoundError:
        raise BitstreamError(f"{path}: no such file") from None
    except OSError as error:
        raise BitstreamError(f"{path}: cannot be read: {error.strerror}") from error


def picture_format(path):
    """Pillow's format of a name's extension; UsageError if it writes none."""
    from PIL import Image

    extension = os.path.splitext(path)[1].lower()
    found = Image.registered_extensions().get(extension)
    if found not in Image.SAVE:
        raise UsageError(f"{path}: unknown picture format {extension!r}; use .png")
    return found


def write_picture(path, picture):
    """Writes uint8 [h, w, 3] in the format of the name's extension, whole or not at all; gives what to say of it: `picture_hash`."""
    kind = picture_format(path)
    try:
        data = picture_io.picture_bytes(picture, kind, decoded=True, **PICTURE_OPTIONS.get(kind, {}))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises almost anything for sizes that a format does not have
        raise UsageError(f"{path}: cannot be written as {kind}: {error}") from error
    atomic_write(path, data)
    return f"pixels {picture_hash(picture)}" + ("" if kind in LOSSLESS else f" before {kind} changed them")


def for_each(pairs, action, output_dir=None):
    """Runs action(input, output) over pairs with progress; every failure is one line. Returns the number of failures."""
    if output_dir:
        os.makedirs(output_dir, exist_ok=True)
    failures = 0
    begin = time.time()
    for number, (source, target) in enumerate(pairs, 1):
        try:
            check_output(target, source)
            line = action(source, target)
        except (GoConvError, OSError, MemoryError) as error:
            failures += 1
            text = str(error) or "not enough memory"
            text = text if text.startswith(source) else f"{source}: {text}"
            print(f"error: {printable(text)}", file=sys.stderr, flush=True)
            continue
        left = (time.time() - begin) / number * (len(pairs) - number)
        counter = f"[{number}/{len(pairs)}, {left:.0f} s left] " if len(pairs) > 1 else ""
        print(f"{counter}{printable(f'{source} -> {target}')}: {line}", flush=True)
    return failures


def check_kind(name, kind):
    """UsageError unless a pretrained model is of a kind, "crpe" and so on."""
    found = zoo.find_model(name).model
    if found != kind:
        raise UsageError(f"{name} is a {found}, not a {kind}")


def compress(
    inputs,
    model,
    output_dir=None,
    lmbda=None,
    target_bpp=None,
    entropy_coder="tfc",
    verify=False,
    max_pixels=picture_io.MAX_PIXELS,
    layers=None,
    exact=True,
    tile=None,
    refine=0,
):
    """The compress command; returns the exit status."""
    pairs = plan(inputs, output_dir, PICTURE_EXTENSIONS, STREAM_EXTENSION)
    loaded = zoo.load_pretrained(model)
    codec.check_operating_point(loaded.config, lmbda, target_bpp, layers)
    codec.check_exact(loaded, exact)
    codec.check_refine(loaded.config, refine)

    def action(source, target):
        check_replaceable(target)
        picture = picture_io.read_picture(source, max_pixels)
        result = codec.compress(loaded, picture, lmbda, target_bpp, entropy_coder, verify, layers, exact, tile, refine)
        line = f"{len(result.data)} bytes, {result.bpp:.4f} bpp"
        line += f", lambda {result.lmbda:.6g}" if loaded.has_lambda else ""
        line += f", {result.layers} layers" if len(loaded.config.layers) > 1 else ""
        if verify:
            decoded = codec.decompress(loaded, result.data, max_pixels, tile=result.tile)
            if (decoded != result.reconstruction).any():
                raise GoConvError("verification failed: the decoded picture is not the encoder's; nothing was written")
            line += f", verified, PSNR {metrics.psnr(picture, decoded):.3f} dB"
            if metrics.MS_SSIM_BYTES * picture.shape[0] * picture.shape[1] < memory.available_memory():
                line += f", MS-SSIM {metrics.ms_ssim(picture, decoded):.5f}"
            line += f", pixels {picture_hash(decoded)}"
        atomic_write(target, result.data)
        return line

    return 1 if for_each(pairs, action, output_dir) else 0


def picture_hash(picture) -> str:
    """16 hexadecimal digits of a picture's pixels."""
    import hashlib

    return hashlib.sha256(picture.tobytes()).hexdigest()[:16]


def decompress(
    inputs,
    model=None,
    output_dir=None,
    max_pixels=picture_io.MAX_PIXELS,
    layers=None,
    allow_truncated=False,
    force=False,
    tile=None,
    region=None,
    max_seconds=None,
):
    """The decompress command; returns the exit status."""
    pairs = plan(inputs, output_dir, (STREAM_EXTENSION,), PICTURE_EXTENSION)
    named = not output_dir and len(inputs) == 2

    def action(source, target):
        if not named and os.path.exists(target) and not picture_io.is_decoded(target):
            raise UsageError(f"{target}: is there already, and not marked as decompress marks what it writes; remove it, or name another output")
        # Everything that can be wrong without the network is found before it is loaded.
        picture_format(target)
        problems = [] if force else None
        stream = bitstream.unpack(read_stream_file(source), max_pixels, allow_truncated, problems)
        info = codec.find_stream_model(stream, model)
        network = zoo.shared(info.path, info.fingerprint)
        with limits.seconds(max_seconds):
            picture = codec.decode(network, stream, layers, problems, tile, region)
        pixels = write_picture(target, picture)
        count = len(stream.layers) + stream.missing
        shown = f", {layers or len(stream.layers)} of {count} layers" if count > 1 else ""
        shown += f" (the last {stream.missing} are missing or damaged)" if stream.missing else ""
        shown += f" (written by --force: {'; '.join(problems)})" if problems else ""
        return f"{picture.shape[1]} x {picture.shape[0]}{shown}, {pixels}"

    return 1 if for_each(pairs, action, output_dir) else 0


def truncate(source, target, layers=None, target_bpp=None, max_pixels=picture_io.MAX_PIXELS):
    """The truncate command: cuts a scalable stream to its first layers, without decoding or TensorFlow; returns the exit status."""

    def action(source, target):
        check_replaceable(target)
        stream = bitstream.unpack(read_stream_file(source), max_pixels)
        if layers is not None and not 1 <= layers <= len(stream.layers):
            raise UsageError(f"{layers} layers were asked for; the file has {len(stream.layers)}")
        stream_cut = stream.cut(layers) if target_bpp is None else codec.cut_to_rate(stream, target_bpp)
        data = bitstream.pack(stream_cut)
        atomic_write(target, data)
        return f"{len(data)} bytes, {8 * len(data) / stream.pixels:.4f} bpp, {len(stream_cut.layers)} of {len(stream.layers)} layers"

    return 1 if for_each([(source, target)], action) else 0


def info(path, max_pixels=picture_io.MAX_PIXELS, allow_truncated=False):
    """The info command: prints JSON; does not import TensorFlow."""
    data = read_stream_file(path)
    try:
        stream = bitstream.unpack(data, max_pixels, allow_truncated)
    except BitstreamError as error:
        raise BitstreamError(f"{path}: {error}") from None
    models = [m for m in zoo.all_models() if m.model_id == stream.model_id]
    model = max(models, key=lambda m: m.fingerprint == f"{stream.fingerprint:08x}", default=None)
    layers = []
    for number, (layer, size) in enumerate(zip(stream.layers, stream.layer_bytes())):
        names = model.config.layers[number] if model and number < len(model.config.layers) else ()
        names = names if len(names) == len(layer.sections) else [f"section_{k}" for k in range(len(layer.sections))]
        layers.append(
            {
                "bytes": size - (layers[-1]["bytes_so_far"] if layers else 0),
                "bytes_so_far": size,
                "bpp_so_far": 8 * size / stream.pixels,
                "latents_checksum": f"{layer.checksum:08x}",
                "substreams": {name: {"bytes": len(s), "bpp": 8 * len(s) / stream.pixels} for name, s in zip(names, layer.sections)},
            }
        )
    contents = {
        "format_version": bitstream.VERSION,
        "width": stream.width,
        "height": stream.height,
        "model": model.name if model else None,
        "model_id": f"{stream.model_id:08x}",
        "fingerprint": f"{stream.fingerprint:08x}",
        "weights_match": model is not None and model.fingerprint == f"{stream.fingerprint:08x}",
        "entropy_coder": stream.coder,
        "exact": stream.exact,
        "lmbda": stream.lmbda,
        "lmbda_code": stream.lmbda_code,
        "bytes": len(data),
        "bpp": 8 * len(data) / stream.pixels,
        "header_bytes": layers[-1]["bytes_so_far"] - stream.payload,
        "missing_layers": stream.missing,
        "layers": layers,
    }
    print(json.dumps(contents, indent=1))
    return 0


def evaluate(specs, images, output, jobs=1, per_image=False, as_csv=False):
    """The evaluate and bench_codec commands; returns the exit status."""
    for path in evaluation.evaluate(specs, images, output, jobs, per_image, as_csv):
        with open(path, encoding="utf-8") as f:
            results = json.load(f)["results"]
        rates, quality = results["bpp"], results["psnr-rgb"]
        ends = "" if None in (quality[0], quality[-1]) else f", {quality[0]:.2f} to {quality[-1]:.2f} dB PSNR"
        print(f"{path}: {len(rates)} points, {rates[0]:.4f} to {rates[-1]:.4f} bpp{ends}")
    return 0


def bd_rate(anchor, test, metric):
    """The bd_rate command; returns the exit status."""
    a, b = evaluation.read_results(anchor), evaluation.read_results(test)
    result = evaluation.bd_rate(a, b, metric)
    overlap = f"{result.overlap[0]:.2f} to {result.overlap[1]:.2f} dB, {100 * result.share:.0f} % of both curves' range"
    print(f"{result.rate:+.2f} % bits of {b['name']} against {a['name']} at equal {metric} ({overlap})")
    return 0


def _read_curves(results):
    """`read_results` of each; those of other pictures than the first get a line on stderr, as a plot does not show it."""
    curves = [evaluation.read_results(path) for path in results]
    for curve in curves[1:]:
        if why := evaluation.other_pictures(curves[0], curve):
            print(f"note: {printable(why)}", file=sys.stderr)
    return curves


def plot(results, output, title="", max_bpp=None):
    """The plot command; returns the exit status."""
    extension = os.path.splitext(output)[1].lower()
    if extension not in (".png", ".pdf", ".svg"):
        raise UsageError(f"{output}: unknown plot format {extension!r}; use .png, .pdf or .svg")
    check_output(output, "")
    curves = _read_curves(results)
    plots.rate_distortion(output, curves, title=title, max_bpp=max_bpp)
    print(output)
    return 0


def report(results, output, images=(), target_bpp=0.3, title="Rate and distortion", models=()):
    """The report command; returns the exit status."""
    from goconv_tf import report as page

    if not output.lower().endswith((".html", ".htm")):
        raise UsageError(f"{output}: a page's name ends in .html")
    check_output(output, "")
    curves = _read_curves(results)
    page.write(output, curves, images, target_bpp, title, models)
    print(f"{output}: {os.path.getsize(output) / 2**20:.1f} MiB, {len(curves)} curves, {len(images)} pictures")
    return 0


def import_tf1(checkpoint, model, output, name=None):
    """The import_tf1 command: an original's TensorFlow 1 checkpoint to a model folder; returns the exit status."""
    from goconv_tf import tf1

    check_new_folder(output)
    imported = tf1.IMPORTERS[model](checkpoint)
    name = name or os.path.basename(os.path.abspath(output))
    card = {"notes": f"Imported from the TensorFlow 1 checkpoint {os.path.basename(os.path.normpath(checkpoint))}."}
    info = zoo.save_pretrained(imported, output, name, card)
    print(f"{output}: {info.name}, {info.model}, {imported.count_params()} parameters, {info.config.rates_text}, fingerprint {info.fingerprint}")
    return 0


def export(model, output, max_pixels=picture_io.MAX_PIXELS):
    """The export command: a model to a SavedModel; returns the exit status."""
    from goconv_tf import export as saved_model

    saved_model.check_target(output)
    loaded = zoo.load_pretrained(model)
    saved_model.save(loaded, output, max_pixels)
    size = sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(output) for name in names)
    print(f"{output}: {loaded.info.name}, fingerprint {loaded.info.fingerprint}, {size / 2**20:.1f} MiB, signatures compress, decompress, info")
    return 0


def models(verbose=False):
    """The models command: what is in the zoo."""
    found = zoo.list_models()
    if not found:
        print("the zoo is empty; looked in " + ", ".join(zoo.zoo_folders()))
    for model in found:
        weights = os.path.join(model.path, zoo.WEIGHTS_FILE)
        size = f"{os.path.getsize(weights) / 2**20:.1f} MiB" if os.path.exists(weights) else f"{zoo.WEIGHTS_FILE} is missing"
        rates = sorted(row["bpp"] for row in model.card.get("kodak", []))
        ends = dict.fromkeys(f"{rate:.2f}" for rate in (*rates[:1], *rates[-1:]))
        reach = f"{' to '.join(ends)} bpp on Kodak" if rates else "rates not measured"
        print(f"{model.name}: {model.model}, fingerprint {model.fingerprint}, {size}, {model.config.rates_text}, {reach}")
        if verbose:
            print(f"  {model.path}\n  " + json.dumps(model.card, indent=1).replace("\n", "\n  "))
    return 0
