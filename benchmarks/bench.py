"""Benchmarks: ratios of things measured by turns in one run. Writes RESULTS/SECTION.json and, from all that are there, RESULTS/README.md.

    python benchmarks/bench.py --images KODAK --photos TRAINING_PICTURES --peer_python PYTHON [SECTION ...]

PYTHON is an environment with benchmarks/requirements.txt (make bench makes it). Seconds of one machine mean little; ratios are
what to read.
"""

import argparse
import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from goconv_tf.evaluation import this_machine
from goconv_tf.files import atomic_write

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "experiments", "tables"))


class Worker:
    """A process that answers requests."""

    def __init__(self, python, script):
        command = [python, os.path.join(HERE, script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: the worker for {request} has ended")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def ours():
    return Worker(sys.executable, "goconv_worker.py")


def medians(answers):
    """Medians over answers to image requests."""
    parts = ("seconds", "network", "entropy")
    found = {f"{side} {part}": statistics.median(a[side][part] for a in answers) for side in ("encode", "decode") for part in parts}
    found["both"] = found["encode seconds"] + found["decode seconds"]
    return {**found, "peak_mb": answers[-1]["peak_mb"]}


def peer(args):
    """Encode and decode beside CompressAI's mbt2018_mean of the same N and M, untrained, by turns."""
    rows, versions = [], {}
    for quality in (5, 3):
        workers = {"CompressAI mbt2018_mean": Worker(args.peer_python, "compressai_worker.py"), "VariableRate": ours(), "CRPE": ours()}
        info = {"CompressAI mbt2018_mean": workers["CompressAI mbt2018_mean"](model="mbt2018_mean", quality=quality)}
        widths = {name: info["CompressAI mbt2018_mean"][name] for name in ("filters", "latents")}
        for name, model in (("VariableRate", "variable_rate"), ("CRPE", "crpe")):
            info[name] = workers[name](model=model, preset="base", **widths)
        answers = {name: [] for name in workers}
        for image in [args.pictures[0], *args.pictures[: args.count]]:
            for name, worker in workers.items():
                answers[name].append(worker(image=image))
        for name, worker in workers.items():
            worker.__exit__()
            versions.update(info[name]["versions"])
            macs = info[name]["macs"]
            row = {
                "codec": name,
                "N": widths["filters"],
                "M": widths["latents"],
                "gmac": (macs if isinstance(macs, int) else sum(macs.values())) / 1e9,
            }
            rows.append({**row, "parameters": info[name]["parameters"], **medians(answers[name][1:])})
        for row in rows[-3:]:
            row["ratio"] = row["both"] / rows[-3]["both"]
    return {"versions": versions, "rows": rows, "pictures": args.count}


def peak(args):
    """GFLOP/s of analysis and synthesis beside those of a matrix product."""
    rows = []
    for preset, filters in (("small", 64), ("base", 192), ("paper", 448)):
        with ours() as worker:
            worker(model="variable_rate", preset=preset)
            answer = worker(peak=args.pictures[0])
        share = {name: answer[name]["gflops"] / answer["float32"]["gflops"] for name in ("analysis", "synthesis")}
        rows.append({"N": filters, **{name: answer[name]["gflops"] for name in ("float32", "float64", "analysis", "synthesis")}, "share": share})
    return {"rows": rows}


def papers(args):
    """The papers' own sizes: variable rate at N = 448 on 1944 x 1296, the scalable RNN at its widths on 768 x 512."""
    result = {}
    with tempfile.TemporaryDirectory() as folder, ours() as worker:
        path = os.path.join(folder, "large.png")
        Image.open(args.pictures[0]).convert("RGB").resize((1944, 1296), Image.LANCZOS).save(path)
        worker(model="variable_rate", preset="paper")
        worker(image=args.pictures[0])
        result["variable_rate"] = medians([worker(image=path) for _ in range(2)])
    result["variable_rate"]["paper"] = {"encode seconds": 15.3, "decode seconds": 21.1}  # Table VI
    with ours() as worker:
        worker(model="scalable_rnn", preset="paper")
        worker(image=args.pictures[0], layers=1)
        result["scalable_rnn"] = {layers: medians([worker(image=args.pictures[0], layers=layers) for _ in range(2)]) for layers in (1, 2, 3, 4)}
    return result


def coding(args):
    """Symbols a second of the entropy coders, and their share of decoding."""
    with tempfile.TemporaryDirectory() as folder, ours() as worker, Worker(args.peer_python, "compressai_worker.py") as other:
        path = os.path.join(folder, "symbols.npz")
        worker(model=args.model)
        answer = worker(image=args.pictures[0], symbols=path)
        coders = {**answer["coders"], "CompressAI rANS": other(symbols=path)}
        codings = [worker(image=image) for image in args.pictures[: args.count]]
    share = statistics.median(a["decode"]["entropy"] / a["decode"]["seconds"] for a in codings)
    return {"symbols": answer["symbols"], "coders": coders, "share of decoding": share, "model": args.model}


def run(*command, cwd=None):
    """(seconds, peak MiB) of a command."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=cwd, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} failed: {error.decode()[-500:]}")
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


def start(args):
    """Whole processes beside importing TensorFlow; functions compiled for pictures of many sizes."""
    with tempfile.TemporaryDirectory() as folder:
        coded = os.path.join(folder, "a.gcv")
        goconv = [sys.executable, "-m", "goconv_tf"]
        commands = {
            "import tensorflow": [sys.executable, "-c", "import tensorflow"],
            "compress": [*goconv, "compress", args.pictures[0], coded, "--model", args.model],
            "decompress": [*goconv, "decompress", coded, os.path.join(folder, "a.png"), "--model", args.model],
            "info": [*goconv, "info", coded],
            "--help": [*goconv, "--help"],
        }
        seconds = {name: [] for name in commands}
        for _ in range(5):
            for name, command in commands.items():
                seconds[name].append(run(*command)[0])
    with ours() as worker:
        worker(model=args.model)
        traces = worker(sizes=24, image=args.pictures[0])["traces"]
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": found, "ratio": {name: value / found["import tensorflow"] for name, value in found.items()}, "functions after n sizes": traces}


def large(args):
    """Pictures of 2,500 to 10,000 pixels a side, drawn from those given: time per pixel, peak memory, a region."""
    tiles = [np.asarray(Image.open(path).convert("RGB")) for path in args.pictures]
    height, width = (min(tile.shape[k] for tile in tiles) for k in (0, 1))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in (2500, 5000, 10000):
            across, down = -(-side // width), -(-side // height)
            lines = [np.concatenate([tiles[(k + across * n) % len(tiles)][:height, :width] for k in range(across)], axis=1) for n in range(down)]
            picture, coded, decoded = (os.path.join(folder, name) for name in ("a.png", "a.gcv", "b.png"))
            Image.fromarray(np.concatenate(lines)[:side, :side]).save(picture, compress_level=1)
            goconv = [sys.executable, "-m", "goconv_tf"]
            row = {"side": side}
            for name, command in {
                "compress": [*goconv, "compress", picture, coded, "--model", args.model],
                "decompress": [*goconv, "decompress", coded, decoded, "--model", args.model],
                "region": [*goconv, "decompress", coded, decoded, "--model", args.model, "--region", "1000", "1000", "512", "512"],
            }.items():
                seconds, memory = run(*command)
                row[name] = {"seconds": seconds, "microseconds per pixel": 1e6 * seconds / side**2, "peak_mb": memory}
            rows.append(row)
    return {"rows": rows, "model": args.model}


def checkpoints(args):
    """Every shipped model on all pictures: what exact entropy parameters cost beside floats, and time beside JPEG 2000 at its rate."""
    rows, measured = [], {}
    path = os.path.join(args.output, "checkpoints.json")
    if args.only_changed and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            measured = {(row["fingerprint"], row["pictures"]): row for row in json.load(f)["rows"]}
    for config in sorted(glob.glob(os.path.join(os.path.dirname(HERE), "checkpoints", "*", "config.json"))):
        with open(config, encoding="utf-8") as f:
            fingerprint = json.load(f)["fingerprint"]
        if (fingerprint, len(args.pictures)) in measured:
            rows.append(measured[fingerprint, len(args.pictures)])
            continue
        answers = {"exact": [], "float": [], "JPEG 2000": []}
        with ours() as worker:
            info = worker(model=os.path.dirname(config))
            for number, image in enumerate([args.pictures[0], *args.pictures]):
                found = {"exact": worker(image=image), "float": worker(image=image, exact=False)}
                found["JPEG 2000"] = worker(image=image, jpeg2000=found["exact"]["bpp"])
                if number:
                    for name, answer in found.items():
                        answers[name].append(answer)
        exact, floats = answers["exact"], answers["float"]
        row = {"name": os.path.basename(os.path.dirname(config)), "fingerprint": fingerprint, "pictures": len(args.pictures), **where_and_when()}
        row["kmac per pixel"] = {part: macs / 512 / 768 / 1000 for part, macs in info["macs"].items()}
        row["bits"] = sum(a["bytes"] for a in exact) / sum(a["bytes"] for a in floats) - 1
        for side in ("encode", "decode"):
            row[f"{side} ratio"] = statistics.median(a[side]["seconds"] / b[side]["seconds"] for a, b in zip(exact, floats))
            row[side] = {name: statistics.median(a[side]["seconds"] for a in found) for name, found in answers.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"rows": rows}


def train(args):
    """Seconds of a training step as it is, and with TensorFlow Compression's layers and Keras' Adam as they come; bfloat16, XLA."""
    rows = []
    for model in ("variable_rate", "crpe", "scalable_rnn"):
        seconds, memory = {}, {}
        for variant in ("plain", "ours", "bfloat16", *(["xla"] if model == "variable_rate" else [])):
            if model == "scalable_rnn" and variant == "plain":
                continue  # it has no such layers
            with ours() as worker:
                answer = worker(train="small", model=model, variant=variant, batch=8, patch=128)
                seconds[variant], memory[variant] = answer["step"], answer["peak_mb"]
                print(f"{model} {variant}: {answer['step']:.3f} s, {answer['peak_mb']:.0f} MiB", flush=True)
        rows.append({"model": model, "seconds": seconds, "peak_mb": memory})
    with ours() as worker:
        batch = worker(pipeline=args.photos)["batch"]
    return {"rows": rows, "pipeline seconds per batch": batch, "pipeline share": batch / rows[0]["seconds"]["ours"]}


SECTIONS = {f.__name__: f for f in (peer, peak, papers, coding, start, checkpoints, large, train)}


def where_and_when():
    return {"machine": this_machine(), "when": time.strftime("%Y-%m-%d")}


def table(results):
    """The Markdown page of all results."""
    from common import markdown

    def number(x, digits=2):
        return f"{x:.{digits}f}"

    parts = [
        "# Benchmarks\n\nRatios of things measured by turns in one run; what follows from them: [docs/performance.md](../../docs/performance.md).\n"
    ]
    for name, data in results.items():
        parts += [f"\n## {name}\n\n{SECTIONS[name].__doc__}\n\n`{data['command']}` on {data['machine']}, {data['when']}.\n\n"]
        if name == "peer":
            titles = ["codec", "N", "M", "GMAC", "encode s", "decode s", "entropy coding s", "both, ratio to CompressAI", "peak MiB"]
            parts.append(
                markdown(
                    titles,
                    [
                        [
                            r["codec"],
                            r["N"],
                            r.get("M"),
                            number(r["gmac"], 1),
                            number(r["encode seconds"], 3),
                            number(r["decode seconds"], 3),
                            number(r["encode entropy"] + r["decode entropy"], 3),
                            number(r["ratio"]),
                            number(r["peak_mb"], 0),
                        ]
                        for r in data["rows"]
                    ],
                )
            )
        elif name == "peak":
            titles = ["N", "matrix product float32, GFLOP/s", "float64", "analysis", "synthesis", "share of float32: analysis", "synthesis"]
            rows = [
                [r["N"], *(number(r[k], 0) for k in ("float32", "float64", "analysis", "synthesis")), *(f"{v:.0%}" for v in r["share"].values())]
                for r in data["rows"]
            ]
            parts.append(markdown(titles, rows))
        elif name == "papers":
            v = data["variable_rate"]
            rows = [
                [
                    "VariableRate, N = 448, 1944 x 1296",
                    number(v["encode seconds"]),
                    number(v["decode seconds"]),
                    number(v["peak_mb"], 0),
                    "15.3 + 21.1 s",
                ]
            ]
            for layers, r in data["scalable_rnn"].items():
                rows.append(
                    [
                        f"ScalableRNN, paper, 768 x 512, {layers} layers",
                        number(r["encode seconds"]),
                        number(r["decode seconds"]),
                        number(r["peak_mb"], 0),
                        None,
                    ]
                )
            parts.append(markdown(["", "encode s", "decode s", "peak MiB", "the paper's CPU"], rows))
        elif name == "coding":
            rows = [[k, number(c["encode"] / 1e6, 1), number(c["decode"] / 1e6, 1), c["bytes"]] for k, c in data["coders"].items()]
            parts.append(markdown(["coder", "encode, million symbols/s", "decode", "bytes"], rows))
            parts.append(
                f"\n{data['symbols']} integers of y_high. Entropy coding takes {data['share of decoding']:.1%} of decoding with {data['model']}.\n"
            )
        elif name == "start":
            parts.append(markdown(["whole process", "s", "ratio"], [[k, number(v), number(data["ratio"][k])] for k, v in data["seconds"].items()]))
            traces = data["functions after n sizes"]
            parts.append(
                f"\nCompiled functions after the first picture: {traces[0]}; after {len(traces)} pictures of different sizes: {traces[-1]}.\n"
            )
        elif name == "checkpoints":
            titles = ["model", "kMAC per pixel: analysis", "entropy parameters", "synthesis"]
            titles += ["exact: bits", "exact: decoding", "encode s", "decode s", "JPEG 2000 encode s", "decode s", "machine", "when"]
            rows = [
                [
                    r["name"],
                    *(number(v, 1) for v in r["kmac per pixel"].values()),
                    f"{r['bits']:+.3%}",
                    number(r["decode ratio"]),
                    *(number(r[side][name], 3) for name in ("exact", "JPEG 2000") for side in ("encode", "decode")),
                    r["machine"],
                    r["when"],
                ]
                for r in data["rows"]
            ]
            parts.append(markdown(titles, rows))
        elif name == "large":
            rows = [
                [r["side"], k, number(r[k]["seconds"], 1), number(r[k]["microseconds per pixel"]), number(r[k]["peak_mb"], 0)]
                for r in data["rows"]
                for k in ("compress", "decompress", "region")
            ]
            parts.append(markdown(["pixels a side", "", "s", "microseconds per pixel", "peak MiB"], rows))
        elif name == "train":
            rows = [
                [
                    r["model"],
                    *(number(r["seconds"][v], 3) if v in r["seconds"] else None for v in ("plain", "ours", "bfloat16", "xla")),
                    number(r["peak_mb"]["ours"], 0),
                ]
                for r in data["rows"]
            ]
            parts.append(markdown(["small preset", "plain s", "ours s", "bfloat16 s", "XLA s", "peak MiB"], rows))
            parts.append(f"\nDrawing a batch takes {data['pipeline share']:.1%} of a variable-rate step.\n")
    return "".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS) + " (default: all)")
    parser.add_argument("--images", required=True, help="Folder of pictures (Kodak).")
    parser.add_argument("--photos", help="Folder of training pictures, for the section train.")
    parser.add_argument("--peer_python", help="Python of an environment with CompressAI, for the sections peer and coding.")
    parser.add_argument("--model", default="variable-rate-small-mse")
    parser.add_argument("--count", type=int, default=8, help="Pictures of the sections peer and coding.")
    parser.add_argument("--only_changed", action="store_true", help="Section checkpoints: keep the figures of weights that were measured before.")
    parser.add_argument("--output", default=os.path.join(HERE, "results"))
    args = parser.parse_args()
    args.pictures = sorted(glob.glob(os.path.join(args.images, "*.png")))
    wanted = args.sections or list(SECTIONS)
    if unknown := [name for name in wanted if name not in SECTIONS]:
        parser.error(f"unknown sections: {', '.join(unknown)}")
    if not args.pictures:
        parser.error(f"{args.images}: no PNG pictures")
    if {"peer", "coding"} & set(wanted) and not (args.peer_python and shutil.which(args.peer_python)):
        parser.error("the sections peer and coding need --peer_python")
    if "train" in wanted and not args.photos:
        parser.error("the section train needs --photos")
    os.makedirs(args.output, exist_ok=True)
    for name in wanted:
        print(name, flush=True)
        result = SECTIONS[name](args)
        shown = ["python benchmarks/bench.py", name, "--images KODAK"]
        shown += {"train": ["--photos PHOTOS"], "peer": ["--peer_python PYTHON"], "coding": ["--peer_python PYTHON"]}.get(name, [])
        shown += [f"--{flag} {getattr(args, flag)}" for flag in ("model", "count") if getattr(args, flag) != parser.get_default(flag)]
        shown += ["--only_changed"] if args.only_changed and name == "checkpoints" else []
        common = {"command": " ".join(shown), **where_and_when()}
        atomic_write(os.path.join(args.output, f"{name}.json"), (json.dumps({**common, **result}, indent=1) + "\n").encode())
    results = {}
    for name in SECTIONS:
        path = os.path.join(args.output, f"{name}.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                results[name] = json.load(f)
    atomic_write(os.path.join(args.output, "README.md"), table(results).encode())


if __name__ == "__main__":
    main()
