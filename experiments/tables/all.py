"""make results: everything the three papers show, for all models of the zoo, on a folder of pictures.

    python experiments/tables/all.py KODAK --output results [--tecnick TECNICK] [--model NAME ...]

Results files of all models and of JPEG, JPEG 2000, WebP and AVIF, BD-rates, a plot, a page to look at, the tables of each
paper, and RESULTS.md, which says for each of them what made it. Interrupted, it goes on where it was.
"""

import argparse
import json
import os
import re
import subprocess
import sys

from common import markdown, provenance, run
from variable_rate import TARGETS

from goconv_tf import evaluation, plots, report, zoo
from goconv_tf.errors import UsageError
from goconv_tf.files import PICTURE_EXTENSIONS, atomic_write, find_inputs
from goconv_tf.published import is_of

HERE = os.path.dirname(os.path.abspath(__file__))
PUBLISHED = ("kodak:bpg444", "kodak:mbt2018-mean-mse", "kodak:vtm")


def script(name, *args):
    """Runs a table script; UsageError if it fails."""
    command = [sys.executable, os.path.join(HERE, name), *args]
    print("python", *command[1:], flush=True)
    if subprocess.run(command, check=False).returncode:
        raise UsageError(f"{name} failed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="Folder of pictures: Kodak, for the papers' tables.")
    parser.add_argument("--tecnick", help="Folder of the Tecnick pictures.")
    parser.add_argument("--model", action="append", help="Zoo names or model folders; may be repeated (default: all).")
    parser.add_argument("--output", default="results", help="Folder for all of it (default: %(default)s).")
    parser.add_argument("--shown", type=int, default=2, help="How many pictures the page shows (default: %(default)s).")
    parser.add_argument(
        "--codecs", nargs="*", choices=list(evaluation.CODECS), default=list(evaluation.CODECS), help="Which of Pillow's codecs (default: all)."
    )
    parser.add_argument("--targets", type=float, choices=TARGETS, nargs="+", default=[], help="Only these of the variable-rate paper's target rates.")
    args = parser.parse_args()
    if args.tecnick and not os.path.isdir(args.tecnick):
        raise UsageError(f"{args.tecnick}: no such folder")
    models = [zoo.find_model(name) for name in args.model] if args.model else zoo.list_models()
    if not models:
        raise UsageError("no model in the zoo")
    if args.tecnick and not any(info.config.model == "crpe" for info in models):
        raise UsageError("--tecnick is for the tables of CRPE, and no model is one")
    specs = [("model", info.path, "tfc", 8) for info in models] + [("codec", name) for name in args.codecs]
    paths = evaluation.evaluate(specs, args.images, args.output)
    curves = [evaluation.read_results(path) for path in paths]
    tables = []
    for kind, name in (("variable_rate", "variable_rate.py"), ("scalable_rnn", "scalable_rnn.py"), ("crpe", "crpe.py")):
        chosen = [info.path for info in models if info.config.model == kind]
        if not chosen:
            continue
        if kind == "crpe":
            script(name, args.images, "--output", args.output, *(["--tecnick", args.tecnick] if args.tecnick else []), "--models", *chosen)
        else:
            limit = ["--first", "4", *(["--targets", *map(str, args.targets)] if args.targets else [])] if kind == "variable_rate" else []
            script(name, args.images, "--output", args.output, *limit, *(part for model in chosen for part in ("--model", model)))
        tables.append(kind)

    published = [evaluation.read_results(name) for name in PUBLISHED] if is_of("kodak", args.images) else []
    if not published:
        print(f"{args.images}: has no 'kodak' in its name, so that published figures, which are of Kodak's pictures, are left out")
    own = [curve for curve in curves if curve["meta"].get("model")]
    codecs = [curve for curve in curves if curve["meta"].get("codec")]
    rows = []
    several = [curve for curve in own if len(curve["results"]["psnr-rgb"]) > 1]  # single-rate models make a curve in their paper's section
    for curve in several:
        for other in [*codecs, *published]:
            cells = [evaluation.bd_rate_cell(other, curve, metric, digits=2) for metric in ("psnr-rgb", "ms-ssim-rgb")]
            rows.append([curve["name"], other["name"], *cells])
    plots.rate_distortion(os.path.join(args.output, "rd.png"), own + codecs + published)
    shown = find_inputs([args.images], PICTURE_EXTENSIONS)[: args.shown]
    report.write(os.path.join(args.output, "report.html"), own + codecs + published, shown, models=[info.path for info in models])

    data = {}
    for path in paths:
        with open(path, encoding="utf-8") as f:
            data[path] = json.load(f)
    text = [
        "# Results\n",
        provenance(),
        f"{len(specs)} models and codecs on the {next(iter(data.values()))['meta']['pictures']} pictures of `{args.images}`.\n",
    ]
    lines = [
        [d["name"], d["description"], d["meta"].get("steps"), d["meta"]["machine"], f"[{os.path.basename(p)}]({os.path.basename(p)})"]
        for p, d in data.items()
    ]
    text += ["## Curves\n", markdown(["name", "what", "steps of the last run", "machine", "file"], lines), "![rate-distortion](rd.png)\n"]
    text += ["Side by side at 0.3 bpp: [report.html](report.html).\n", "## BD-rate\n", "Bits needed at equal quality (qualities compared):\n"]
    text.append(markdown(["model", "against", "PSNR RGB", "MS-SSIM RGB"], rows))
    for kind in tables:
        with open(os.path.join(args.output, f"{kind}.md"), encoding="utf-8") as f:
            text.append(re.sub("^#", "##", f.read(), flags=re.M))
        plots_of_it = [f"{kind}-kodak.png" if kind == "crpe" and is_of("kodak", args.images) else f"{kind}.png"]
        plots_of_it += ["crpe-tecnick.png"] if kind == "crpe" and args.tecnick else []
        text += [f"![{kind}]({plot})\n" for plot in plots_of_it]
    atomic_write(os.path.join(args.output, "RESULTS.md"), "\n".join(text).encode())
    print(os.path.join(args.output, "RESULTS.md"))


if __name__ == "__main__":
    run(main)
