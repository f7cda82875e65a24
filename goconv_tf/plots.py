"""Rate-distortion plots, legible at the width of a paper's column."""

import io
import math

from goconv_tf import metrics
from goconv_tf.errors import printable
from goconv_tf.files import atomic_write

LABELS = {"psnr-rgb": "PSNR RGB (dB)", "ms-ssim-rgb": "MS-SSIM RGB (dB)", "psnr-yuv": "PSNR YUV 6:1:1 (dB)", "ms-ssim-y": "MS-SSIM Y (dB)"}

SUBJECT = {"marker": "o", "markersize": 3.5, "linewidth": 1.4, "zorder": 3}
CODEC = {"linewidth": 0.9}
PUBLISHED = {"linestyle": "--", "linewidth": 0.9}


def drawn(metric: str, value: float) -> float:
    """MS-SSIM in dB, all else as it is."""
    return metrics.decibels(value) if metric.startswith("ms-ssim") else value


def _line(curve):
    if "source" in curve:
        return PUBLISHED
    return CODEC if curve.get("meta", {}).get("codec") else SUBJECT


def _plain(text):
    """Text that Matplotlib does not take for a formula, or for what legends leave out, and that UTF-8 has."""
    text = printable(text).replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


def rate_distortion(path, curves, **options):
    """Draws curves into a file whose extension says its format (.png, .pdf, .svg); options as those of `draw`."""
    atomic_write(str(path), draw(curves, str(path).rsplit(".", 1)[-1], **options))


def rate_distortion_svg(curves, **options) -> str:
    """The same as an <svg> element."""
    text = draw(curves, "svg", **options).decode()
    return text[text.index("<svg") :]


def draw(curves, file_format, measures=("psnr-rgb", "ms-ssim-rgb"), title="", max_bpp=None) -> bytes:
    """Curves over bits per pixel, one panel a measure.

    Args:
      curves: as `evaluation.read_results` gives them: {"name": str, "results": {metric: [(bpp, value)]}}, and "meta" of a codec, or
        "source" of a published curve. Codecs are drawn thin, published curves dashed, all others, the subject, bold with their
        points. MS-SSIM is given linear and drawn in dB.
      max_bpp: right end of the rate axis; default: 1.3 times the largest rate of the subject's curves.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, whose figures and backend are the caller's

    own = [curve for curve in curves if _line(curve) is SUBJECT] or curves
    limit = max_bpp or 1.3 * max((point[0] for curve in own for points in curve["results"].values() for point in points), default=1.0)
    with matplotlib.rc_context({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 6.5, "legend.framealpha": 0.8}):
        figure = Figure(layout="constrained")
        axes = figure.subplots(1, len(measures), squeeze=False)
        colours = [f"C{k}" for k in range(10)]
        for axis, metric in zip(axes[0], measures):
            for number, curve in enumerate(curves):
                points = sorted(p for p in curve["results"].get(metric, ()) if math.isfinite(drawn(metric, p[1])))
                rates, values = [p[0] for p in points], [drawn(metric, p[1]) for p in points]
                colour = colours[number % len(colours)]
                axis.plot(rates, values, color=colour, label=_plain(curve["name"]), **_line(curve))
            axis.set_xlim(0, limit)
            seen = [value for c in curves for r, v in c["results"].get(metric, ()) if r <= limit and math.isfinite(value := drawn(metric, v))]
            if seen:
                margin = 0.04 * (max(seen) - min(seen) or 1)
                axis.set_ylim(min(seen) - margin, max(seen) + margin)
            axis.set_xlabel("bits per pixel")
            axis.set_ylabel(LABELS.get(metric, metric))
        # Below the panels: inside, so many curves leave no room that is free.
        handles, labels = axes[0][0].get_legend_handles_labels()
        columns = 2 * len(measures)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        figure.set_size_inches(3.5 * len(measures), 2.9 + 0.16 * -(-len(labels) // columns))
        if title:
            figure.suptitle(_plain(title), fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=file_format, dpi=200)
    return buffer.getvalue()
