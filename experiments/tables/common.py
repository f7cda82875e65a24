"""What the table scripts share: measuring models into a results folder, Markdown tables, where figures come from."""

import json
import os
import platform
import sys

from goconv_tf import commands, evaluation
from goconv_tf.files import atomic_write

commands.quiet_tensorflow()


def measure(models, images, output):
    """{model name: results JSON} of zoo names or folders on a folder of pictures; only what is missing is measured."""
    paths = evaluation.evaluate([("model", name, "tfc", 8) for name in models], images, output)
    found = {}
    for path in paths:
        with open(path, encoding="utf-8") as f:
            data = json.load(f)
        found[data["name"]] = data
    return found


def cell(value, spec):
    """A value as a table's cell; None stays None."""
    return None if value is None else format(value, spec)


def markdown(titles, rows):
    """A table; cells that are None stay empty."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join(lines + ["| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows]) + "\n"


def write_json(output, name, data):
    """A table's numbers, in a folder of their own: RESULTS/*.json are curves."""
    os.makedirs(os.path.join(output, "tables"), exist_ok=True)
    atomic_write(os.path.join(output, "tables", f"{name}.json"), (json.dumps(data, indent=1) + "\n").encode())


def provenance(models=None):
    """Lines that say which weights, machine and command made a table."""
    lines = [f"Made by `python {' '.join(sys.argv)}`", f"on {platform.machine()} with {os.cpu_count()} cores, Python {platform.python_version()}."]
    for name, data in (models or {}).items():
        steps = data["meta"].get("steps")
        lines.append(
            f"`{name}`: fingerprint {data['meta']['fingerprint']}, {steps if steps is not None else 'an unknown number of'} steps in its last run."
        )
    return "\n".join(lines) + "\n"


def run(main):
    """Runs a script's main(); our errors become one line and status 1."""
    sys.exit(commands.status_of(main))
