"""The CRPE paper's figures: rate-distortion on Kodak (and Tecnick), BD-rates, the latents' shares, what each ablation costs.

    python experiments/tables/crpe.py KODAK --models crpe-small-mse-0.003 crpe-small-mse-0.01 crpe-small-mse-0.03 [--tecnick TECNICK]

Models whose settings differ in lambda only make one curve. Writes crpe.md, tables/crpe.json and crpe-kodak.png
(crpe-tecnick.png; crpe.png of other pictures) to --output.
Ours are whole files, really coded and decoded; the other codecs' curves are published ones.
"""

import argparse
import dataclasses
import os

from common import markdown, measure, provenance, run, write_json

from goconv_tf import evaluation, plots, published, zoo
from goconv_tf.errors import GoConvError, UsageError
from goconv_tf.files import atomic_write

REFERENCES = {
    "kodak": ("jpeg", "jpeg2000", "bmshj2018-hyperprior-mse", "bpg444", "mbt2018-mean-mse", "cheng2020-anchor-mse", "vtm"),
    "tecnick": ("jpeg420", "j2k", "balle-2018-iclr-opt-mse", "bpg444", "minnen-2018-neurips-opt-mse"),
}
SWITCHES = ("second_hyper", "crpe_z", "crpe_y", "separate_fusion", "if_weight")


def setting(config):
    """What a curve's models have in common: all but lambda."""
    return dataclasses.replace(config, lmbda=1.0)


def changes(config, full):
    """Names of the settings, other than lambda and N, that `full` has otherwise."""
    names = (field.name for field in dataclasses.fields(config) if field.name not in ("filters", "lmbda"))
    return [name for name in names if getattr(config, name) != getattr(full, name)]


def title(config, full):
    """The curve's name: N, and what else it has otherwise."""
    changed = [f"{name} {getattr(config, name)}" for name in changes(config, full)]
    return f"CRPE N={config.filters}" + (f" ({', '.join(changed)})" if changed else "")


def is_switched(config, full):
    """Whether the two differ in switches alone."""
    return config.filters == full.filters and set(changes(config, full)) <= set(SWITCHES)


def curve(name, group):
    """Operating points of single-rate models as one curve, as `evaluation.read_results` gives it."""
    points = {
        metric: [(d["results"]["bpp"][0], d["results"][metric][0]) for _, d in group]
        for metric in ("psnr-rgb", "ms-ssim-rgb", "psnr-yuv", "ms-ssim-y")
    }
    points = {metric: sorted((rate, value) for rate, value in found if value is not None) for metric, found in points.items()}
    return {"name": name, "results": points}


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
    configs = {info.name: info.config for info in map(zoo.find_model, args.models)}
    for name, config in configs.items():
        if config.model != "crpe":
            raise UsageError(f"{name} is a {config.model}, not a crpe")
    text, data = ["# CRPE: whole files coded and decoded\n"], {}
    for dataset, images in (("kodak", args.images), ("tecnick", args.tecnick)):
        if not images:
            continue
        output = args.output if dataset == "kodak" else os.path.join(args.output, "tecnick")
        models = measure(args.models, images, output)
        groups = {}
        for name, found in models.items():
            groups.setdefault(setting(configs[name]), []).append((configs[name].lmbda, found))
        groups = {key: sorted(group, key=lambda pair: pair[0]) for key, group in groups.items()}
        full = max(groups, key=lambda c: (c.second_hyper, c.crpe_z, c.crpe_y, len(groups[c])))
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
                similarity = None if r["ms-ssim-rgb"] is None else f"{r['ms-ssim-rgb']:.5f}"
                measures = [f"{r['bpp']:.4f}", f"{r['bpp-estimated']:.4f}", f"{r['psnr-rgb']:.3f}", f"{r['psnr-yuv']:.3f}", similarity]
                rows.append([curves[key]["name"], f"{lmbda:g}", *measures, f"{r['encoding_time']:.2f}", f"{r['decoding_time']:.2f}"])
        text.append(markdown(["model", "lambda", "bpp", "estimated", "PSNR RGB", "PSNR YUV", "MS-SSIM RGB", "encoding, s", "decoding, s"], rows))
        text += [bd_rates(ours, references) for ours in curves.values() if references]
        latents = full.layers[0]
        rows = []
        for lmbda, found in groups[full]:
            bits = [found["results"][f"bpp-{name}"][0] for name in latents]
            rows.append([f"{lmbda:g}", *(f"{100 * b / sum(bits):.2f} %" for b in bits)])
        text += ["Share of the bits in each latent:\n", markdown(["lambda", *latents], rows)]
        rows = []
        for key in groups:
            if key == full or not is_switched(key, full):
                continue
            try:
                cost = f"{evaluation.bd_rate(curves[full], curves[key]).rate:+.2f} %"
            except GoConvError as error:
                cost = str(error)
            rows.append([curves[key]["name"], cost, *(f"{lmbda:g}" for lmbda, _ in groups[key][:1])])
        if rows:
            text += [
                f"What a switch costs: bits at equal PSNR against {curves[full]['name']}.\n",
                markdown(["switch", "BD-rate", "from lambda"], rows),
            ]
        plot = os.path.join(args.output, f"crpe-{dataset}.png" if known else "crpe.png")
        plots.rate_distortion(plot, [*curves.values(), *references])
        data[dataset if known else "pictures"] = {c["name"]: c["results"] for c in curves.values()}
    atomic_write(os.path.join(args.output, "crpe.md"), "\n".join(text).encode())
    write_json(args.output, "crpe", data)
    print(os.path.join(args.output, "crpe.md"))


if __name__ == "__main__":
    run(main)
