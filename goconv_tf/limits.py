"""A bound on the time that decoding may take, whatever a stream claims."""

import contextlib
import contextvars
import time
from typing import Optional

from goconv_tf.errors import BitstreamError

_deadline: contextvars.ContextVar = contextvars.ContextVar("deadline", default=None)


@contextlib.contextmanager
def seconds(limit: Optional[float]):
    """Inside, `check` raises once `limit` seconds have passed; None: never."""
    token = _deadline.set(None if limit is None else (time.monotonic() + limit, limit))
    try:
        yield
    finally:
        _deadline.reset(token)


def check() -> None:
    """BitstreamError if the time is over. Called between the pieces of the work: layers, latents, blocks of symbols, tiles."""
    deadline = _deadline.get()
    if deadline and time.monotonic() > deadline[0]:
        raise BitstreamError(f"decoding takes longer than the limit of {deadline[1]:g} s (see --max_seconds)")
