"""The CRPE paper's figures: rate-distortion on Kodak (and Tecnick), BD-rates, the latents' shares, what each ablation costs.

    python experiments/tables/crpe.py KODAK --models crpe-small-mse-0.003 crpe-small-mse-0.01 crpe-small-mse-0.03 [--tecnick TECNICK]

Models whose settings differ in lambda only, and that were trained for the same distortion, make one curve. Writes crpe.md,
tables/crpe.json and crpe-kodak.png (crpe-tecnick.png; crpe.png of other pictures) to --output. Ours are whole files, really coded
and decoded; the other codecs' curves are published ones.
"""

import argparse
import dataclasses
import os
from typing import NamedTuple

from common import cell, markdown, measure, provenance, run, write_json

from goconv_tf import evaluation, plots, published, zoo
from goconv_tf.errors import UsageError
from goconv_tf.files import atomic_write
from goconv_tf.presets import CRPEConfig

REFERENCES = {
    "kodak": ("jpeg", "jpeg2000", "bmshj2018-hyperprior-mse", "bpg444", "mbt2018-mean-mse", "cheng2020-anchor-mse", "vtm"),
    "tecnick": ("jpeg420", "j2k", "balle-2018-iclr-opt-mse", "bpg444", "minnen-2018-neurips-opt-mse"),
}
SWITCHES = ("second_hyper", "crpe_z", "crpe_y", "separate_fusion", "if_weight")


class Setting(NamedTuple):
    """What a curve's models have in common. config: of all but lambda; distortion: what they were trained for."""

    config: CRPEConfig
    distortion: str = "mse"


def setting(info):
    return Setting(dataclasses.replace(info.config, lmbda=1.0), (info.card.get("training") or {}).get("distortion", "mse"))


def fullness(group):
    """How near a setting is to the paper's; the one that others' switches are compared with has most of it."""
    c = group.config
    return c.second_hyper, c.crpe_z, c.crpe_y, not c.separate_fusion, c.if_weight == CRPEConfig().if_weight, group.distortion == "mse"


def changes(config, full):
    """Names of the settings, other than lambda, that `full` has otherwise."""
    return [f.name for f in dataclasses.fields(config) if f.name != "lmbda" and getattr(config, f.name) != getattr(full, f.name)]


def title(group, full):
    """The curve's name: N, switches that are not as in the paper, and what else it has otherwise than `full`."""
    config, paper = group.config, CRPEConfig()
    implied = {"filters", *(["latents"] if all(c.latents == c.filters for c in (config, full.config)) else [])}
    differing = [name for name in changes(config, full.config) if name not in implied.union(SWITCHES)]
    differing += [name for name in SWITCHES if getattr(config, name) != getattr(paper, name)]
    texts = [] if group.distortion == "mse" else [group.distortion]
    texts += [f"{name} {format(value, 'g') if isinstance(value := getattr(config, name), float) else value}" for name in differing]
    return f"CRPE N={config.filters}" + (f" ({', '.join(texts)})" if texts else "")


def is_switched(group, full):
    """Whether the two differ in switches alone."""
    return group.distortion == full.distortion and set(changes(group.config, full.config)) <= set(SWITCHES)


def curve(name, group):
    """Operating points of single-rate models as one curve, as `evaluation.read_results` gives it."""
    points = {
        metric: [(d["results"]["bpp"][0], d["results"][metric][0]) for _, d in group]
        for metric in ("psnr-rgb", "ms-ssim-rgb", "psnr-yuv", "ms-ssim-y")
    }
    points = {metric: sorted((rate, value) for rate, value in found if value is not None) for metric, found in points.items()}
    return {"name": name, "results": points, "meta": {"pictures": group[0][1]["meta"]["pictures"]}}


def bd_rates(ours, references):
    rows = [[other["name"], *(evaluation.bd_rate_cell(other, ours, metric) for metric in ("psnr-rgb", "ms-ssim-rgb"))] for other in references]
    return markdown([f"BD-rate of {ours['name']} against", "PSNR RGB", "MS-SSIM RGB"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="Folder of pictures; published curves are drawn beside ours if it is called after Kodak.")
    parser.add_argument("--models", nargs="+", required=True, help="Zoo names or folders of CRPE models.")
    parser.add_argument("--tecnick", help="Folder of the Tecnick pictures.")
    parser.add_argument("--output", default="results", help="Folder for the tables and plots (default: %(default)s).")
    args = parser.parse_args()
    infos = {info.name: info for info in map(zoo.find_model, args.models)}
    for name, info in infos.items():
        if info.model != "crpe":
            raise UsageError(f"{name} is a {info.model}, not a crpe")
    for folder in filter(None, (args.images, args.tecnick)):
        if not os.path.isdir(folder):
            raise UsageError(f"{folder}: no such folder")
    text, data = ["# CRPE: whole files coded and decoded\n"], {}
    for dataset, images in (("kodak", args.images), ("tecnick", args.tecnick)):
        if not images:
            continue
        output = args.output if dataset == "kodak" else os.path.join(args.output, "tecnick")
        models = measure(args.models, images, output)
        groups = {}
        for name, found in models.items():
            groups.setdefault(setting(infos[name]), []).append((infos[name].config.lmbda, found))
        groups = {key: sorted(group, key=lambda pair: pair[0]) for key, group in groups.items()}
        full = max(groups, key=lambda group: (len(groups[group]) > 1, fullness(group), len(groups[group])))
        curves = {key: curve(title(key, full), group) for key, group in groups.items()}
        count = next(iter(models.values()))["meta"]["pictures"]
        known = dataset != "kodak" or published.is_of(dataset, images)  # other pictures than the published figures' may be given
        references = [published.curve(dataset, name) for name in REFERENCES[dataset]] if known else []
        heading = dataset.capitalize() if known else f"`{images}`"
        text += [f"## {heading}, mean of {count} pictures\n", provenance(models)]
        rows = []
        for key, group in groups.items():
            for lmbda, found in group:
                r = {name: values[0] for name, values in found["results"].items()}
                specs = {"bpp": ".4f", "bpp-estimated": ".4f", "psnr-rgb": ".3f", "psnr-yuv": ".3f", "ms-ssim-rgb": ".5f"}
                measures = [cell(r[name], spec) for name, spec in specs.items()]
                rows.append([curves[key]["name"], f"{lmbda:g}", *measures, f"{r['encoding_time']:.2f}", f"{r['decoding_time']:.2f}"])
        text.append(markdown(["model", "lambda", "bpp", "estimated", "PSNR RGB", "PSNR YUV", "MS-SSIM RGB", "encoding, s", "decoding, s"], rows))
        text += [bd_rates(ours, references) for ours in curves.values() if references]
        latents = full.config.layers[0]
        rows = []
        for lmbda, found in groups[full]:
            bits = [found["results"][f"bpp-{name}"][0] for name in latents]
            rows.append([f"{lmbda:g}", *(f"{100 * b / sum(bits):.2f} %" for b in bits)])
        text += ["Share of the bits in each latent:\n", markdown(["lambda", *latents], rows)]
        rows = []
        for key in groups:
            if key == full or not is_switched(key, full):
                continue
            if len(groups[key]) < 3:  # no curve that BD-rate takes, but points beside one
                points = [curve(curves[key]["name"], [member]) for member in groups[key]]
                cost = ", ".join(evaluation.bits_at_equal_quality(curves[full], point) for point in points)
            else:
                cost = evaluation.bd_rate_cell(curves[full], curves[key], "psnr-rgb", digits=2)
            rows.append([curves[key]["name"], cost, ", ".join(f"{lmbda:g}" for lmbda, _ in groups[key])])
        if rows:
            text += [
                f"What a switch costs: bits at equal PSNR against {curves[full]['name']}.\n",
                markdown(["switch", "bits", "lambdas"], rows),
            ]
        plot = os.path.join(args.output, f"crpe-{dataset}.png" if known else "crpe.png")
        plots.rate_distortion(plot, [*curves.values(), *references])
        data[dataset if known else "pictures"] = {c["name"]: c["results"] for c in curves.values()}
    atomic_write(os.path.join(args.output, "crpe.md"), "\n".join(text).encode())
    write_json(args.output, "crpe", data)
    print(os.path.join(args.output, "crpe.md"))


if __name__ == "__main__":
    run(main)
