"""Training with Keras' `fit`: what is drawn, scheduled, saved and watched."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import signal
import threading
import time
import zlib
from typing import Optional, Tuple

import numpy as np
import tensorflow as tf

from goconv_tf import cluster, data, losses, memory, metrics, presets, zoo
from goconv_tf.errors import CheckpointError, DataError, GoConvError, UsageError, first_line, printable
from goconv_tf.files import alone_in, atomic_write
from goconv_tf.models import MODELS, adopt, named_weights, principal, principal_rnn, widen
from goconv_tf.optimizers import Adam, Schedule, Soap

CENTRE_STEPS = 500
SHOWN_SIDE = 512  # pixels of the first validation picture that TensorBoard shows
PRINCIPAL_STARTS = {"variable_rate": principal.principal_start, "scalable_rnn": principal_rnn.scalable_start}  # of --init pca


@dataclasses.dataclass(frozen=True)
class Options:
    """What `goconv_tf.train` takes; its flags (`python -m goconv_tf.train --help`) say what each is, with units and ranges."""

    model: str
    preset: str
    train_glob: Tuple[str, ...]
    checkpoint_dir: str
    name: Optional[str] = None
    num_filters: int = 0
    num_latents: int = 0
    settings: Tuple[str, ...] = ()
    lambdas: Tuple[float, ...] = ()
    distortion: str = "mse"
    balance: float = 0.0
    quantization: str = "noise"
    gradients: str = "float32"
    patchsize: int = 256
    batchsize: int = 8
    optimizer: str = "adam"
    lr: float = 1e-4
    lr_drops: Tuple[float, ...] = ()
    lr_drop_factor: float = 0.5
    lr_warmup: int = 0
    clip_norm: float = 0.0
    clip_value: float = 0.0
    ema: float = 0.999
    last_step: int = 1_000_000
    minutes: float = 0.0
    save_steps: int = 500
    val_glob: Tuple[str, ...] = ()
    val_minutes: float = 15.0
    val_lambdas: Tuple[float, ...] = ()
    warm_start: str = ""
    init: str = "random"
    flip: bool = True
    vivid: float = 0.0
    seed: int = 0
    cache_mb: int = 1024
    strategy: str = "none"
    cluster: str = "auto"
    port: int = 8888
    tensorboard: bool = True

    @property
    def export_name(self) -> str:
        """What the trained model is called."""
        return self.name or os.path.basename(os.path.abspath(self.checkpoint_dir))

    def check(self):
        """UsageError for values that cannot work."""
        if not self.train_glob or not self.checkpoint_dir:
            raise UsageError("--train_glob and --checkpoint_dir are needed")
        if set("*?[") & set(os.path.abspath(self.checkpoint_dir)):
            raise UsageError(f"--checkpoint_dir {self.checkpoint_dir}: without *, ? and [, please: TensorFlow would not find the saves")
        zoo.check_name(self.export_name)
        for name in ("lambdas", "val_lambdas", "lr_drops"):
            if any(not 0 < value < 1 for value in getattr(self, name)):
                raise UsageError(f"--{name} takes numbers between 0 and 1, not {','.join(map(str, getattr(self, name)))}")
        for name in ("balance", "val_lambdas"):
            if getattr(self, name) and self.model != "variable_rate":
                raise UsageError(f"--{name} is for variable_rate, which has a lambda for each sample, not for {self.model}")
        if self.patchsize < 16 or self.patchsize % 16:
            raise UsageError(f"--patchsize must be a multiple of 16, not {self.patchsize}")
        for name, known in presets.TRAINING_CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"--{name} must be {', '.join(known[:-1])} or {known[-1]}, not {getattr(self, name)}")
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), float) and not math.isfinite(value):
                raise UsageError(f"--{field.name} must be finite, not {value}")
        for name in ("lr", "lr_drop_factor"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} must be above 0, not {getattr(self, name):g}")
        for name, least in (("batchsize", 1), ("last_step", 0), ("lr_warmup", 0), ("seed", 0)):
            if not least <= getattr(self, name) < 2**32:
                raise UsageError(f"--{name} must be {least} to {2**32 - 1}, not {getattr(self, name)}")
        if self.init != "random" and (self.model not in PRINCIPAL_STARTS or self.warm_start):
            raise UsageError(f"--init {self.init} is for {' and '.join(PRINCIPAL_STARTS)} without --warm_start")
        if self.distortion != "mse" and self.patchsize < metrics.MS_SSIM_SIDE:
            raise UsageError(f"--distortion {self.distortion} needs --patchsize 176 at least: MS-SSIM takes {metrics.MS_SSIM_SIDE} pixels")


def make_schedule(options: Options):
    """The rate lr, which lr_warmup steps rise to, multiplied by lr_drop_factor at each of lr_drops (shares of last_step)."""
    return Schedule(options.lr, [int(share * options.last_step) for share in options.lr_drops], options.lr_drop_factor, options.lr_warmup)


def step_of(model) -> int:
    """Steps that a compiled model has been trained for, under any strategy."""
    return int(model.optimizer.iterations.numpy())


def make_optimizer(options: Options):
    """Adam or SOAP with gradient clipping and averaged weights as the options say; UsageError for both ways of clipping."""
    if options.clip_norm and options.clip_value:
        raise UsageError("give one of --clip_norm and --clip_value, not both")
    return {"adam": Adam, "soap": Soap}[options.optimizer](
        make_schedule(options),
        epsilon=1e-8,  # TensorFlow 1's, which the originals trained with
        global_clipnorm=options.clip_norm or None,
        clipvalue=options.clip_value or None,
        use_ema=options.ema > 0,
        ema_momentum=options.ema or 0.99,
        jit_compile=False,
    )


@contextlib.contextmanager
def averaged_weights(model):
    """Inside, the model has its averaged weights; afterwards all is as before, also what coding tables have set (z's offsets)."""
    saved = [v.numpy() for v in model.variables]
    if model.optimizer.use_ema:
        model.optimizer.finalize_variable_values(model.trainable_variables)
    try:
        yield
    finally:
        for variable, value in zip(model.variables, saved):
            variable.assign(value)


class Validator:
    """Codes whole pictures with real bytes, with a second copy of the model that keeps its compiled functions.

    Args:
      model: the Codec that is trained.
      paths: pictures, cut to multiples of 16; DataError for those that are too small or that `compress` would refuse.
      lambdas: to code with; of no effect on models without.
    """

    def __init__(self, model, paths, lambdas):
        self.codec = MODELS[model.config.model](model.config).build_weights()
        self.codec.build_exact()  # which files are made with; `build_tables` makes it anew
        self.distortion = model.distortion
        self.lambdas = lambdas if model.has_lambda else (0.0,)
        self.pictures, digest, self.shown = [], hashlib.sha256(), []
        for path in paths:
            picture = data.read_rgb(path)
            height, width = (n // 16 * 16 for n in picture.shape[:2])
            if not min(height, width):
                raise DataError(f"{path}: too small to validate with, which needs 16 pixels a side")
            try:
                memory.choose_tile(self.codec, (height, width))
            except GoConvError as error:
                raise DataError(f"{path}: {error}") from None
            if self.distortion != "mse" and min(height, width) < metrics.MS_SSIM_SIDE:
                raise DataError(f"{path}: too small to validate with --distortion {self.distortion}, which needs 176 pixels a side")
            self.pictures.append(picture[:height, :width])
            digest.update(self.pictures[-1].tobytes())
        self.digest = digest.hexdigest()[:16]

    def _error(self, picture, decoded):
        """D of the loss."""
        if self.distortion == "mse":
            return metrics.mse(picture, decoded)
        both = (tf.cast(x[None], tf.float32) for x in (picture, decoded))
        return float(losses.distortion(*both, self.distortion)[0])

    @memory.guarded()
    def __call__(self, model):
        """[(lambda, mean bpp, mean PSNR)] and the mean loss, of the model's present weights; a row for each layer of scalable models."""
        for target, source in zip(self.codec.variables, model.variables):
            target.assign(source)
        self.codec.build_tables()
        rows, means, self.shown = [], [], [self.pictures[0][:SHOWN_SIDE, :SHOWN_SIDE]]
        for lmbda in self.lambdas:
            coded = [
                self.codec.compress(picture, lmbda, reconstruct=True, tile=memory.choose_tile(self.codec, picture.shape[:2]))
                for picture in self.pictures
            ]
            self.shown += [decoded[:SHOWN_SIDE, :SHOWN_SIDE] for decoded in coded[0].pictures]
            for k, weight in enumerate(self.codec.layer_lambdas(lmbda)):
                bpp, mse, errors = [], [], []
                for picture, result in zip(self.pictures, coded):
                    names = [name for layer in self.codec.config.layers[: k + 1] for name in layer]
                    bpp.append(8 * sum(len(result.strings[name]) for name in names) / (picture.shape[0] * picture.shape[1]))
                    mse.append(metrics.mse(picture, result.pictures[k]))
                    errors.append(self._error(picture, result.pictures[k]))
                rows.append((weight, float(np.mean(bpp)), float(np.mean(10 * np.log10(255**2 / np.maximum(mse, 1e-9))))))
                means.append(np.mean(np.array(bpp) + weight * np.array(errors)))
        return rows, float(np.mean(means))


class Backup(tf.keras.callbacks.BackupAndRestore):
    """BackupAndRestore that never saves what is not finite."""

    def __init__(self, backup_dir, progress):
        super().__init__(backup_dir, delete_checkpoint=False)
        self.progress = progress

    def on_epoch_end(self, epoch, logs=None):
        if self.progress.nan_step is None:
            super().on_epoch_end(epoch, logs)


class Centre(tf.keras.callbacks.Callback):
    """Keeps what z is rounded about (`--quantization mixed`) near to what coding has; by the step, so that a resumed run does the same."""

    def __init__(self, stale=False):
        """stale: whether this is also to be done at once, as the run had none of it until now."""
        super().__init__()
        self.stale = stale

    def on_train_batch_begin(self, batch, logs=None):
        if self.model.quantization == "mixed" and (self.stale or step_of(self.model) % CENTRE_STEPS == 0):
            self.model.update_offsets()
        self.stale = False


class Progress(tf.keras.callbacks.Callback):
    """A line per save: step, means of the metrics since the last, steps per second, time left.

    Ends the run at the last step, when its minutes are over, or when it is asked to (`stop`); what fit
    then does at the end of an "epoch" saves it.
    """

    def __init__(self, options, log_path, writer, total=int):
        """log_path: None for a process that is not to write. total: adds up integers over processes."""
        super().__init__()
        self.options, self.log_path, self.writer, self.total = options, log_path, writer, total
        self.begin = time.time()
        self.nan_step = None
        self.stopped = False

    def stop(self, *_):
        """To be called by a signal."""
        self.stopped = True

    def on_epoch_begin(self, epoch, logs=None):
        self.steps, self.epoch_begin = 0, time.time()

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        step = step_of(self.model)
        if not np.isfinite(logs["loss"]):
            self.nan_step = step
        out_of_time = self.options.minutes and time.time() - self.begin >= 60 * self.options.minutes
        if step >= self.options.last_step or self.total(bool(out_of_time or self.stopped)):
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        step = step_of(self.model)
        # A finite loss may have been followed by an update that is not.
        if self.nan_step is None and not all(np.isfinite(v.numpy()).all() for v in self.model.trainable_variables):
            self.nan_step, self.model.stop_training = step, True
        if self.log_path is None:
            return
        means = {key: float(value) for key, value in logs.items()}
        rate = self.steps / (time.time() - self.epoch_begin)
        left = (self.options.last_step - step) / rate
        if self.options.minutes:
            left = min(left, self.options.minutes * 60 - (time.time() - self.begin))
        text = " ".join(f"{key} {value:.4f}" for key, value in means.items())
        print(f"step {step} {text} | {rate:.2f} steps/s, {max(left, 0) / 60:.0f} min left", flush=True)
        with open(self.log_path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, "time": time.time(), **means}) + "\n")
        if self.writer:
            with self.writer.as_default(step):
                for key, value in means.items():
                    tf.summary.scalar(key, value)
                tf.summary.scalar("learning_rate", self.model.optimizer.learning_rate)


class Watch(tf.keras.callbacks.Callback):
    """Exports averaged weights, and watches real bytes on whole validation pictures; keeps the best export."""

    def __init__(self, options, validator, writer, progress):
        super().__init__()
        self.options, self.validator, self.writer, self.progress = options, validator, writer, progress
        self.last = time.time()

    def on_epoch_end(self, epoch, logs=None):
        if self.progress.nan_step is not None:
            return
        if self.model.stop_training or time.time() - self.last >= 60 * self.options.val_minutes:
            try:
                cluster.alone(self.model.distribute_strategy, self.watch)
            except GoConvError as error:  # memory may have been short for a moment
                if self.model.stop_training:
                    raise
                print(f"step {step_of(self.model)} not validated: {printable(error)}", flush=True)
            self.last = time.time()

    def watch(self):
        options, step = self.options, step_of(self.model)
        folder = options.checkpoint_dir
        card = {"training": {**dataclasses.asdict(options), "steps": step}}
        for private in ("checkpoint_dir", "train_glob", "val_glob"):
            card["training"].pop(private)
        card["training"]["warm_start"] = os.path.basename(os.path.normpath(options.warm_start)) if options.warm_start else ""
        name = options.export_name
        export = os.path.join(folder, "export")  # written last: a run whose export is there has ended
        with averaged_weights(self.model):
            if self.validator is None:
                try:
                    self.model.build_tables()
                    zoo.save_pretrained(self.model, export, name, card)
                finally:
                    self.model.drop_tables()  # which are those of the averages
                return
            rows, loss = self.validator(self.model)
        print(f"step {step} validation loss {loss:.4f}: " + ", ".join(f"{lm:g}: {bpp:.3f} bpp {psnr:.2f} dB" for lm, bpp, psnr in rows), flush=True)
        # Losses compare only over the same pictures, lambdas and kind of distortion.
        setting = {
            "pictures": len(self.validator.pictures),
            "digest": self.validator.digest,
            "lambdas": [row[0] for row in rows],
            "distortion": options.distortion,
        }
        best, before = os.path.join(folder, "best"), {}
        with contextlib.suppress(CheckpointError):  # there is none yet
            before = zoo.read_info(best).card.get("validation", {})
        if not before or any(before.get(key, value) != value for key, value in setting.items()) or loss < before["loss"]:
            zoo.save_pretrained(self.validator.codec, best, name, {**card, "validation": {"loss": loss, **setting}})
        with open(os.path.join(folder, "validation.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, "time": time.time(), "loss": loss, "rows": rows, **setting}) + "\n")
        zoo.save_pretrained(self.validator.codec, export, name, card)
        if self.writer:
            shown = self.validator.shown
            with self.writer.as_default(step):
                tf.summary.scalar("validation/loss", loss)
                for lm, bpp, psnr in rows:
                    tf.summary.scalar(f"validation/bpp_{lm:g}", bpp)
                    tf.summary.scalar(f"validation/psnr_{lm:g}", psnr)
                tf.summary.image("reconstructions", np.stack(shown), max_outputs=len(shown))


def make_config(options: Options):
    """The preset's config with the options' widths, lambdas and settings."""
    return presets.change_settings(presets.get_preset(options.model, options.preset), options.settings).adapt(
        options.num_filters, options.num_latents, options.lambdas
    )


def saved_step(backup_dir) -> int:
    """The step of the last save in a training folder; 0 if there is none, CheckpointError if there is one that cannot be read."""
    folder = os.path.join(backup_dir, "chief")
    try:
        state = tf.train.get_checkpoint_state(folder)
        if state is not None and os.path.exists(f"{state.model_checkpoint_path}.index"):
            return int(tf.train.load_variable(state.model_checkpoint_path, "model/optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE"))
    except (tf.errors.OpError, ValueError) as error:
        raise CheckpointError(f"{folder}: the save cannot be read ({first_line(error)}); without this folder, the run begins anew") from error
    found = [path.name for path in pathlib.Path(folder).glob("ckpt-*.index")]
    if found not in ([], ["ckpt-1.index"]):  # a first save may have been broken off before its 'checkpoint'
        raise CheckpointError(f"{folder}: its file 'checkpoint' does not lead to the save that is there; without this folder, the run begins anew")
    return 0


def exported_step(folder) -> int:
    """The step of the last export in a training folder; 0 if there is none."""
    try:
        return zoo.read_info(os.path.join(folder, "export")).card["training"]["steps"]
    except (CheckpointError, KeyError, TypeError):
        return 0


def make_strategy(name, *where):
    """tf.distribute strategy of `presets.TRAINING_CHOICES`; where: as `cluster.make_strategy`'s."""
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "mirrored":
        return tf.distribute.MirroredStrategy(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU"))
    return cluster.make_strategy(*where)


@contextlib.contextmanager
def data_errors():
    """Turns what TensorFlow makes of a DataError inside the pipeline into a DataError again."""
    try:
        yield
    except tf.errors.UnknownError as error:
        if "DataError: " not in str(error):
            raise
        raise DataError(str(error).split("DataError: ", 1)[1].splitlines()[0]) from error


@contextlib.contextmanager
def save_errors(backup_dir):
    """Turns what TensorFlow makes of a full or unwritable disk, or of a save of other widths, into a GoConvError; the last whole save stays."""
    try:
        yield
    except ValueError as error:
        if "incompatible tensor" not in str(error):
            raise
        raise UsageError(
            f"{backup_dir} holds a run of other widths: a version with other presets, or another M for --set filters=N, began it"
        ) from error
    except tf.errors.OpError as error:
        if backup_dir not in str(error) and "SaveV2" not in str(error):
            raise
        raise GoConvError(f"the save in {backup_dir} failed ({first_line(error)}); the last whole one is of step {saved_step(backup_dir)}") from error


@contextlib.contextmanager
def stopped_by_signals(stop):
    """Inside, SIGTERM and Ctrl-C call stop, so that a run ends with a save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_from(model, warm, name, crops):
    """Gives a new model another's weights: one of the same kind and widths, for CRPE a VariableRate, at CRPE's lambda, or a narrower VariableRate.

    crops: function that gives crops of training pictures, uint8 [n, h, w, 3].

    Raises:
      UsageError: if the two do not fit together.
    """
    if (model.config.model, warm.config.model) == ("crpe", "variable_rate"):
        same = all(
            getattr(model.config, key) == getattr(warm.config, key) for key in ("filters", "latents", "alpha", "hyper_width", "estimation_widths")
        )
        if not (model.config.second_hyper and model.config.crpe_y):
            raise UsageError(f"--warm_start {name}: a VariableRate is not a start for a CRPE without second_hyper or crpe_y")
        if not warm.config.lmbda_min <= model.config.lmbda <= warm.config.lmbda_max:
            reach = f"{warm.config.lmbda_min:g} to {warm.config.lmbda_max:g}"
            raise UsageError(f"--warm_start {name}: lambda {model.config.lmbda:g} is outside what it was trained for, {reach}")
        if same:
            adopt.adopt(model, warm, model.config.lmbda)
            return
    if (model.config.model, warm.config.model) == ("variable_rate", "variable_rate") and widen.fits(model.config, warm.config):
        widen.widen(model, warm, crops())
        return
    targets, values = (
        {key: v for key, v in named_weights(each).items() if not key.startswith(("if_y/", "if_z/"))}  # of CRPE's auxiliary loss, which may be off
        for each in (model, warm)
    )
    if {name: v.shape for name, v in targets.items()} != {name: v.shape for name, v in values.items()}:
        raise UsageError(f"--warm_start {name}: other widths than this run's: {warm.config} against {model.config}")
    for key, target in targets.items():
        target.assign(values[key])


def read_run(path):
    """The contents of a run.json; CheckpointError if they cannot be its."""
    try:
        with open(path, encoding="utf-8") as f:
            run = json.load(f)
        lists = {name: run.get(name, []) for name in ("settings", "lambdas")}
        numbers = [run["ema"], *lists["lambdas"]]
        if not all(isinstance(value, (int, float)) for value in numbers) or not all(isinstance(value, list) for value in lists.values()):
            raise TypeError("a setting of another type")
        run.get("config", {}).items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {error}") from error
    return run


def _resumed(options: Options):
    """(config, contents of run.json) of the run in options.checkpoint_dir, None if there is none; its config is kept but for lambdas.

    Raises:
      UsageError: where the options are not that run's.
      CheckpointError: where its run.json is damaged.
    """
    folder, config, run = options.checkpoint_dir, make_config(options), None
    run_path = os.path.join(folder, "run.json")
    if os.path.exists(run_path):
        run = read_run(run_path)
        for key, missing in (("model", None), ("preset", None), ("num_filters", 0), ("num_latents", 0), ("optimizer", "adam")):
            if run.get(key, missing) != getattr(options, key):
                raise UsageError(f"{folder} holds a run with {key} {run.get(key, missing)}, not {getattr(options, key)}")
        if tuple(run.get("settings", ())) != options.settings:
            raise UsageError(f"{folder} holds a run with --set {' '.join(run.get('settings', ())) or 'nothing'}")
        layers = len(make_config(dataclasses.replace(options, lambdas=tuple(run.get("lambdas", ())))).layers)
        if layers != len(config.layers):
            raise UsageError(f"{folder} holds a run with {layers} layers, not {len(config.layers)}: --lambdas has one for each")
        if bool(run["ema"]) != bool(options.ema):
            raise UsageError(f"{folder} holds a run {'with' if run['ema'] else 'without'} averaged weights: --ema cannot be turned on or off")
        for key, missing in (("warm_start", ""), ("init", Options.init)):
            if getattr(options, key) not in (missing, run.get(key, getattr(options, key))):
                raise UsageError(
                    f"{folder} holds a run that began with {key} {run[key] or 'nothing'}, not {getattr(options, key)}: name a new folder"
                )
        if "config" in run:  # presets change from version to version
            now = {field: getattr(config, field) for field in run["config"] if field.startswith(("lmbda", "lambdas"))}
            config = dataclasses.replace(presets.make_config(options.model, run["config"]), **now)
    if options.val_lambdas and not config.lmbda_min <= min(options.val_lambdas) <= max(options.val_lambdas) <= config.lmbda_max:
        raise UsageError(f"--val_lambdas must be within {config.lmbda_min:g} to {config.lmbda_max:g}, which is trained for")
    return config, run


def train(options: Options):
    """Trains, or goes on with, the run in options.checkpoint_dir; returns the trained model.

    Raises:
      GoConvError: for options or data that do not work, and when the loss is no longer finite
        (the last good save stays).
    """
    options.check()
    folder, (config, run) = options.checkpoint_dir, _resumed(options)
    val_paths = data.find_pictures(options.val_glob) if options.val_glob else []
    held_out = set(map(os.path.realpath, val_paths))
    found = data.find_pictures(options.train_glob)
    paths = [path for path in found if os.path.realpath(path) not in held_out]
    if not paths:
        raise UsageError("--val_glob has all the pictures of --train_glob: none is left to train on")
    source = data.PatchSource(
        paths,
        options.patchsize,
        options.batchsize,
        options.lambdas or config.training_lambdas,
        options.seed,
        options.flip,
        options.vivid,
        options.cache_mb,
    )
    os.makedirs(folder, exist_ok=True)
    strategy = make_strategy(options.strategy, options.cluster, options.port)
    chief = cluster.is_chief(strategy)
    if chief:
        held = f", {len(found) - len(paths)} to validate with" if len(found) > len(paths) else ""
        print(f"{len(source.paths)} pictures; left out {source.too_small} too small, {source.unreadable} unreadable{held}", flush=True)
    if options.batchsize % strategy.num_replicas_in_sync:
        raise UsageError(f"--batchsize {options.batchsize} is not a multiple of the {strategy.num_replicas_in_sync} devices")
    with cluster.lost_workers(strategy, folder), alone_in(folder) if chief else contextlib.nullcontext():
        start, total = saved_step(os.path.join(folder, "backup")), cluster.make_total(strategy)

        def differs(number):  # from worker to worker
            return total(number) != number * total(1)

        if differs(start):
            raise UsageError(f"the workers see different saves in {folder}: it must be one folder that all of them share")
        names = zlib.crc32("/".join(map(os.path.basename, source.paths)).encode("utf-8", "surrogateescape"))
        if differs(names):
            raise UsageError("the workers have different pictures to train on: --train_glob and what is readable must be the same for all")
        exported = start >= options.last_step and exported_step(folder) >= start
        if start >= options.last_step and (exported or cluster.spans_machines(strategy)):
            export = "" if exported else ", or run this once with --strategy none for its export, which is older"
            raise UsageError(f"{folder} is already at step {start} of {options.last_step}: raise --last_step to go on{export}")
        if start and run:  # what it began with, whatever the flags say now
            options = dataclasses.replace(options, **{name: run[name] for name in ("warm_start", "init") if name in run})
        model = _compiled_model(options, config, source, strategy, start)
        contents = dataclasses.asdict(options)
        if run is None or "config" in run:  # a run of an earlier version may have had other widths than presets have now
            contents["config"] = dataclasses.asdict(config)
        changed = run is not None and run.get("quantization") != options.quantization
        contents["quantization_since"] = since = start if changed or run is None else run.get("quantization_since", 0)
        if chief:
            atomic_write(os.path.join(folder, "run.json"), json.dumps(contents, indent=1).encode())
        _fit(options, model, source, val_paths, strategy, start, total, stale=start == since)
    return model


def _compiled_model(options: Options, config, source, strategy, start):
    """The model with its optimizer; before step 0 with the weights that the options have it begin with, which a save replaces later."""
    with strategy.scope():
        tf.random.set_seed(options.seed)
        tf.keras.utils.set_random_seed(options.seed)
        model = zoo.new_model(config)

        def crops():
            count, side = principal.CROPS
            try:
                return data.PatchSource(source.paths, side, count, source.lambdas, options.seed, options.flip, cache_mb=0)(0)[0]  # drawn from once
            except DataError as error:
                raise DataError(f"this start is made of crops of {side} x {side} pixels: {error}") from None

        if not start:
            if options.warm_start:
                start_from(model, zoo.load_pretrained(options.warm_start, fold=False), options.warm_start, crops)
            elif options.init == "pca":
                PRINCIPAL_STARTS[options.model](model, crops())
            cluster.share(strategy, model.trainable_variables)
        model.distortion, model.balance, model.quantization = options.distortion, options.balance, options.quantization
        model.gradients = options.gradients
        optimizer = make_optimizer(options)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer=optimizer)
    return model


def _fit(options: Options, model, source, val_paths, strategy, start, total, stale):
    """Trains a compiled model from step `start` on, and saves, exports and validates it; a run that has ended lacks its last export at most.

    stale: as of `Centre`.
    """
    folder, chief = options.checkpoint_dir, cluster.is_chief(strategy)
    backup_dir = os.path.join(folder, "backup")
    ended = start >= options.last_step
    gpus = len(tf.config.list_logical_devices("GPU"))
    if chief:
        begun = "exporting" if ended else "going on from" if start else "starting at"
        print(f"{begun} step {start}, {gpus or 'no'} GPU{'s' if gpus > 1 else ''}", flush=True)
    writer = tf.summary.create_file_writer(os.path.join(folder, "tensorboard")) if options.tensorboard and chief else None
    val_lambdas = options.val_lambdas or options.lambdas or model.config.training_lambdas
    validator = Validator(model, val_paths, val_lambdas) if val_paths and chief else None
    progress = Progress(options, os.path.join(folder, "log.jsonl") if chief else None, writer, total)
    watch = [Watch(options, validator, writer, progress)] if chief else []
    backup = Backup(backup_dir, progress)
    if ended:  # but something stopped it before its last export
        backup.set_model(model)
        watch[0].set_model(model)
        with strategy.scope(), save_errors(backup_dir):
            backup.on_train_begin()
            watch[0].watch()
        return
    with stopped_by_signals(progress.stop), data_errors(), memory.guarded(), save_errors(backup_dir):
        model.fit(
            cluster.dataset(source, start, strategy),
            epochs=2**31,  # Progress ends the run; an "epoch" is the time between two saves
            steps_per_epoch=options.save_steps,
            verbose=0,
            callbacks=[tf.keras.callbacks.TerminateOnNaN(), Centre(stale), progress, backup, *watch],
        )
        total(0)  # the others wait until the chief has written everything
    if progress.nan_step is not None:
        raise GoConvError(f"the loss is not finite at step {progress.nan_step}; the last good save is that of step {saved_step(backup_dir)}")
