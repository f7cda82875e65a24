"""make demo: a photograph into small files at three rates and back, each decoded in a process of its own."""

import argparse
import os
import subprocess
import sys
import time

import numpy as np
from PIL import Image, ImageDraw

from goconv_tf import commands, zoo

commands.quiet_tensorflow()

OUTPUT = "demo"
RATES = (0.15, 0.4, 0.9)


def run(*args):
    """Runs the command line in a new process; returns its output and seconds."""
    begin = time.time()
    done = subprocess.run([sys.executable, "-m", "goconv_tf", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"{args[0]} failed")
    return done.stdout, time.time() - begin


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    from skimage import data

    models = zoo.list_models()
    if not models:
        sys.exit("no pretrained model in " + ", ".join(zoo.zoo_folders()))
    model = next((info for info in models if info.name == "variable-rate-small-mse"), models[0])
    os.makedirs(OUTPUT, exist_ok=True)
    original = os.path.join(OUTPUT, "coffee.png")
    picture = data.coffee()
    Image.fromarray(picture).save(original)
    print(f"{model.name}: scikit-image's `coffee`, {picture.shape[1]} x {picture.shape[0]}, {os.path.getsize(original)} bytes as PNG\n")
    print("  bytes     bpp   PSNR dB   MS-SSIM   compress s   decompress s")

    from goconv_tf import metrics

    shown = [("original", picture)]
    for rate in RATES:
        stream, decoded = (os.path.join(OUTPUT, f"coffee-{rate}{extension}") for extension in (".gcv", ".png"))
        encoded, encoding = run("compress", original, stream, "--model", model.name, "--target_bpp", str(rate), "--verify")
        output, decoding = run("decompress", stream, decoded)
        if encoded.split()[-1] != output.split()[-1]:
            sys.exit(f"the decoded picture is not the one that compress saw: {output.strip()}")
        result = np.asarray(Image.open(decoded))
        size = os.path.getsize(stream)
        bpp, psnr = 8 * size / (picture.shape[0] * picture.shape[1]), metrics.psnr(picture, result)
        print(f"{size:7d}  {bpp:.4f}  {psnr:8.2f}  {metrics.ms_ssim(picture, result):8.4f}  {encoding:11.1f}  {decoding:13.1f}", flush=True)
        shown.append((f"{size} bytes, {bpp:.3f} bpp, {psnr:.2f} dB", result))

    path = os.path.join(OUTPUT, "side_by_side.png")
    height, width = picture.shape[:2]
    sheet = Image.new("RGB", (2 * width, 2 * (height + 24)), "white")
    for k, (text, part) in enumerate(shown):
        left, top = k % 2 * width, k // 2 * (height + 24)
        sheet.paste(Image.fromarray(part), (left, top + 24))
        ImageDraw.Draw(sheet).text((left + 6, top + 6), text, fill="black")
    sheet.save(path)
    print("\nSeconds are those of whole processes, with the search for the rate; decoded pictures are the ones that compress verified.")
    print(f"Side by side: {path}")


if __name__ == "__main__":
    main()
