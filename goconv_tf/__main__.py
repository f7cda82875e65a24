"""Command line: python -m goconv_tf COMMAND; --help lists the commands."""

import functools

from absl import app
from absl.flags import argparse_flags

from goconv_tf import commands
from goconv_tf.arguments import (
    add_allow_truncated,
    add_entropy_coder,
    add_evaluation,
    add_rate,
    add_refine,
    add_size_limit,
    add_tile,
    count,
    positive,
)
from goconv_tf.presets import PRESETS

evaluation_text = """Codes and decodes every picture at every operating point. Writes NAME.json in CompressAI's form (means over pictures, sorted by
bpp of whole files; MS-SSIM linear). Run again, it measures only what is missing."""


def make_parser():
    parser = argparse_flags.ArgumentParser(
        prog="python -m goconv_tf",
        description="Learned image compression with generalized octave convolutions.",
        epilog="Training: python -m goconv_tf.train --help. Models: " + ", ".join(PRESETS) + ".",
    )
    sub = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    p = sub.add_parser(
        "compress",
        help="Pictures to compressed files.",
        description="Compresses pictures that Pillow reads; prints bytes, bits per pixel and lambda.",
    )
    p.add_argument("inputs", nargs="+", metavar="input", help="IN.png [OUT.gcv]; or several files, or a folder, with --output_dir.")
    p.add_argument("--model", required=True, help="Zoo name (see the models command), model folder, training folder or hf://ORGANISATION/NAME.")
    p.add_argument("--output_dir", help="Folder for the compressed files; made if missing.")
    add_rate(p)
    add_entropy_coder(p)
    p.add_argument(
        "--exact", action="store_true", default=True, help="Compute entropy parameters with integers: every machine decodes the file (default)."
    )
    p.add_argument("--noexact", dest="exact", action="store_false", help="Compute them in floating point, for research; the file says so.")
    p.add_argument(
        "--verify",
        action="store_true",
        help="Decode each file before it is written; print PSNR, MS-SSIM and a hash of the pixels; on other machines some may differ by a level.",
    )
    add_size_limit(p)
    add_tile(p)
    add_refine(p)
    p.set_defaults(run=commands.compress)

    p = sub.add_parser(
        "decompress", help="Compressed files to pictures.", description="Decodes files that compress wrote; the model is found by what the file says."
    )
    p.add_argument("inputs", nargs="+", metavar="input", help="IN.gcv [OUT.png]; or several files, or a folder, with --output_dir.")
    p.add_argument("--model", help="Zoo name, model folder, training folder or hf://ORGANISATION/NAME, if the zoo does not have the model.")
    p.add_argument("--output_dir", help="Folder for the pictures; made if missing.")
    add_size_limit(p)
    p.add_argument("--layers", type=int, help="Decode only the first so many layers of a scalable stream.")
    add_allow_truncated(p)
    p.add_argument("--region", nargs=4, type=int, metavar=("X", "Y", "W", "H"), help="Only this part of the picture, pixels.")
    add_tile(p)
    p.add_argument("--max_seconds", type=positive, default=3600.0, help="Give up a file that takes longer to decode (default: %(default)g).")
    p.add_argument("--force", action="store_true", help="Write a picture even where checksums are wrong; say what is.")
    p.set_defaults(run=commands.decompress)

    p = sub.add_parser(
        "truncate", help="Cut a scalable stream to its first layers.", description="Cuts a scalable stream to its first layers, without decoding it."
    )
    p.add_argument("source", metavar="input", help="IN.gcv")
    p.add_argument("target", metavar="output", help="OUT.gcv")
    rate = p.add_mutually_exclusive_group(required=True)
    rate.add_argument("--layers", type=int, help="Layers to keep.")
    rate.add_argument("--target_bpp", type=positive, help="Keep as many as fit into these bits per pixel.")
    add_size_limit(p)
    p.set_defaults(run=commands.truncate)

    p = sub.add_parser("info", help="What a compressed file says of itself, as JSON.")
    p.add_argument("path", metavar="input", help="IN.gcv")
    add_size_limit(p)
    add_allow_truncated(p)
    p.set_defaults(run=commands.info)

    p = sub.add_parser("report", help="One HTML page with curves, BD-rates and pictures side by side.")
    p.add_argument("results", nargs="+", help="Results files, and published curves such as kodak:bpg444.")
    p.add_argument("-o", "--output", required=True, help="Page to write, .html.")
    p.add_argument("--images", nargs="*", default=[], help="Pictures to show, coded by the results' models and codecs.")
    p.add_argument(
        "--target_bpp",
        type=positive,
        default=0.3,
        help="Rate that the shown pictures shall not exceed by over 1 %%, where there is one so low (default: %(default)s).",
    )
    p.add_argument("--title", default="Rate and distortion")
    p.add_argument(
        "--model",
        dest="models",
        metavar="MODEL",
        action="append",
        default=[],
        help="Model folder that results are of, if the zoo does not have the model; may be repeated.",
    )
    p.set_defaults(run=commands.report)

    p = sub.add_parser("import_tf1", help="An original's TensorFlow 1 checkpoint to a model folder.")
    p.add_argument("checkpoint", help="The checkpoint's prefix, such as model.ckpt-400000, or its folder.")
    p.add_argument("--model", required=True, choices=("scalable_rnn",), help="Whose checkpoint it is.")
    p.add_argument("--output", required=True, help="Folder to write; must not exist, or be empty.")
    p.add_argument("--name", help="What streams call the model (default: the folder's name).")
    p.set_defaults(run=commands.import_tf1)

    p = sub.add_parser(
        "export",
        help="A model to a SavedModel.",
        description="Writes a SavedModel with the signatures compress, decompress and info, which needs TensorFlow and TensorFlow Compression only.",
    )
    p.add_argument("model", help="Zoo name, model folder, training folder or hf://ORGANISATION/NAME.")
    p.add_argument("output", help="Folder to write; must not exist, or be empty.")
    add_size_limit(p)
    p.set_defaults(run=commands.export)

    p = sub.add_parser("evaluate", help="Models on a folder of pictures: rate-distortion as JSON.", description=evaluation_text)
    p.add_argument("images", help="Folder of pictures.")
    p.add_argument(
        "--model", action="append", required=True, help="Zoo name, model folder, training folder or hf://ORGANISATION/NAME; may be repeated."
    )
    p.add_argument("--points", type=count, default=8, help="How many lambdas, of models that have one (default: %(default)s).")
    add_entropy_coder(p)
    add_refine(p)
    add_evaluation(p)
    p.set_defaults(run=_evaluate_models)

    p = sub.add_parser("bench_codec", help="The same for codecs in Pillow.", description=evaluation_text)
    p.add_argument("codec", choices=("jpeg", "jpeg2000", "webp", "avif"))
    p.add_argument("images", help="Folder of pictures.")
    add_evaluation(p)
    p.set_defaults(run=_evaluate_codec)

    p = sub.add_parser("bd_rate", help="Bjontegaard delta rate of two results.", description="How many percent of bits B needs more than A.")
    p.add_argument("anchor", metavar="A.json", help="Results file, or a published curve such as kodak:bpg444.")
    p.add_argument("test", metavar="B.json", help="The same.")
    p.add_argument("--metric", default="psnr-rgb", choices=("psnr-rgb", "psnr-yuv", "psnr-y", "psnr-u", "psnr-v", "ms-ssim-rgb", "ms-ssim-y"))
    p.set_defaults(run=commands.bd_rate)

    p = sub.add_parser("plot", help="Rate-distortion curves of results.")
    p.add_argument("results", nargs="+", help="Results files, and published curves such as kodak:bpg444.")
    p.add_argument("-o", "--output", required=True, help="Picture to write: .png, .pdf or .svg.")
    p.add_argument("--title", default="")
    p.add_argument("--max_bpp", type=positive, help="Right end of the rate axis.")
    p.set_defaults(run=commands.plot)

    p = sub.add_parser("models", help="Pretrained models, with sizes and rates.")
    p.add_argument("--verbose", action="store_true", help="Also print their folders and cards.")
    p.set_defaults(run=commands.models)
    return parser


def _evaluate_models(model, entropy_coder, points, refine, **more):
    return commands.evaluate([("model", name, entropy_coder, points, refine) for name in model], **more)


def _evaluate_codec(codec, **more):
    return commands.evaluate([("codec", codec)], **more)


def run(args):
    """Runs a parsed command, whose arguments are named like the function's; our errors become one line and status 1."""
    settings = vars(args)
    action = settings.pop("run")
    del settings["command"]
    commands.quiet_tensorflow()
    return commands.status_of(functools.partial(action, **settings))


if __name__ == "__main__":
    app.run(run, flags_parser=lambda argv: make_parser().parse_args(argv[1:]))
