"""Arguments that several commands take."""

from goconv_tf import bitstream, picture_io


def positive(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def count(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def pixels(text):
    """Of megapixels."""
    megapixels = positive(text)
    if not 1e-6 <= megapixels <= 1e9:
        raise ValueError
    return round(megapixels * 1e6)


positive.__name__, count.__name__, pixels.__name__ = "positive number", "positive whole number", "number from 1e-6 to 1e9"  # in argparse's messages


def add_size_limit(parser):
    parser.add_argument(
        "--max_megapixels",
        dest="max_pixels",
        metavar="MAX_MEGAPIXELS",
        type=pixels,
        default=picture_io.MAX_PIXELS,
        help=f"Refuse pictures and files that claim more than this (default: {picture_io.MAX_PIXELS / 1e6:g}).",
    )


def add_tile(parser):
    parser.add_argument(
        "--tile",
        type=int,
        help="Side of the tiles that large pictures are computed in, a multiple of 128 pixels; 0: never (default: as memory asks for).",
    )


def add_allow_truncated(parser):
    parser.add_argument(
        "--allow_truncated", action="store_true", help="Take the whole layers of a scalable stream that is cut short or damaged after them."
    )


def add_rate(parser):
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--lmbda", type=positive, help="Lagrangian: higher means better pictures and larger files (default: the middle of the model's range)."
    )
    rate.add_argument(
        "--target_bpp", type=positive, help="Bits per pixel that each file shall have, within 1 %%; of a scalable model, shall not exceed."
    )
    rate.add_argument("--layers", type=int, help="How many layers of a scalable model to code (default: all).")


def add_entropy_coder(parser):
    parser.add_argument("--entropy_coder", choices=bitstream.CODER_NAMES, default="tfc", help="Range coder to use (default: %(default)s).")


def add_refine(parser):
    parser.add_argument(
        "--refine",
        metavar="STEPS",
        type=count,
        default=0,
        help="Optimise the latents for each picture in so many steps first, such as 200: smaller files, minutes a picture (default: none).",
    )


def add_evaluation(parser):
    parser.add_argument("--output", default="results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--jobs", type=count, default=1, help="Processes; with more than one, seconds mean little (default: %(default)s).")
    parser.add_argument("--per_image", action="store_true", help="Also write per_image/NAME/PICTURE.json, as CompressAI does.")
    parser.add_argument("--csv", dest="as_csv", action="store_true", help="Also write csv/, in tensorflow/compression's form.")
