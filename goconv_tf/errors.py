"""Errors that a user can cause or meet; the commands print each as one line and exit with 1."""


class GoConvError(Exception):
    """Base of every error this library raises on purpose."""


class BitstreamError(GoConvError):
    """The file is not a stream of ours, is damaged, cut short, or claims something out of bounds."""


class ModelMismatchError(BitstreamError):
    """The stream was written by another model, or by other weights of the same model."""


class ImageError(GoConvError):
    """The picture cannot be read, or has a mode or size that is not supported."""


class CheckpointError(GoConvError):
    """A model folder is missing, incomplete or damaged."""


class RateError(GoConvError):
    """The requested rate or lambda lies outside what the model reaches."""


class DataError(GoConvError):
    """The training pictures are missing, unreadable or too small."""


class UsageError(GoConvError):
    """The command's arguments do not fit together."""


def printable(text) -> str:
    """The text, an error's or with names of files, in one line and without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))


def first_line(error) -> str:
    """What an error of TensorFlow's says, in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
