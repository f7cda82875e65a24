"""Scalable RNN codec (Su et al., ICIP 2020): the original's commands.

    python experiments/rnn.py train
    python experiments/rnn.py --batchsize 1 compress xxx.png compressed.bin
    python experiments/rnn.py --batchsize 1 decompress compressed.bin decompressed.png

Flags may stand before or after the command. `compress` prints the original's figures after each iteration.
`python -m goconv_tf.train --model scalable_rnn` has more flags for training, `python -m goconv_tf` for coding.
"""

import math

from absl import app
from absl.flags import argparse_flags

from goconv_tf import bitstream, codec, commands, metrics, picture_io, zoo
from goconv_tf.errors import GoConvError, UsageError
from goconv_tf.files import atomic_write

argparse = argparse_flags.argparse


def _flags(parser, defaults):
    """All flags of the original's parser; in subcommands without defaults, so that a value given before stays."""

    def add(*names, default=None, text="", **kwargs):
        parser.add_argument(*names, default=default if defaults else argparse.SUPPRESS, help=f"{text} (default: {default})", **kwargs)

    add("--verbose", "-V", default=False, action="store_true", text="Let TensorFlow speak; verify what compress writes.")
    add("--num_filters", type=int, default=0, text="Channels of the latents and of the hyper networks, for train; 0: the preset's, 128 of paper.")
    add("--checkpoint_dir", default="train", text="Training folder; for coding also a model folder or zoo name.")
    add(
        "--iter", type=int, default=None, text="Layers: train so many (default 4; at most 7 without --lambdas), code or decode so many (default all)."
    )
    add("--train_glob", default="images/*.png", text="Pattern of training pictures.")
    add("--batchsize", type=int, default=4, text="Batch size for train; without effect otherwise.")
    add("--patchsize", type=int, default=256, text="Side of the training patches.")
    add("--last_step", type=int, default=400_000, text="Train up to this step.")
    add("--preprocess_threads", type=int, default=16, text="Without effect: two threads keep up.")
    add("--lambdas", default="", text="Lagrangian of each layer, separated by commas; empty: 0.01, doubled from layer to layer.")
    add("--distortion", choices=("mse", "ms-ssim"), default="mse", text="What the loss measures.")
    add("--preset", default="paper", text="Widths: paper, base, small or tiny, for train.")
    add("--lr", type=float, default=1e-4, text="Adam's learning rate.")


def make_parser():
    parser = argparse_flags.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _flags(parser, True)
    sub = parser.add_subparsers(dest="command", required=True)
    for name, text in (("train", "Train, or go on training."), ("compress", "Compress a picture."), ("decompress", "Decompress a file.")):
        p = sub.add_parser(name, help=text, description=text)
        _flags(p, False)
        if name != "train":
            p.add_argument("input_file")
            extension = ".tfci" if name == "compress" else ".png"
            p.add_argument("output_file", nargs="?", help=f"Default: the input's name with {extension} appended.")
    return parser


def train(args):
    from goconv_tf import training

    try:
        lambdas = tuple(float(value) for value in args.lambdas.split(",")) if args.lambdas else ()
    except ValueError:
        raise UsageError(f"--lambdas takes numbers separated by commas, not {args.lambdas}") from None
    iterations = 4 if args.iter is None else args.iter
    if iterations < 1:
        raise UsageError(f"--iter must be 1 at least, not {iterations}")
    lambdas = lambdas or tuple(0.01 * 2**k for k in range(iterations))
    if args.iter is not None and len(lambdas) != iterations:
        raise UsageError(f"--lambdas has {len(lambdas)} values for {iterations} iterations")
    options = training.Options(
        model="scalable_rnn",
        preset=args.preset,
        num_filters=args.num_filters,
        lambdas=lambdas,
        distortion=args.distortion,
        train_glob=(args.train_glob,),
        checkpoint_dir=args.checkpoint_dir,
        patchsize=args.patchsize,
        batchsize=args.batchsize,
        lr=args.lr,
        last_step=args.last_step,
        flip=False,
        ema=0.0,
    )
    training.train(options)
    return 0


def compress(args):
    """Writes one file with all layers; prints the original's lines after each iteration."""
    commands.check_output(args.output_file, args.input_file)
    commands.check_replaceable(args.output_file)
    model = zoo.load_pretrained(args.checkpoint_dir)
    picture = picture_io.read_picture(args.input_file)
    result = codec.compress(model, picture, reconstruct=True, layers=args.iter)
    if args.verbose and (codec.decompress(model, result.data) != result.reconstruction).any():
        raise GoConvError("verification failed: the decoded picture is not the encoder's; nothing was written")
    bits = codec.estimate(model, picture)
    pixels = picture.shape[0] * picture.shape[1]
    estimated = 0.0
    sizes = bitstream.unpack(result.data, picture_io.MAX_PIXELS).layer_bytes()
    for names, shown, size in zip(model.config.layers, result.pictures, sizes):
        estimated += sum(bits[name] for name in names) / pixels
        ms_ssim = metrics.ms_ssim(picture, shown)
        print(f"Mean squared error: {metrics.mse(picture, shown):0.4f}")
        print(f"PSNR (dB): {metrics.psnr(picture, shown):0.2f}")
        if math.isnan(ms_ssim):
            print("Multiscale SSIM: not defined under 161 pixels a side")
        else:
            print(f"Multiscale SSIM: {ms_ssim:0.4f}")
            print(f"Multiscale SSIM (dB): {metrics.decibels(ms_ssim):0.2f}")
        print(f"Information content in bpp: {estimated:0.4f}")
        print(f"Actual bits per pixel: {8 * size / pixels:0.4f}", flush=True)
    atomic_write(args.output_file, result.data)
    return 0


def command(args):
    """Runs the command that was asked for; returns the exit status."""
    if args.command == "train":
        return train(args)
    commands.check_kind(args.checkpoint_dir, "scalable_rnn")
    if args.command == "compress":
        args.output_file = args.output_file or args.input_file + ".tfci"
        return compress(args)
    return commands.decompress([args.input_file] + [args.output_file] * (args.output_file is not None), args.checkpoint_dir, layers=args.iter)


def main(args):
    if not args.verbose:
        commands.quiet_tensorflow()
    return commands.status_of(command, args)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: make_parser().parse_args(argv[1:]))
