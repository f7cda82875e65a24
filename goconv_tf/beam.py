"""Archives through Apache Beam: python -m goconv_tf.beam COMMAND; --help lists the commands."""

import argparse
import sys

from goconv_tf import commands
from goconv_tf.arguments import add_allow_truncated, add_entropy_coder, add_rate, add_size_limit
from goconv_tf.errors import UsageError

STATUS_DEAD_LETTERS = 3

EPILOG = f"""Every input ends as a file under --output, in its folder below the pattern's fixed part, or as a line of _dead_letters.jsonl
(path, reason). _metrics.jsonl has a line for each file (path, output, bytes, bpp, lmbda, ...), _summary.json counts and means. Files
appear when they are whole: the same command again does what is missing, tries dead letters again and writes the reports anew. Runs that
write to the same folder at the same time are not supported. Exit status: 0 if all was done, {STATUS_DEAD_LETTERS} if there are dead
letters, 1 for errors, 2 for missing or malformed arguments. All other flags are Beam's, such as --runner (default: Beam's local one, FnApiRunner),
--direct_num_workers=4 --direct_running_mode=multi_processing. Other machines need this package and the model under the same name."""


def make_parser():
    parser = argparse.ArgumentParser(prog="python -m goconv_tf.beam", description="Archives through Apache Beam.", epilog=EPILOG, allow_abbrev=False)
    sub = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("compress", "Pictures to .gcv files."),
        ("decompress", ".gcv files to PNG pictures."),
        ("evaluate", "Pictures to their rate and distortion, coded and decoded again: a .json file each."),
    ):
        p = sub.add_parser(name, help=text, description=text, epilog=EPILOG, allow_abbrev=False)
        p.add_argument("--input", required=True, metavar="GLOB", help="Files, on any of Beam's filesystems: * stays in a folder, ** does not.")
        p.add_argument("--output", required=True, metavar="DIR", help="Folder for the outputs and reports, on any of Beam's filesystems.")
        add_size_limit(p)
        if name == "decompress":
            p.add_argument("--model", help="Zoo name or model folder, if the zoo does not have the model.")
            p.add_argument("--layers", type=int, help="Decode only the first so many layers of scalable streams.")
            add_allow_truncated(p)
            continue
        p.add_argument("--model", required=True, help="Zoo name or model folder.")
        add_rate(p)
        add_entropy_coder(p)
    return parser


def main(argv=None):
    """The command; returns the exit status."""
    args, rest = make_parser().parse_known_args(argv)
    try:
        from goconv_tf import archive
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("apache_beam"):
            raise
        raise UsageError("Apache Beam is not installed: pip install 'apache-beam~=2.69'") from None
    settings = vars(args)
    pattern = settings.pop("input")
    options = archive.make_options(rest)
    summary = archive.run(archive.make_task(**settings), pattern, options)
    rate = f", {summary['bpp_overall']:.4f} bpp" if summary["bpp_overall"] else ""
    print(f"{args.output}: {summary['done']} of {summary['inputs']} done{rate}, {summary['dead_letters']} dead letters")
    return STATUS_DEAD_LETTERS if summary["dead_letters"] else 0


if __name__ == "__main__":
    commands.quiet_tensorflow()
    sys.exit(commands.status_of(main))
