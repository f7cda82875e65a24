"""Writes a model folder's card from measured results: README.md, curve.png, figures in config.json.

Of a folder in checkpoints/ also the table of models there and docs/kodak.png.

    python -m goconv_tf evaluate --model checkpoints/variable-rate-small-mse kodak/ --output results
    python -m goconv_tf bench_codec jpeg kodak/ --output results    # and jpeg2000, webp, avif
    python experiments/card.py checkpoints/variable-rate-small-mse --results results [--notes "..."]

Rates count every byte of real files, which were decoded again.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys

import numpy as np

from goconv_tf import cards, commands, evaluation, metrics, plots, published, zoo
from goconv_tf.errors import UsageError
from goconv_tf.files import atomic_write

commands.quiet_tensorflow()

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COSTS = os.path.join(ROOT, "benchmarks", "results", "checkpoints.json")
CHECKPOINTS = os.path.join(ROOT, "checkpoints")
COLUMNS = (("bpp", "bpp", ".4f"), ("PSNR RGB, dB", "psnr-rgb", ".3f"), ("PSNR YUV, dB", "psnr-yuv", ".3f"), ("MS-SSIM RGB", "ms-ssim-rgb", ".5f"))
COLUMNS += (("encoding, s", "encoding_time", ".2f"), ("decoding, s", "decoding_time", ".2f"))
# Of a run's settings, those that its command has also where they are the default, and those that it never has.
SAID = ("model", "preset", "lambdas", "patchsize", "batchsize", "optimizer", "lr", "ema", "last_step", "seed")
UNSAID = ("steps", "minutes", "save_steps", "val_minutes", "cache_mb", "strategy", "cluster", "port", "tensorboard")
KEPT = ("lmbda", "layers", "bpp", "psnr-rgb", "psnr-yuv", "ms-ssim-rgb", "ms-ssim-y", "bpp-estimated", "encoding_time", "decoding_time")


def table(rows, columns):
    lines = ["| " + " | ".join(title for title, _, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join("" if row.get(key) is None else format(row[key], spec) for _, key, spec in columns) + " |")
    return "\n".join(lines)


def compare(own, others):
    """Bits against other codecs, as text: BD-rate of a curve; of a single point, at its own quality."""
    points = len(own["results"]["psnr-rgb"])
    cell = evaluation.bits_at_equal_quality if points == 1 else evaluation.bd_rate_cell
    measures = ("psnr-rgb", "ms-ssim-rgb")
    rows = [{"name": other["name"], **{metric: cell(other, own, metric) for metric in measures}} for other in others]
    what = "Bits at this quality, against the others' curves" if points == 1 else "BD-rate, bits at equal quality (range compared)"
    return f"""{what}; BPG's curve is published (by CompressAI, x265), the others were measured with Pillow on the same pictures:

{table(rows, [("against", "name", ""), ("PSNR RGB", "psnr-rgb", ""), ("MS-SSIM RGB", "ms-ssim-rgb", "")])}"""


def costs(info, path):
    """What benchmarks/bench.py measured of these weights, as text."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as f:
        data = json.load(f)
    row = next((row for row in data["rows"] if row["fingerprint"] == info.fingerprint), None)
    if row is None:
        return ""
    macs = row["kmac per pixel"]
    rows = [{"side": side, **row[side], "ratio": row[f"{side} ratio"]} for side in ("encode", "decode")]
    columns = [("median s", "side", ""), ("this model", "exact", ".3f"), ("--noexact", "float", ".3f"), ("ratio", "ratio", ".2f")]
    return f"""
## Cost

{sum(macs.values()):.1f} thousand multiply-adds per pixel: {", ".join(f"{name} {value:.1f}" for name, value in macs.items())}.
Exact entropy parameters change the bits of {row["pictures"]} Kodak pictures by {row["bits"]:+.3%} against floats.
By turns in one run, on {row["machine"]}, {row["when"]} (`{data["command"]}`); JPEG 2000 is Pillow's, at the rate of each of this model's files:

{table(rows, [*columns, ("JPEG 2000", "JPEG 2000", ".3f")])}
"""


def train_command(settings):
    """The command of a run, from its `training.Options` as a card keeps them; pictures and folders are left to the reader."""
    from goconv_tf.training import Options

    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    parts = ["python -m goconv_tf.train"]
    for name, value in settings.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in UNSAID or value in ((), None) or (name not in SAID and value == defaults[name]):
            continue
        if name == "settings":
            parts += [f"--set {shlex.quote(setting)}" for setting in value]
        elif isinstance(value, bool):
            parts.append(f"--{name}" if value else f"--no{name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            parts.append(f"--{name} " + shlex.quote(",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)))
    return " ".join([*parts, "--train_glob TRAIN --val_glob VAL --checkpoint_dir RUN"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Model folder.")
    parser.add_argument("--results", default="results", help="Folder with its results and the other codecs' (default: %(default)s).")
    parser.add_argument("--costs", default=COSTS, help="Results of `benchmarks/bench.py checkpoints` (default: %(default)s).")
    parser.add_argument("--notes", default="", help="Text for the card: how it was trained (default: what it says now).")
    parser.add_argument("--data", default="", help="Text for the card: the training pictures (default: what it says now).")
    parser.add_argument("--license", default="apache-2.0", help="For a card that names none, as Hugging Face's hub calls it (default: %(default)s).")
    args = parser.parse_args()
    info = zoo.find_model(args.model)
    path = os.path.join(args.results, f"{info.name}.json")
    own = evaluation.read_results(path)
    if own["meta"].get("fingerprint") != info.fingerprint:
        raise UsageError(f"{path} is of weights {own['meta'].get('fingerprint')}, not {info.fingerprint}")
    if "kodak" not in own["meta"]["dataset"].lower():
        raise UsageError(f"{path} is of {own['meta']['dataset']!r}: cards show Kodak's pictures")
    with open(path, encoding="utf-8") as f:
        results = json.load(f)["results"]
    rows = [{key: results[key][k] for key in KEPT if key in results} for k in range(len(results["bpp"]))]
    others = []
    for name in evaluation.CODECS:
        other = os.path.join(args.results, f"{name}.json")
        if os.path.exists(other):
            others.append(evaluation.read_results(other))
    others.append(published.curve("kodak", "bpg444"))

    config_path = os.path.join(info.path, zoo.CONFIG_FILE)
    with open(config_path, encoding="utf-8") as f:
        config = json.load(f)
    config["card"].pop("jpeg", None)
    config["card"]["kodak"] = rows
    config["card"].setdefault("license", args.license)
    for key in ("notes", "data"):
        config["card"][key] = getattr(args, key) or config["card"].get(key, "")
    if not config["card"]["data"]:
        raise UsageError(f"{info.path}: its card does not say what it was trained on: give --data")
    plots.rate_distortion(os.path.join(info.path, "curve.png"), [own, *others], max_bpp=1.5 * max(row["bpp"] for row in rows))
    training = config["card"].get("training", {})
    size = os.path.getsize(os.path.join(info.path, zoo.WEIGHTS_FILE))
    parameters = sum(int(np.prod(v.shape)) for v in zoo.load_pretrained(info.path, fold=False).trainable_variables)
    config["card"]["parameters"] = parameters
    atomic_write(config_path, (json.dumps(config, indent=1) + "\n").encode())
    asked = [(key, key, ".5g") for key in ("lmbda", "layers") if key in rows[0]]
    text = f"""{cards.front_matter(info._replace(card=config["card"]))}
# {info.name}

{info.model}, {parameters / 1e6:.2f} million parameters, {size / 2**20:.1f} MiB, {info.config.rates_text}, fingerprint {info.fingerprint}.

{config["card"]["notes"]}

{config["card"]["data"]}

The settings of its last run, as they were at its end, step {training.get("steps", "?")} of that run; how it began is said above:

    {train_command(training)}

## {own["meta"]["pictures"]} pictures of `{own["meta"]["dataset"]}`

Means over pictures; every byte of the file counts, and every file was decoded again. Seconds are those of
{own["meta"]["machine"]}, beside other work, and mean little alone.

{table(rows, [*asked, *COLUMNS])}

{compare(own, others)}

![Rate-distortion curve](curve.png)
{costs(info, args.costs)}
Made by `python experiments/card.py checkpoints/{os.path.basename(os.path.normpath(info.path))} --results RESULTS`.
"""
    atomic_write(os.path.join(info.path, "README.md"), text.encode())
    print(os.path.join(info.path, "README.md"))
    if os.path.dirname(os.path.abspath(info.path)) == CHECKPOINTS:
        overview(args.results)


def shipped():
    """What the folders in checkpoints/ say of themselves, by name."""
    return [zoo.read_info(entry.path) for entry in sorted(os.scandir(CHECKPOINTS), key=lambda entry: entry.name) if entry.is_dir()]


def models_table():
    """The shipped models and their ends on Kodak."""
    rows = []
    for info in shipped():
        kodak = info.card.get("kodak", [])
        row = {"name": f"[{info.name}]({info.name}/README.md)", "model": info.model}
        row["size"] = os.path.getsize(os.path.join(info.path, zoo.WEIGHTS_FILE)) / 2**20
        for key, spec, shown in (("bpp", ".3f", float), ("psnr-rgb", ".2f", float), ("ms-ssim-rgb", ".2f", metrics.decibels)):
            ends = [min(values), max(values)] if (values := [row[key] for row in kodak]) else []
            row[key] = " to ".join(dict.fromkeys(format(shown(value), spec) for value in ends))
        rows.append(row)
    columns = [("model", "name", ""), ("class", "model", ""), ("MiB", "size", ".1f"), ("bpp on Kodak", "bpp", "")]
    return table(rows, [*columns, ("PSNR RGB, dB", "psnr-rgb", ""), ("MS-SSIM RGB, dB", "ms-ssim-rgb", "")])


def overview(results):
    """The table of models in checkpoints/README.md, and all of them with the codecs in docs/kodak.png."""
    path = os.path.join(CHECKPOINTS, "README.md")
    with open(path, encoding="utf-8") as f:
        text = f.read()
    atomic_write(path, re.sub(r"^\| model \| class .*?\n(?=\n)", lambda _: models_table() + "\n", text, count=1, flags=re.M | re.S).encode())
    curves = {}
    for info in shipped():  # models of one rate that differ in lambda make one curve
        name = re.sub(r"-[\d.]+$", "", info.name)
        curve = curves.setdefault(name, {"name": name, "results": {}})
        for key in ("psnr-rgb", "ms-ssim-rgb"):
            curve["results"].setdefault(key, []).extend((row["bpp"], row[key]) for row in info.card.get("kodak", []))
    paths = [os.path.join(results, f"{name}.json") for name in ("jpeg", "jpeg2000", "avif")]
    others = [evaluation.read_results(path) for path in paths if os.path.exists(path)]
    others.append(published.curve("kodak", "bpg444"))
    plots.rate_distortion(os.path.join(ROOT, "docs", "kodak.png"), [*curves.values(), *others])


if __name__ == "__main__":
    sys.exit(commands.status_of(main))
