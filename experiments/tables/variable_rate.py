"""The variable-rate paper's tables II to VI on any pictures, and its rate-distortion figure.

    python experiments/tables/variable_rate.py IMAGES --model variable-rate-small-mse [--model ...] --output results/

Each --model has tables of its own. The paper's has three models, for low, middle and high rates: --model LOW,MIDDLE,HIGH takes such
three for one, and codes each target with the one that the paper took, or else the first that reaches it. For each picture and target
rate, rate control finds lambda (within 1 %). YUV_PSNR is (6 Y + U + V) / 8, both measures as in the paper. Beside them stand the
published figures (arXiv 2009.13074) for pictures named like jpegai09.png. Seconds are of one coding at the lambda found. Fig. 3 is
drawn as mean curves of the pictures, in the paper's measures (Y and YUV) and in those of the published codecs (RGB).
"""

import argparse
import math
import os
import time

from common import cell, markdown, measure, provenance, run, write_json

from goconv_tf import codec, evaluation, metrics, picture_io, plots, published, zoo
from goconv_tf.errors import RateError, UsageError
from goconv_tf.files import PICTURE_EXTENSIONS, atomic_write, find_inputs

TARGETS = (0.06, 0.12, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
PAPERS = dict(zip(TARGETS, (0, 0, 1, 1, 2, 2, 2, 2)))  # which of the paper's three models coded each


def reach(models, picture, target):
    """A dict of what the table needs at one target, with the first model that reaches it; a text where none does."""
    refusals = []
    first = [models[PAPERS[target]]] if len(models) == 3 else []
    for model in first + [model for model in models if model not in first]:
        try:
            result = codec.compress(model, picture, target_bpp=target)
        except RateError as error:
            refusals.append(str(error))
            continue
        codec.decompress(model, result.data)  # what TensorFlow compiles for the first picture is not its time
        begin = time.time()
        data = codec.compress(model, picture, lmbda=result.lmbda).data
        middle = time.time()
        decoded = codec.decompress(model, data)
        row = {"model": model.info.name, "lmbda": result.lmbda, "bpp": result.bpp, "deviation": result.bpp / target - 1, "codings": result.codings}
        row.update(encoding_time=middle - begin, decoding_time=time.time() - middle)
        row.update({name: value if math.isfinite(value) else None for name, value in metrics.quality(picture, decoded).items()})
        return row
    return "; ".join(refusals)


def picture_table(name, targets, rows, paper):
    """Tables II to V: one picture."""
    titles = ["target bpp", "reached", "deviation", "model", "lambda", "codings", "YUV_PSNR", "Y_MS-SSIM dB"]
    titles += ["reached, published", "YUV_PSNR, published", "Y_MS-SSIM dB, published"] if paper else []
    lines = []
    for target, row in zip(targets, rows):
        k = TARGETS.index(target)
        if isinstance(row, str):
            line = [target, row] + [None] * 6
        else:
            similarity = row["ms-ssim-y"]
            decibels = None if similarity is None else metrics.decibels(similarity)
            line = [target, f"{row['bpp']:.4f}", f"{100 * row['deviation']:+.2f} %", row["model"], f"{row['lmbda']:.5g}", row["codings"]]
            line += [cell(row["psnr-yuv"], ".2f"), cell(decibels, ".2f")]
        if paper:
            line += [cell(paper["reached_bpp"][k], ".4f"), cell(paper["yuv_psnr"][k], ".2f"), cell(paper["y_ms_ssim_db"][k], ".2f")]
        lines.append(line)
    return f"### {name}\n\n" + markdown(titles, lines)


def of_pictures(figures):
    """Of published figures those that are a picture's: beside them is their source."""
    return {name: figure for name, figure in figures.items() if isinstance(figure, dict)}


def time_table(rows_by_picture, sizes, times):
    """Table VI: mean seconds over the rates."""
    lines = []
    for name, rows in rows_by_picture.items():
        good = [row for row in rows if not isinstance(row, str)]
        encoding, decoding = (sum(row[key] for row in good) / len(good) if good else None for key in ("encoding_time", "decoding_time"))
        paper = times.get(name, {})
        line = [
            name,
            "{} x {}".format(*sizes[name]),
            ", ".join(sorted({row["model"] for row in good})),
            cell(encoding, ".2f"),
            cell(decoding, ".2f"),
        ]
        lines.append(line + [paper.get(key) for key in ("encode_cpu", "encode_gpu", "decode_cpu", "decode_gpu")])
    titles = ["picture", "size", "models", "encoding, s", "decoding, s", "paper: encode CPU", "encode GPU", "decode CPU", "decode GPU"]
    return markdown(titles, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="Folder of pictures (the paper uses four).")
    parser.add_argument("--model", action="append", required=True, help="Zoo name or folder, or LOW,MIDDLE,HIGH of them; may be repeated.")
    parser.add_argument("--output", default="results", help="Folder for the tables and the plot (default: %(default)s).")
    parser.add_argument("--first", type=int, default=0, help="Only the first so many pictures.")
    parser.add_argument("--targets", type=float, nargs="+", choices=TARGETS, default=TARGETS, help="Only these rates of the paper's.")
    args = parser.parse_args()
    names = [name for one in args.model for name in one.split(",")]
    loaded = {name: zoo.load_pretrained(name) for name in dict.fromkeys(names)}
    for model in loaded.values():
        if not model.has_lambda:
            raise UsageError(f"{model.info.name} is a {model.config.model}, not a variable_rate")
    paths = find_inputs([args.images], PICTURE_EXTENSIONS)[: args.first or None]
    evaluation.check_stems(args.images, paths, "these tables do not show")
    found = measure(list(loaded), args.images, args.output)  # first, as it refuses two models of one name
    systems = {}
    for one in args.model:
        parts = [loaded[name] for name in one.split(",")]
        systems[", ".join(model.info.name for model in parts)] = parts
    paper = published.tables()["variable_rate"]
    known, times = of_pictures(paper), of_pictures(paper["timing_seconds"])
    every, text = {}, []
    for system, models in systems.items():
        rows, sizes = every.setdefault(system, {}), {}
        text.append(f"## {system}\n")
        for path in paths:
            name, picture = evaluation.stem(path), picture_io.read_picture(path)
            sizes[name] = picture.shape[1::-1]
            rows[name] = []
            for target in args.targets:
                rows[name].append(reach(models, picture, target))
                print(name, target, rows[name][-1] if isinstance(rows[name][-1], str) else f"{rows[name][-1]['bpp']:.4f} bpp", flush=True)
            text.append(picture_table(name, args.targets, rows[name], known.get(name)))
        text.append(f"### Seconds\n\nPublished: {paper['timing_seconds']['source']}.\n\n" + time_table(rows, sizes, times))
    head = f"# Variable rate: {len(paths)} pictures, rate control to 1 %\n"
    head += f"\nPublished figures: {paper['source']}.\n" if known.keys() & next(iter(every.values())).keys() else ""
    base = os.path.join(args.output, "variable_rate")
    atomic_write(base + ".md", "\n".join([head, provenance(found), *text]).encode())
    write_json(args.output, "variable_rate", {"targets": list(args.targets), "models": every})
    curves = [evaluation.read_results(os.path.join(args.output, f"{name}.json")) for name in found]
    references = ("jpeg", "jpeg2000", "bpg444", "bmshj2018-hyperprior-mse", "mbt2018-mean-mse", "vtm")
    kodak = [published.curve("kodak", name) for name in references] if published.is_of("kodak", args.images) else []
    title = f"one model, all rates; mean of {next(iter(found.values()))['meta']['pictures']} pictures"
    plots.rate_distortion(base + ".png", [*curves, *kodak], measures=("psnr-yuv", "ms-ssim-y", "psnr-rgb", "ms-ssim-rgb"), title=title)
    print(f"{base}.md, .png")


if __name__ == "__main__":
    run(main)
