"""Measures a model folder on a folder of pictures and writes its card: README.md, curve.png, figures in config.json.

    python experiments/card.py checkpoints/variable-rate-small-mse kodak/ [--notes "..."]

Rates count every byte of real files, which are decoded again; JPEG is Pillow's, 4:2:0.
"""

import argparse
import json
import os
import platform

import numpy as np

from goconv_tf import codec, commands, plots, zoo
from goconv_tf.files import atomic_write

commands.quiet_tensorflow()

JPEG_QUALITIES = (5, 8, 12, 18, 25, 35, 45, 55, 65, 75, 85, 92)
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def table(rows, columns):
    lines = ["| " + " | ".join(title for title, _, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(format(row[key], spec) for _, key, spec in columns) + " |" for row in rows]
    return "\n".join(lines)


def points(rows):
    return {metric: [(row["bpp"], row[metric]) for row in rows] for metric in ("psnr-rgb", "ms-ssim-rgb")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Model folder.")
    parser.add_argument("images", help="Folder of pictures.")
    parser.add_argument(
        "--points", type=int, default=8, help="How many lambdas, of models that have one, spread evenly over the logarithm of the model's range."
    )
    parser.add_argument("--notes", default="", help="Text for the card: data, machine, how it was trained.")
    args = parser.parse_args()

    from goconv_tf import evaluation

    model = zoo.load_pretrained(args.model)
    info = model.info
    names = sorted(name for name in os.listdir(args.images) if name.lower().endswith(commands.PICTURE_EXTENSIONS))
    pictures = [codec.read_picture(os.path.join(args.images, name)) for name in names]
    rows = []
    asked = evaluation.operating_points(info.config, args.points)
    for point in asked:
        rows.append(evaluation.measure_model(model, pictures, **point))
        print({key: round(value, 5) for key, value in rows[-1].items()}, flush=True)
    jpeg = [evaluation.measure_jpeg(pictures, quality) for quality in JPEG_QUALITIES]
    gains = [{"bpp": rate, **{k: evaluation.gain_at(rows, jpeg, rate, k) for k in ("psnr-rgb", "ms-ssim-rgb")}} for rate in RATES]
    gains = [gain for gain in gains if np.isfinite(gain["psnr-rgb"])]

    path = os.path.join(info.path, zoo.CONFIG_FILE)
    with open(path, encoding="utf-8") as f:
        config = json.load(f)
    config["card"]["kodak"] = rows
    config["card"]["jpeg"] = jpeg
    config["card"]["notes"] = args.notes or config["card"].get("notes", "")
    atomic_write(path, (json.dumps(config, indent=1) + "\n").encode())
    curves = [
        {"name": name, "style": style, "results": points(curve)} for name, style, curve in ((info.name, "o-", rows), ("JPEG 4:2:0", "s-", jpeg))
    ]
    plots.rate_distortion(os.path.join(info.path, "curve.png"), curves, title=f"mean of {len(pictures)} pictures")

    training = config["card"].get("training", {})
    size = os.path.getsize(os.path.join(info.path, zoo.WEIGHTS_FILE))
    parameters = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    columns = [(name, name, ".5g") for name in asked[0]] + [
        ("bpp", "bpp", ".4f"),
        ("PSNR RGB, dB", "psnr-rgb", ".3f"),
        ("MS-SSIM RGB", "ms-ssim-rgb", ".5f"),
    ]
    columns += [("encoding, s", "encoding_time", ".2f"), ("decoding, s", "decoding_time", ".2f")]
    text = f"""# {info.name}

{info.model}, {parameters / 1e6:.2f} million parameters, {size / 2**20:.1f} MiB, {info.config.rates}, fingerprint {info.fingerprint}.

{config["card"]["notes"]}

Training: {training.get("steps", "?")} steps; last settings {json.dumps(training)}

## {len(pictures)} pictures of `{os.path.basename(os.path.normpath(args.images))}`

Means over pictures; every byte of the file counts, and every file was decoded again. Seconds are those of this
machine ({platform.machine()}, {os.cpu_count()} cores, beside other work) and mean little alone.

{table(rows, columns)}

Gain over Pillow's JPEG (4:2:0) at equal rate:

{table(gains, [("bpp", "bpp", ".2f"), ("PSNR, dB", "psnr-rgb", "+.2f"), ("MS-SSIM", "ms-ssim-rgb", "+.4f")])}

JPEG in the same run:

{table(jpeg, [("quality", "quality", ".0f"), *columns[len(asked[0]) :]])}

![Rate-distortion curve](curve.png)

Made by `python experiments/card.py checkpoints/{os.path.basename(os.path.normpath(info.path))} IMAGES`.
"""
    atomic_write(os.path.join(info.path, "README.md"), text.encode())


if __name__ == "__main__":
    main()
