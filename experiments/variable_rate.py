"""Variable-rate modulated GoConv (arXiv 2009.13074): train, compress, decompress.

    python experiments/variable_rate.py --num_filters 448 --checkpoint_dir runs/vr train --train_glob 'photos/*'
    python experiments/variable_rate.py --checkpoint_dir runs/vr compress in.png out.gcv --target_bpp 0.5
    python experiments/variable_rate.py --checkpoint_dir runs/vr decompress out.gcv out.png

The defaults of `train` are the paper's: 256-pixel patches, batch 12, rate 4e-4, 2,000,000 steps,
D = 0.9 MSE + 0.1 (1 - MS-SSIM). `python -m goconv_tf.train` has more flags.
"""

from absl import app
from absl.flags import argparse_flags

from goconv_tf import commands

# Lambda sets of the paper; low, middle and high rates.
LAMBDAS = {
    "low": (1e-6, 5e-6, 1e-5, 3e-5, 7e-5, 1e-4, 3e-4, 7e-4, 1e-3, 3e-3, 5e-3),
    "middle": (1e-4, 3e-4, 7e-4, 1e-3, 3e-3, 5e-3, 7e-3, 0.01, 0.03, 0.05, 0.07, 0.1),
    "high": (1e-4, 3e-4, 7e-4, 1e-3, 3e-3, 5e-3, 7e-3, 0.01, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.4, 0.5),
}


def make_parser():
    parser = argparse_flags.ArgumentParser(description=__doc__, formatter_class=argparse_flags.argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbose", "-V", action="store_true", help="Let TensorFlow speak; verify what compress writes.")
    parser.add_argument("--num_filters", type=int, default=448, help="N, filters per layer, for train (default: %(default)s).")
    parser.add_argument("--num_latents", type=int, default=0, help="M, channels of y, for train; 0 means N.")
    parser.add_argument(
        "--checkpoint_dir", default="train", help="Training folder; for coding also a model folder or zoo name (default: %(default)s)."
    )
    sub = parser.add_subparsers(dest="command", required=True)
    style = {"formatter_class": argparse_flags.argparse.ArgumentDefaultsHelpFormatter}

    p = sub.add_parser("train", help="Train, or go on training.", **style)
    p.add_argument("--train_glob", default="images/*.png", help="Pattern of training pictures.")
    p.add_argument("--batchsize", type=int, default=12)
    p.add_argument("--patchsize", type=int, default=256)
    p.add_argument("--lambdas", choices=LAMBDAS, default="middle", help="The paper's lambda set for low, middle or high rates.")
    p.add_argument("--distortion", choices=("mix", "mse"), default="mix", help="D: the paper's mix of MSE and MS-SSIM, or MSE.")
    p.add_argument("--lr", type=float, default=4e-4, help="Adam's learning rate.")
    p.add_argument("--last_step", type=int, default=2_000_000)

    p = sub.add_parser("compress", help="Compress a picture.", **style)
    p.add_argument("input_file")
    p.add_argument("output_file", nargs="?", help="Default: the input's name with .gcv appended.")
    p.add_argument("--lmbda", type=float)
    p.add_argument("--target_bpp", type=float)

    p = sub.add_parser("decompress", help="Decompress a file.", **style)
    p.add_argument("input_file")
    p.add_argument("output_file", nargs="?", help="Default: the input's name with .png appended.")
    return parser


def train(args):
    from goconv_tf import training

    training.train(
        training.Options(
            model="variable_rate",
            preset="paper",
            num_filters=args.num_filters,
            num_latents=args.num_latents,
            train_glob=(args.train_glob,),
            checkpoint_dir=args.checkpoint_dir,
            lambdas=LAMBDAS[args.lambdas],
            distortion=args.distortion,
            patchsize=args.patchsize,
            batchsize=args.batchsize,
            lr=args.lr,
            last_step=args.last_step,
            flip=False,
            ema=0.0,
        )
    )
    return 0


def command(args):
    """Runs the command that was asked for; returns the exit status."""
    if args.command == "train":
        return train(args)
    files = [args.input_file] + [args.output_file] * (args.output_file is not None)
    if args.command == "compress":
        return commands.compress(files, args.checkpoint_dir, lmbda=args.lmbda, target_bpp=args.target_bpp, verify=args.verbose)
    return commands.decompress(files, args.checkpoint_dir)


def main(args):
    if not args.verbose:
        commands.quiet_tensorflow()
    return commands.status_of(command, args)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: make_parser().parse_args(argv[1:]))
