"""One self-contained HTML page: curves, BD-rates, and pictures side by side at a matched rate."""

import base64
import contextlib
import html
import json
import os
import re

from goconv_tf import bitstream, codec, evaluation, metrics, picture_io, plots, zoo
from goconv_tf.errors import GoConvError, RateError, UsageError
from goconv_tf.files import atomic_write

WEBP_SIDE = 16383  # pixels, the most that it can


def subject_of(results, models=()):
    """What made a results file, to code more pictures with; None for published curves and others' files.

    Args:
      results: as `evaluation.read_results` gives them.
      models: `zoo.ModelInfo` of models to look for before the zoo's, by fingerprint.

    Raises:
      GoConvError: if it is no name, or of a model that neither these nor the zoo have, or has other weights by now.
    """
    meta = results.get("meta", {})
    if meta.get("codec"):
        return evaluation.PillowSubject(meta["codec"])
    if not meta.get("model"):
        return None
    refine = meta.get("refine", 0)
    name = results["name"].removesuffix(f"-refined-{refine}") if refine else results["name"]
    zoo.check_name(name)  # and not a path, or a place in the hub
    path = next((info.path for info in models if info.fingerprint == meta.get("fingerprint")), name)
    subject = evaluation.ModelSubject(path, meta.get("entropy_coder", "tfc"), refine=refine)
    if subject.info.fingerprint != meta.get("fingerprint"):
        raise UsageError(f"{results['name']}: the zoo has weights {subject.info.fingerprint}, the results are of {meta.get('fingerprint')}")
    return subject


def code_at(subject, picture, target):
    """(data, decoded picture) of the operating point nearest below `target` bits per pixel, or the lowest there is."""
    if not isinstance(subject, evaluation.ModelSubject) or not (subject.model.has_lambda or len(subject.model.config.layers) > 1):
        best = _nearest([subject.code(picture, point) for point in subject.points], picture, target)
        return best.data, best.decoded
    model, codings = subject.model, []

    def code(lmbda=None, **point):
        codings.append(codec.compress(model, picture, lmbda, entropy_coder=subject.entropy_coder, refine=subject.refine, **point))
        return codings[-1]

    with contextlib.suppress(RateError):
        if model.has_lambda:
            codec.search_rate(code, target, model.config.lmbda_min, model.config.lmbda_max)
        else:
            code(target_bpp=target)
    data = _nearest(codings or [code(**subject.points[0])], picture, target).data
    return data, codec.decode(model, bitstream.unpack(data, picture_io.MAX_PIXELS))


def _nearest(codings, picture, target):
    """The largest of those that take `target` bits per pixel at most, or the smallest of all."""
    below = [c for c in codings if metrics.bpp(c.data, *picture.shape[:2]) <= target * (1 + codec.TOLERANCE)]
    return max(below, key=lambda c: len(c.data)) if below else min(codings, key=lambda c: len(c.data))


def _source(picture):
    kind, options = ("png", {}) if max(picture.shape) > WEBP_SIDE else ("webp", {"lossless": True, "quality": 50, "method": 3})
    return f"data:image/{kind};base64," + base64.b64encode(picture_io.picture_bytes(picture, kind.upper(), **options)).decode()


def versions_of(path, subjects, target):
    """The page's entry for one picture: the original, then what each subject makes of it."""
    picture = picture_io.read_picture(path)
    versions = [{"text": "original", "source": _source(picture)}]
    for subject in subjects:
        data, decoded = code_at(subject, picture, target)
        similarity = metrics.ms_ssim(picture, decoded)
        text = f"{subject.name}: {metrics.bpp(data, *picture.shape[:2]):.3f} bpp, {metrics.psnr(picture, decoded):.2f} dB"
        text += "" if similarity != similarity else f", MS-SSIM {similarity:.4f}"
        versions.append({"text": text, "source": _source(decoded)})
    return {"name": os.path.basename(path), "width": picture.shape[1], "height": picture.shape[0], "versions": versions}


def bd_table(curves):
    """HTML table of the BD-rates between all curves of three points or more."""
    curves = [curve for curve in curves if len(curve["results"].get("psnr-rgb", ())) >= 3]

    def cell(anchor, test):
        if anchor is test:
            return ""
        parts = []
        for metric in ("psnr-rgb", "ms-ssim-rgb"):
            try:
                parts.append(f"{evaluation.bd_rate(anchor, test, metric).rate:+.1f}")
            except GoConvError:
                parts.append("\u2013")
        return " / ".join(parts)

    head = "".join(f"<th>{html.escape(curve['name'])}</th>" for curve in curves)
    rows = []
    for test in curves:
        rows.append(f"<tr><td>{html.escape(test['name'])}</td>" + "".join(f"<td>{cell(anchor, test)}</td>" for anchor in curves) + "</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def write(path, curves, images=(), target=0.3, title="Rate and distortion", models=()):
    """Writes the page.

    Args:
      curves: as `evaluation.read_results` gives them; those with a model or codec code the images too.
      images: paths of pictures to show.
      target: bits per pixel that the shown pictures shall not exceed.
      models: names or folders of models that curves are of, for those that the zoo does not have.

    Raises:
      GoConvError: if a picture cannot be read, or a curve's model is not there.
    """
    infos = [zoo.find_model(model) for model in models] if images else []
    subjects = [subject for subject in (subject_of(curve, infos) for curve in curves) if subject] if images else []
    pictures = [versions_of(image, subjects, target) for image in images]
    note = "; ".join(f"{c['name']}: {c.get('description') or c.get('source', '')}" for c in curves)
    fields = {
        "title": html.escape(title),
        "note": html.escape(note),
        "curves": plots.rate_distortion_svg(curves),
        "table": bd_table(curves),
        "data": json.dumps(pictures).replace("<", "\\u003c"),
    }
    with open(os.path.join(os.path.dirname(__file__), "report_template.html"), encoding="utf-8") as f:
        page = f.read()
    page = re.sub(r"\{\{(\w+)\}\}", lambda field: fields[field[1]], page)  # at once: values may have such braces
    atomic_write(path, page.encode("utf-8", "backslashreplace"))
