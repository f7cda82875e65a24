"""The scalable RNN paper's table on Kodak: published, ours, difference.

    python experiments/tables/scalable_rnn.py KODAK --model scalable-rnn-small-mse [--model ...] --output results/

Writes scalable_rnn.json, scalable_rnn.md and scalable_rnn.png. Ours are whole files, really coded with that many
layers and decoded again; means over the pictures. The published figures are means over the 24 Kodak images,
at bpp of the original's substreams and containers, by Su et al.
"""

import argparse
import json
import os
import platform
import sys

from goconv_tf import codec, commands, plots, published, zoo
from goconv_tf.errors import GoConvError, UsageError
from goconv_tf.files import atomic_write

commands.quiet_tensorflow()

METRICS = (("bpp", ".4f"), ("psnr-rgb", ".3f"), ("ms-ssim-rgb", ".5f"))


def paper_rows(hyperprior):
    """[{"layers", "bpp", "psnr-rgb", "ms-ssim-rgb"}] as published."""
    results = published.curve("kodak", f"scalable-rnn-{'with' if hyperprior else 'without'}-hyperprior")["results"]
    pairs = zip(results["psnr-rgb"], results["ms-ssim-rgb"])
    return [{"layers": k + 1, "bpp": a[0], "psnr-rgb": a[1], "ms-ssim-rgb": b[1]} for k, (a, b) in enumerate(pairs)]


def markdown(name, hyperprior, rows):
    lines = [f"## {name}", "", f"Published: {'with' if hyperprior else 'without'} hyperprior.", ""]
    lines += ["| layers | " + " | ".join(f"{metric} {what}" for metric, _ in METRICS for what in ("published", "ours", "difference")) + " |"]
    lines += ["|" + "---|" * (1 + 3 * len(METRICS))]
    theirs = {row["layers"]: row for row in paper_rows(hyperprior)}
    for row in rows:
        cells = [str(row["layers"])]
        for metric, spec in METRICS:
            other = theirs.get(row["layers"], {}).get(metric)
            cells += [format(other, spec) if other else "", format(row[metric], spec), format(row[metric] - other, "+" + spec) if other else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="Folder of the Kodak pictures.")
    parser.add_argument("--model", action="append", required=True, help="Zoo name or folder of a scalable model; may be repeated.")
    parser.add_argument("--output", default="results", help="Folder for the table and the plot (default: %(default)s).")
    args = parser.parse_args()
    from goconv_tf import evaluation

    files = commands.plan([args.images], args.output, commands.PICTURE_EXTENSIONS, ".gcv")
    pictures = [codec.read_picture(path) for path, _ in files]
    results, text, curves = {}, [], []
    for name in args.model:
        model = zoo.load_pretrained(name)
        if model.config.model != "scalable_rnn":
            raise UsageError(f"{name} is a {model.config.model}, not a scalable_rnn")
        rows = []
        for point in evaluation.operating_points(model.config):
            rows.append(evaluation.measure_model(model, pictures, **point))
            print(model.info.name, {key: round(value, 4) for key, value in rows[-1].items()}, flush=True)
        results[model.info.name] = {"fingerprint": model.info.fingerprint, "steps": model.info.card.get("training", {}).get("steps"), "rows": rows}
        text.append(markdown(model.info.name, model.config.hyperprior, rows))
        points = {metric: [(row["bpp"], row[metric]) for row in rows] for metric, _ in METRICS[1:]}
        curves.append({"name": model.info.name, "style": "o-", "results": points})
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    command = "python experiments/tables/scalable_rnn.py " + " ".join(sys.argv[1:])
    data = {"pictures": len(pictures), "machine": machine, "command": command, "published": {str(h): paper_rows(h) for h in (True, False)}}
    os.makedirs(args.output, exist_ok=True)
    base = os.path.join(args.output, "scalable_rnn")
    atomic_write(base + ".json", (json.dumps({**data, "models": results}, indent=1) + "\n").encode())
    head = f"# Scalable RNN: {len(pictures)} pictures, whole files coded and decoded\n\n"
    head += f"{published.curve('kodak', 'scalable-rnn-with-hyperprior')['source']}\nMachine: {machine}. Made by `{command}`.\n\n"
    atomic_write(base + ".md", (head + "\n".join(text)).encode())
    references = ("scalable-rnn-with-hyperprior", "scalable-rnn-without-hyperprior", "toderici-2017-cvpr", "jpeg", "jpeg2000")
    plots.rate_distortion(base + ".png", curves + [published.curve("kodak", name) for name in references], max_bpp=1.0)
    print(f"{base}.md, .json, .png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (GoConvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
