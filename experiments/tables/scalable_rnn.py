"""The scalable RNN paper's table on Kodak: published, ours, difference.

    python experiments/tables/scalable_rnn.py KODAK --model scalable-rnn-small-mse [--model ...] --output results/

Writes tables/scalable_rnn.json, scalable_rnn.md and scalable_rnn.png. Ours are whole files, really coded with that many
layers and decoded again; means over the pictures. The published figures are means over the 24 Kodak images,
at bpp of the original's substreams and containers, by Su et al.
"""

import argparse
import os

from common import cell, markdown, measure, provenance, run, write_json

from goconv_tf import evaluation, plots, published, zoo
from goconv_tf.errors import UsageError
from goconv_tf.files import atomic_write

REFERENCES = ("scalable-rnn-with-hyperprior", "scalable-rnn-without-hyperprior", "toderici-2017-cvpr", "bmshj2018-hyperprior-mse", "jpeg", "jpeg2000")
METRICS = (("bpp", ".4f"), ("psnr-rgb", ".3f"), ("ms-ssim-rgb", ".5f"))


def paper_rows(hyperprior):
    """[{"layers", "bpp", "psnr-rgb", "ms-ssim-rgb"}] as published."""
    results = published.curve("kodak", f"scalable-rnn-{'with' if hyperprior else 'without'}-hyperprior")["results"]
    pairs = zip(results["psnr-rgb"], results["ms-ssim-rgb"])
    return [{"layers": k + 1, "bpp": a[0], "psnr-rgb": a[1], "ms-ssim-rgb": b[1]} for k, (a, b) in enumerate(pairs)]


def table(hyperprior, rows, known):
    """One model's rows; beside the published ones if these are of the same pictures."""
    if not known:
        return markdown(
            ["layers", *(metric for metric, _ in METRICS)], [[row["layers"], *(cell(row[m], spec) for m, spec in METRICS)] for row in rows]
        )
    titles = ["layers"] + [f"{metric} {what}" for metric, _ in METRICS for what in ("published", "ours", "difference")]
    theirs = {row["layers"]: row for row in paper_rows(hyperprior)}
    cells = []
    for row in rows:
        line = [row["layers"]]
        for metric, spec in METRICS:
            other, own = theirs.get(row["layers"], {}).get(metric), row[metric]
            line += [cell(other, spec), cell(own, spec)]
            line.append(format(own - other, "+" + spec) if other and own is not None else None)
        cells.append(line)
    return markdown(titles, cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="Folder of pictures; published figures stand beside ours if it is called after Kodak.")
    parser.add_argument("--model", action="append", required=True, help="Zoo name or folder of a scalable model; may be repeated.")
    parser.add_argument("--output", default="results", help="Folder for the table and the plot (default: %(default)s).")
    args = parser.parse_args()
    for name in args.model:
        model = zoo.find_model(name).config.model
        if model != "scalable_rnn":
            raise UsageError(f"{name} is a {model}, not a scalable_rnn")
    models = measure(args.model, args.images, args.output)
    text, data, curves = [], {}, []
    known = published.is_of("kodak", args.images)
    for name, found in models.items():
        results = found["results"]
        results = {"layers": [1], **results}  # which a model of one layer is not asked for
        rows = [{key: results[key][k] for key in ("layers", "bpp", "psnr-rgb", "ms-ssim-rgb")} for k in range(len(results["bpp"]))]
        hyperprior = any(key.startswith("bpp-z_") for key in results)
        data[name] = {"hyperprior": hyperprior, "rows": rows}
        text += [
            f"## {name}\n",
            *([f"Published: {'with' if hyperprior else 'without'} hyperprior.\n"] if known else []),
            table(hyperprior, rows, known),
        ]
        curves.append(evaluation.read_results(os.path.join(args.output, f"{name}.json")))
        if known:
            others = [published.curve("kodak", reference) for reference in REFERENCES]
            rates = [[other["name"], *(evaluation.bd_rate_cell(other, curves[-1], metric) for metric, _ in METRICS[1:])] for other in others]
            text.append(markdown([f"BD-rate of {name} against", "PSNR RGB", "MS-SSIM RGB"], rates))
    base = os.path.join(args.output, "scalable_rnn")
    theirs = {"published": {"with hyperprior": paper_rows(True), "without hyperprior": paper_rows(False)}} if known else {}
    contents = {**theirs, "models": data}
    write_json(args.output, "scalable_rnn", contents)
    count = next(iter(models.values()))["meta"]["pictures"]
    head = f"# Scalable RNN: {count} pictures, whole files coded and decoded\n"
    source = [f"Published figures: {published.curve('kodak', 'scalable-rnn-with-hyperprior')['source']}.\n"] if known else []
    atomic_write(base + ".md", "\n".join([head, *source, provenance(models), *text]).encode())
    theirs = [published.curve("kodak", name) for name in REFERENCES] if known else []
    largest = max(row["bpp"] for found in data.values() for row in found["rows"])
    plots.rate_distortion(base + ".png", curves + theirs, max_bpp=max(1.0, 1.1 * largest))
    print(f"{base}.md, .png")


if __name__ == "__main__":
    run(main)
