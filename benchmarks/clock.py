"""What both sides of a comparison measure themselves with. Standard library only."""

import json
import resource
import statistics
import sys
import time

_seconds = {"entropy": 0.0}


def entropy_coding(method):
    """The method, its time counted as that of entropy coding."""

    def call(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            _seconds["entropy"] += time.perf_counter() - begin

    return call


def measure(action):
    """(action(), {"seconds", "entropy", "network": wall-clock seconds of all of it, of entropy coding, of the rest})."""
    _seconds["entropy"] = 0.0
    begin = time.perf_counter()
    result = action()
    total = time.perf_counter() - begin
    return result, {"seconds": total, "entropy": _seconds["entropy"], "network": total - _seconds["entropy"]}


def answer_requests(answer):
    """A JSON request a line in, answer(request) a line out, with the most memory the process had."""
    for line in sys.stdin:
        result = answer(json.loads(line))
        print(json.dumps({**result, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)


def repeat(actions, count):
    """{name: median seconds} of `count` calls of each action, taking turns, after one that is not counted."""
    for action in actions.values():
        action()
    seconds = {name: [] for name in actions}
    for _ in range(count):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}
