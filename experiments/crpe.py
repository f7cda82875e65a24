"""CRPE (Fu et al., arXiv 2209.03353): the original's commands and flags.

    python experiments/crpe.py --num_filters 192 --checkpoint_dir runs/crpe train --train_root_dir photos --lambda 0.01 --lr_scheduling
    python experiments/crpe.py --checkpoint_dir crpe-small-mse-0.01 encode in.png [out.bitstream]
    python experiments/crpe.py --checkpoint_dir crpe-small-mse-0.01 decode in.png.bitstream [out.png]

`encode` takes a picture, or a folder of them (OUTPUT is then a folder too), writes the reconstruction beside OUT.bitstream as
OUT_rec.png, and prints measures per image and, of a folder, their averages. --checkpoint_dir is a training folder, a model
folder or a zoo name. Training defaults are the original's: batch 8, 256-pixel patches, Adam at 1e-4, gradients clipped by value to
+-0.01/lr, 1,000,000 steps; with --lr_scheduling the rate halves at 50, 60, 70, 80 and 90 % of them. Saves and summaries come
every 500 steps (there: 10,000 and 100), and have neither PSNR nor MS-SSIM of the batch.
`python -m goconv_tf.train --model crpe` has more flags for training, `python -m goconv_tf` for coding.
"""

import math
import os
import sys

from absl import app
from absl.flags import argparse_flags

from goconv_tf import codec, commands, metrics, picture_io, zoo
from goconv_tf.errors import GoConvError, UsageError, printable
from goconv_tf.files import PICTURE_EXTENSIONS, atomic_write, find_inputs

argparse = argparse_flags.argparse


def make_parser():
    parser = argparse_flags.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbose", "-V", action="store_true", help="Let TensorFlow speak.")
    parser.add_argument("--num_filters", type=int, default=192, help="N, filters per layer, for train (default: %(default)s).")
    parser.add_argument("--restore_path", help="Model to code with, or to start training from, instead of --checkpoint_dir.")
    parser.add_argument("--checkpoint_dir", default="train", help="Training folder, model folder or zoo name (default: %(default)s).")
    parser.add_argument("--if_weight", type=float, default=1.0, help="Weight of the information-fidelity loss (default: %(default)s).")
    sub = parser.add_subparsers(dest="command", required=True)
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    p = sub.add_parser("train", help="Train, or go on training.", **style)
    p.add_argument("--train_root_dir", default="images", help="Folder of training pictures.")
    p.add_argument("--batchsize", type=int, default=8)
    p.add_argument("--patchsize", type=int, default=256)
    p.add_argument("--lambda", type=float, default=0.01, dest="lmbda", help="Lagrangian.")
    p.add_argument("--last_step", type=int, default=1_000_000)
    p.add_argument("--lr", type=float, default=1e-4, help="Adam's learning rate.")
    p.add_argument("--lr_scheduling", "-lr_sch", action="store_true", help="Halve the rate at 50, 60, 70, 80 and 90 %% of --last_step.")
    p.add_argument("--preprocess_threads", type=int, default=6, help="Without effect: two threads keep up.")
    p = sub.add_parser("encode", help="Compress a picture or a folder of them.", **style)
    p.add_argument("input_file", help="Picture or folder.")
    p.add_argument("output_file", nargs="?", help="Default: the input's name with .bitstream appended.")
    p = sub.add_parser("decode", help="Decompress a file.", **style)
    p.add_argument("input_file")
    p.add_argument("output_file", nargs="?", help="Default: the input's name with .png appended.")
    return parser


def train(args):
    from goconv_tf import training

    training.train(
        training.Options(
            model="crpe",
            preset="paper-high",
            num_filters=args.num_filters,
            settings=(f"if_weight={args.if_weight!r}",),
            lambdas=(args.lmbda,),
            train_glob=(args.train_root_dir,),
            checkpoint_dir=args.checkpoint_dir,
            warm_start=args.restore_path or "",
            patchsize=args.patchsize,
            batchsize=args.batchsize,
            lr=args.lr,
            lr_drops=(0.5, 0.6, 0.7, 0.8, 0.9) if args.lr_scheduling else (),
            clip_value=0.01 / args.lr if args.lr > 0 else 0.0,
            flip=False,
            ema=0.0,
            last_step=args.last_step,
        )
    )
    return 0


_LINES = (
    ("Mean squared error", "mse", "0.4f"),
    ("RGB PSNR (dB)", "psnr-rgb", "0.2f"),
    ("YUV444 PSNR (dB)", "psnr-yuv", "0.2f"),
    ("RGB Multiscale SSIM", "ms-ssim-rgb", "0.4f"),
    ("RGB Multiscale SSIM (dB)", "ms-ssim-rgb-db", "0.2f"),
    ("Y Multiscale SSIM", "ms-ssim-y", "0.4f"),
    ("Y Multiscale SSIM (dB)", "ms-ssim-y-db", "0.2f"),
    ("Information content in bpp_h", "bpp_h", "0.4f"),
    ("Information content in bpp_l", "bpp_l", "0.4f"),
    ("Information content in bpp", "bpp_estimated", "0.4f"),
    ("Actual bits per pixel", "bpp", "0.4f"),
)


def show(row):
    for text, key, spec in _LINES:
        print(f"{text}: " + ("not defined under 161 pixels a side" if math.isnan(row[key]) else format(row[key], spec)))
    sys.stdout.flush()


def encode_one(model, source, target):
    """Codes a picture, writes the file and its reconstruction; the measures of what the file decodes to."""
    picture = picture_io.read_picture(source)
    result = codec.compress(model, picture)
    decoded = codec.decompress(model, result.data)
    bits = codec.estimate(model, picture)
    pixels = picture.shape[0] * picture.shape[1]
    estimated = {end: sum(b for name, b in bits.items() if name.endswith(end)) / pixels for end in ("high", "low")}
    row = metrics.quality(picture, decoded)
    row.update({f"{key}-db": metrics.decibels(row[key]) for key in ("ms-ssim-rgb", "ms-ssim-y")})
    row.update(bpp_h=estimated["high"], bpp_l=estimated["low"], bpp_estimated=sum(estimated.values()), bpp=result.bpp)
    atomic_write(target, result.data)
    commands.write_picture(reconstruction_of(target), decoded)
    return row


def reconstruction_of(target):
    """Where the original writes what a file decodes to."""
    return os.path.splitext(target)[0] + "_rec.png"


def averages(rows):
    """The original's: of measures; dB are those of mean MS-SSIMs and of mean squared errors of Y, U and V."""
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    for key in ("ms-ssim-rgb", "ms-ssim-y"):
        mean[f"{key}-db"] = metrics.decibels(mean[key])
    y, u, v = (-10 * math.log10(max(sum(10 ** (-row[key] / 10) for row in rows) / len(rows), 1e-300)) for key in ("psnr-y", "psnr-u", "psnr-v"))
    return {**mean, "psnr-yuv": metrics.weighted(y, u, v)}


def encode(args):
    folder = os.path.isdir(args.input_file)
    if folder:
        output = args.output_file or args.input_file
        # As for a single picture, the whole name stays.
        files = [
            (source, os.path.join(output, os.path.basename(source) + ".bitstream")) for source in find_inputs([args.input_file], PICTURE_EXTENSIONS)
        ]
        # What an earlier call wrote beside the pictures, and beside their files, is none of them.
        done = [(source, target) for source, target in files if os.path.exists(target)]
        written = {os.path.realpath(reconstruction_of(target)) for _, target in done}
        written |= {os.path.realpath(os.path.splitext(source)[0] + "_rec.png") for source, _ in done}  # as earlier versions named it
        files = [(source, target) for source, target in files if os.path.realpath(source) not in written]
        os.makedirs(output, exist_ok=True)
    else:
        files = [(args.input_file, args.output_file or args.input_file + ".bitstream")]
    for source, target in files:
        commands.check_output(target, source)
        commands.check_replaceable(target)
        reconstruction = reconstruction_of(target)
        commands.check_output(reconstruction, source)
        if os.path.exists(reconstruction) and not os.path.exists(target):
            raise UsageError(f"{reconstruction}: is there already, and no earlier call's; name another output")
    name = args.restore_path or args.checkpoint_dir
    commands.check_kind(name, "crpe")
    model = zoo.load_pretrained(name)
    rows, failures = [], 0
    for source, target in files:
        try:
            rows.append(encode_one(model, source, target))
        except (GoConvError, OSError) as error:
            if not folder:
                raise
            failures += 1
            print(f"error: {printable(error)}", file=sys.stderr)
            continue
        if folder:
            print(printable(f"{source} -> {target}"))
        show(rows[-1])
    if folder and rows:
        print(f"Averages of {len(rows)} pictures")
        show(averages(rows))
    return 1 if failures else 0


def command(args):
    """Runs the command that was asked for; returns the exit status."""
    if args.command == "train":
        return train(args)
    if args.command == "encode":
        return encode(args)
    model = args.restore_path or args.checkpoint_dir
    commands.check_kind(model, "crpe")
    return commands.decompress([args.input_file] + [args.output_file] * (args.output_file is not None), model)


def main(args):
    if not args.verbose:
        commands.quiet_tensorflow()
    return commands.status_of(command, args)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: make_parser().parse_args(argv[1:]))
