"""Command: trains any model of the library.

    python -m goconv_tf.train --model variable_rate --preset small --train_glob 'photos/*' --checkpoint_dir runs/small

Run it again with the same --checkpoint_dir to go on from the last save; flags may change in between
(patch size, rates, last step). SIGTERM and Ctrl-C save and stop; kill -9 loses the steps since the last
save. The folder then holds export/ (averaged weights, the latest) and, with --val_glob, best/; both are
model folders for `compress --model`.
"""

import dataclasses
import os

from absl import app, flags

from goconv_tf import commands
from goconv_tf.presets import TRAINING_CHOICES

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

flags.DEFINE_string("model", "variable_rate", "Model to train: variable_rate, crpe or scalable_rnn.")
flags.DEFINE_string(
    "preset",
    "small",
    "Preset of the model: paper (crpe: paper-high, paper-low), base, medium (not scalable_rnn), small or tiny. "
    "Widths and ranges of lambda: how the papers trained is in experiments/.",
)
flags.DEFINE_integer("num_filters", 0, "N, filters per layer (scalable_rnn: channels of its latents), instead of the preset's.", lower_bound=0)
flags.DEFINE_integer("num_latents", 0, "M, channels of y, instead of the preset's (or of N, when --num_filters is given).", lower_bound=0)
flags.DEFINE_multi_string(
    "set", [], "NAME=VALUE of the model's config (goconv_tf/presets.py), such as if_weight=0 or hyperprior=false. May be repeated."
)
flags.DEFINE_multi_string("train_glob", [], "Glob pattern, or folder, of training pictures (PNG, JPEG, WebP). May be repeated.")
flags.DEFINE_string("checkpoint_dir", None, "Folder of the run: saves, logs, exports.")
flags.DEFINE_string("name", None, "Name of the exported model. Default: the folder's name.")
flags.DEFINE_list(
    "lambdas",
    [],
    "Lagrangians. variable_rate: one is drawn for every training patch (default: nine that span the preset's range). "
    "crpe: one. scalable_rnn: one for each layer (default: the preset's).",
)
flags.DEFINE_enum(
    "distortion",
    "mse",
    TRAINING_CHOICES["distortion"],
    "D of the loss: MSE; 0.9 MSE + 0.1 (1 - MS-SSIM of luma), the variable-rate paper's; or 1 - MS-SSIM of RGB. The last two need patches of 176.",
)
flags.DEFINE_float(
    "balance",
    0.0,
    "Weigh samples by lambda^-balance (variable_rate): 0 as in the papers, 0.5 for equal say of all rates.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_enum(
    "quantization",
    "noise",
    TRAINING_CHOICES["quantization"],
    "Latents that the synthesis trains on: noisy, as in the papers, or rounded, with straight-through gradients. Printed rates are of noisy ones.",
)
flags.DEFINE_enum(
    "gradients",
    "float32",
    TRAINING_CHOICES["gradients"],
    "Type that gradients of convolutions are computed in; the rest is float32. bfloat16 is faster on processors with instructions for it.",
)
flags.DEFINE_integer("patchsize", 256, "Side of the training patches in pixels; a multiple of 16.", lower_bound=16)
flags.DEFINE_integer("batchsize", 8, "Patches a step, over all devices together.", lower_bound=1)
flags.DEFINE_enum("optimizer", "adam", TRAINING_CHOICES["optimizer"], "Adam, as in the papers, or SOAP (arXiv 2409.11321).")
flags.DEFINE_float("lr", 1e-4, "Learning rate.", lower_bound=0.0)
flags.DEFINE_list("lr_drops", [], "Shares of --last_step at which the rate drops, such as 0.5,0.6,0.7,0.8,0.9.")
flags.DEFINE_float("lr_drop_factor", 0.5, "What the rate is multiplied by at each drop.")
flags.DEFINE_integer("lr_warmup", 0, "Steps in which the rate rises to --lr: an optimizer's first steps know little of the loss.", lower_bound=0)
flags.DEFINE_float("clip_norm", 0.0, "Clip gradients to this global norm; 0 for not at all.", lower_bound=0.0)
flags.DEFINE_float("clip_value", 0.0, "Clip gradients by value; 0 for not at all.", lower_bound=0.0)
flags.DEFINE_float("ema", 0.999, "Decay of the averaged weights that are exported; 0 exports the last ones.", lower_bound=0.0, upper_bound=0.99999)
flags.DEFINE_integer("last_step", 1_000_000, "Train up to this step.", lower_bound=1)
flags.DEFINE_float("minutes", 0.0, "Save and stop after this many minutes; 0 for no limit.", lower_bound=0.0)
flags.DEFINE_integer("save_steps", 500, "Steps between saves.", lower_bound=1)
flags.DEFINE_multi_string("val_glob", [], "Glob pattern, or folder, of pictures that are coded whole to watch the real rate.")
flags.DEFINE_float("val_minutes", 15.0, "Minutes between such validations, and between exports; both wait for a save.", lower_bound=0.0)
flags.DEFINE_list("val_lambdas", [], "Lagrangians of the validation (variable_rate). Default: all of --lambdas.")
flags.DEFINE_string(
    "warm_start",
    "",
    "Model name or folder whose weights a new run starts from: one of the same widths, a narrower variable_rate (for variable_rate), "
    "or a variable_rate of the same widths (for crpe).",
)
flags.DEFINE_enum(
    "init",
    "random",
    TRAINING_CHOICES["init"],
    "Initial transforms: random, as in the papers, or (variable_rate, scalable_rnn) principal components of the pictures, which saves most steps.",
)
flags.DEFINE_bool("flip", True, "Mirror half of the patches.")
flags.DEFINE_float(
    "vivid",
    0.0,
    "Share of the patches whose channels are permuted and whose saturation is multiplied by 1 to 16, so that saturated colours are learned.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_integer("seed", 0, "Seed of initial weights, batches and noise.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_integer("cache_mb", 1024, "Memory for decoded training pictures, MiB.", lower_bound=0)
flags.DEFINE_enum(
    "strategy",
    "none",
    TRAINING_CHOICES["strategy"],
    "tf.distribute strategy: one device, all of this machine, or those of several machines.",
)
flags.DEFINE_enum("cluster", "auto", TRAINING_CHOICES["cluster"], "What tells multi_worker of its machines: $TF_CONFIG, a Slurm job step, or either.")
flags.DEFINE_integer("port", 8888, "Port of the first process on each host, under Slurm.", lower_bound=1, upper_bound=65000)
flags.DEFINE_bool("tensorboard", True, "Write TensorBoard scalars and reconstructions.")


def _options():
    from goconv_tf import training
    from goconv_tf.errors import UsageError

    flag_of = {"settings": "set"}
    values = {field.name: getattr(flags.FLAGS, flag_of.get(field.name, field.name)) for field in dataclasses.fields(training.Options)}
    for name in ("lambdas", "val_lambdas", "lr_drops"):
        try:
            values[name] = tuple(float(v) for v in values[name])
        except ValueError:
            raise UsageError(f"--{name} takes numbers separated by commas, not {','.join(values[name])}") from None
    for name in ("train_glob", "val_glob", "settings"):
        values[name] = tuple(values[name])
    return training.Options(**values)


def run(argv):
    from goconv_tf.errors import UsageError

    if len(argv) > 1:
        raise UsageError(f"unexpected argument {argv[1]!r}")
    options = _options()
    from goconv_tf import training

    training.train(options)


def main(argv):
    return commands.status_of(run, argv, prefix="goconv_tf.train")


if __name__ == "__main__":
    app.run(main)
