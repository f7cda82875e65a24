"""What all codecs share: the loss, training steps, coding, and the names of their weights."""

import dataclasses
import functools
import itertools
import threading
import zlib
from typing import Any, Dict, NamedTuple, Tuple

import tensorflow as tf

from goconv_tf import entropy, limits, losses, presets
from goconv_tf.errors import BitstreamError, ModelMismatchError
from goconv_tf.layers import convolution_gradients
from goconv_tf.layers import exact as exact_arithmetic
from goconv_tf.layers.gradients import gradient_dtype
from goconv_tf.models import tiles


class Estimate(NamedTuple):
    """What a model gives for pictures without coding them.

    reconstruction: float [batch, h, w, 3], 8-bit units, neither rounded nor clipped.
    rates: {latent: estimated bits, [batch]}.
    layers: the reconstruction after each layer; of models that are not scalable only the one.
    """

    reconstruction: Any
    rates: Dict[str, Any]
    layers: Tuple[Any, ...]


class Coded(NamedTuple):
    """One coded picture.

    strings: {latent: bytes} in coding order.
    checksums: CRC-32 of all coded integers up to the end of each layer.
    pictures: uint8 [h, w, 3], what decoding each number of layers gives; empty if not asked for.
    """

    strings: Dict[str, bytes]
    checksums: Tuple[int, ...]
    pictures: Tuple[Any, ...]

    @property
    def reconstruction(self):
        """The picture of all layers; None if not asked for."""
        return self.pictures[-1] if self.pictures else None


_tracing = threading.RLock()


def stage(method=None, *, inputs=None, outputs=None, margin=0):
    """Compiles a method when it is called with tensors, once for all sizes; inlines it in a graph and calls it with arrays.

    Arguments may be None (which compiles another function), tensors or structures of both.
    Encoder and decoder call the same stages. Computed with integers, entropy parameters are the same whatever computes them; in
    floating point, because both run the same graphs.

    inputs, outputs, margin: `tiles.Geometry` of a method that can be computed in tiles.
    """
    if method is None:
        return functools.partial(stage, inputs=inputs, outputs=outputs, margin=margin)
    geometry = tiles.Geometry(inputs, outputs, margin) if inputs else None

    def compiled(self, *args):
        if exact_arithmetic.is_array(args):
            return method(self, *args)
        functions = self.__dict__.setdefault("_stages", {})
        flat = tf.nest.flatten(args)
        there = [x is not None for x in flat]  # and not `flat` itself in what is kept: pictures would stay in memory
        present = [x for x in flat if x is not None]
        # Pictures and features of any size share a function; lambdas of one picture and of several do not.
        kinds = [None if x is None else (tf.as_dtype(x.dtype), x.shape[0] if len(x.shape) == 1 else 0) for x in flat]
        key = (method.__name__, gradient_dtype(), *kinds)
        if key not in functions:
            with _tracing:  # by one of the threads that want it
                if key not in functions:
                    structure = tf.nest.pack_sequence_as(args, there)

                    def spec(x):
                        x = tf.convert_to_tensor(x)
                        return tf.TensorSpec([None, None, None, x.shape[-1]] if x.shape.rank == 4 else x.shape, x.dtype)

                    def run(*tensors):
                        left = iter(tensors)
                        return method(self, *tf.nest.pack_sequence_as(structure, [next(left) if given else None for given in there]))

                    function = tf.function(functools.partial(run), input_signature=[spec(x) for x in present], autograph=False)
                    if not tf.config.functions_run_eagerly():
                        function.get_concrete_function()
                    functions[key] = function
        return functions[key](*present)

    @functools.wraps(method)
    def call(self, *args):
        if not self.built or not (tf.executing_eagerly() or self.keeps_stages):
            return method(self, *args)
        if geometry and tiles.is_tiled():
            return tiles.run(functools.partial(compiled, self), geometry, args)
        return compiled(self, *args)

    call.geometry = geometry
    return call


_SETTINGS = ("distortion", "balance", "quantization", "gradients")  # that training depends on


def _setting(name):
    """A property that training depends on: what Keras has compiled for another value is forgotten."""

    def get(self):
        return getattr(self, f"_{name}")

    def change(self, value):
        if value not in (choices := presets.TRAINING_CHOICES.get(name, (value,))):
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        setattr(self, f"_{name}", value)
        self.train_function = self.test_function = None

    return property(get, change, doc=f"See `loss_fn`, `train_step`; may be set at any time, and holds from the next `fit` or `evaluate` on. {name}.")


class Codec(tf.keras.Model):
    """Base of the three systems.

    A subclass gives `analysis`, `walk`, `synthesis` and `latent_shapes`; training, estimate,
    compression and decompression follow from its one walk. Its config names the latents.

    Methods between these (`hyper_synthesis` and such) take tensors of the values that their docstrings name. NumPy's arrays they take for
    integers on the grid of `goconv_tf.layers.exact`, and then give such, as coding has them.
    """

    alignment = 16  # pictures are padded to multiples of this before analysis
    can_tile = False  # whether pictures can be coded in tiles
    keeps_stages = False  # whether graphs call compiled stages, instead of inlining them
    _folder: Any = None  # (`info`, `_mark` of both parts at the time)
    _is_folded: bool = False
    _steps: int = 0  # of the epoch
    _sums: Any = None  # of their metrics
    # Keys of the first are of types that do not sort, as tf.Module would have them.
    _TF_MODULE_IGNORED_PROPERTIES = frozenset({"_stages", "_marked", "_folder", "_sums"} | tf.keras.Model._TF_MODULE_IGNORED_PROPERTIES)
    exact_parts: Tuple[str, ...] = ()  # what computes entropy parameters: attributes that have an integer form

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.config = config
        self.distortion = "mse"
        self.balance = 0.0
        self.quantization = "noise"
        self.gradients = "float32"

    def get_config(self):
        """What Keras' own format keeps beside weights and optimizer; model folders are what to code with."""
        settings = {setting: getattr(self, setting) for setting in _SETTINGS}
        return {"name": self.name, "model": self.config.model, "config": dataclasses.asdict(self.config), **settings}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """A model as `get_config` has it, with all its variables."""
        model = cls(presets.make_config(config["model"], config["config"]), name=config["name"]).build_weights()
        for setting in _SETTINGS:
            setattr(model, setting, config.get(setting, getattr(model, setting)))  # files of earlier versions have fewer
        return model

    @property
    def info(self):
        """The `zoo.ModelInfo` of the folder whose weights it has; None where it is of none, as once it is trained."""
        return None if self._folder is None or self.has_changed else self._folder[0]

    @info.setter
    def info(self, info):
        if info is not None:
            # Not as attributes, which Keras would track.
            self.__dict__["_marked"] = [[v for v in self.variables if (v.shape.rank > 1) == large] for large in (False, True)]
        self.__dict__["_folder"] = info and (info, [self._mark(part) for part in (0, 1)])

    @property
    def has_changed(self) -> bool:
        """Whether it was of a folder, and its weights or tables no longer are."""
        return self._folder is not None and any(self._folder[1][part] != self._mark(part) for part in ((0,) if self._is_folded else (0, 1)))

    def _mark(self, part):
        """CRC-32 of biases and other vectors, and of the tables (0), or of hundreds of numbers of each kernel (1): nearly any change changes them.

        The second takes a while, and is only looked at where kernels are not folded, as they are for coding.
        """
        tables = [] if part else [model.table for model in self.entropy_models().values() if model.table is not None]
        with tf.init_scope():
            # An odd step, as numbers of channels are even.
            some = [v.numpy() if v.shape.rank < 2 else tf.reshape(v, [-1])[:: v.shape.num_elements() // 512 | 1].numpy() for v in self._marked[part]]
            arrays = some + [array for table in tables for array in (table.cdf, table.offset)]
        return functools.reduce(lambda crc, array: zlib.crc32(array.tobytes(), crc), arrays, 0)

    @property
    def has_lambda(self) -> bool:
        """Whether lambda is chosen when coding."""
        return self.config.has_lambda

    @property
    def latent_names(self) -> Tuple[str, ...]:
        """All latents in coding order."""
        return tuple(name for layer in self.config.layers for name in layer)

    # What a subclass defines.

    def analysis(self, x, lmbda):
        """Pictures uint8 [batch, h, w, 3], lmbda [batch] -> {latent: [batch, h', w', c]}, or what `walk` makes latents of as it goes."""
        raise NotImplementedError

    def walk(self, walker):
        """Visits every latent in coding order; returns what `synthesis` takes."""
        raise NotImplementedError

    def synthesis(self, latents, lmbda):
        """What `walk` returned, lmbda [batch] -> pictures float [batch, h, w, 3] in 8-bit units."""
        raise NotImplementedError

    def pictures(self, latents, lmbda):
        """The pictures after each layer; of models that are not scalable only the one."""
        return (self.synthesis(latents, lmbda),)

    def latent_shapes(self, height, width):
        """{latent: (h', w', c)} of a padded picture."""
        raise NotImplementedError

    def layer_lambdas(self, lmbda):
        """The Lagrangian of each layer, where pictures are coded with lmbda."""
        return (lmbda,) if self.has_lambda else self.config.training_lambdas

    # Training.

    distortion = _setting("distortion")
    balance = _setting("balance")
    quantization = _setting("quantization")
    gradients = _setting("gradients")

    @tf.autograph.experimental.do_not_convert  # nothing here needs it, and tracing takes half the time
    def loss_fn(self, x, lmbda, seed, step):
        """The loss of a batch, R + lambda * D averaged over its samples; pure but for the weights.

        Args:
          x: uint8 [batch, h, w, 3], patches with sides divisible by 16.
          lmbda: float32 [batch], one Lagrangian per sample.
          seed: int32 [2], or [batch, 2], of the noise.
          step: int32 [], for schedules.

        `distortion` ("mse", "mix" or "ms-ssim") chooses D (`losses.distortion`). `balance` b weighs a sample by (lambda / middle of the
        range)^-b: at 0, as in the papers, the highest lambdas dominate the gradients; at 0.5, R + lambda * D
        has about the same size at all rates. The best a model can do at each lambda is the same.
        `quantization` ("noise" or "mixed"): see `entropy.NoisyWalker`; with "mixed", call `update_offsets` every few hundred steps.

        Returns:
          (loss, {name: scalar}); rates in bits per pixel, mse in squared 8-bit units.
        """
        walker = entropy.NoisyWalker(self.analysis(x, lmbda), seed, self.quantization == "mixed")
        reconstruction = self.synthesis(self.walk(walker), lmbda)
        original = tf.cast(x, tf.float32)
        bpp, metrics = self.rates(walker, x)
        loss = bpp + lmbda * losses.distortion(original, reconstruction, self.distortion)
        if self.balance:
            loss *= tf.pow(lmbda / self.config.lmbda_middle, -self.balance)
        metrics["mse"] = tf.reduce_mean(losses.mse(original, reconstruction))
        auxiliary, more = self.auxiliary_loss(walker.values, step)
        return tf.reduce_mean(loss) + auxiliary, {**metrics, **more}

    def auxiliary_loss(self, values, step):
        """(what training adds to R + lambda * D, {name: scalar}), from {latent: noisy value}."""
        del values, step
        return 0.0, {}

    def rates(self, walker, x):
        """(bits per pixel [batch], {"bpp" and "bpp_<latent>": mean over the batch}) of what a walker saw of x."""
        pixels = tf.cast(tf.shape(x)[1] * tf.shape(x)[2], tf.float32)
        rates = {name: walker.bits(name) / pixels for name in self.latent_names}
        bpp = tf.add_n(list(rates.values()))
        metrics = {f"bpp_{name}": tf.reduce_mean(rate) for name, rate in rates.items()}
        return bpp, {**metrics, "bpp": tf.reduce_mean(bpp)}

    def train_step(self, data):
        """A step of `fit`; data: (x, lmbda, seeds, steps) as in `loss_fn`, with int32 [batch, 2] and [batch] (`data.PatchSource` gives them).

        `gradients` ("float32" or "bfloat16") is what gradients of convolutions are computed in (`layers.convolution_gradients`).
        """
        with convolution_gradients(self.gradients), tf.GradientTape() as tape:
            metrics = self.test_step(data)
        # Gradients of replicas are added up, as are the metrics by Keras.
        self.optimizer.minimize(metrics["loss"], self.trainable_variables, tape=tape)
        return metrics

    def test_step(self, data):
        """A step of `evaluate`, on data as `train_step` has it: with noise, as in training. {name: scalar}, this replica's part of them.

        Losses of layers, such as regularizers', add to "loss".
        """
        x, lmbda, seeds, steps = data
        loss, metrics = self.loss_fn(x, lmbda, seeds, steps[0])
        if self.losses:
            loss += tf.add_n(self.losses)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return {name: value / replicas for name, value in {"loss": loss, **metrics}.items()}

    def _forget(self):
        """Leaves behind what is of other weights than it has, or will have: folded kernels, tables, integers, and the folder that they are of."""
        for layer in self.foldable():
            layer.unfold()
        self._is_folded = False
        self.__dict__.pop("_stages", None)  # which may hold folded kernels
        self.drop_tables()
        self.info = None

    def load_weights(self, *args, **kwargs):
        """As Keras' own; the model is then one of no folder, as after `fit`, and not folded."""
        status = super().load_weights(*args, **kwargs)
        self._forget()
        return status

    def make_train_function(self, force=False):
        """Keras' step of `fit`."""
        self._forget()
        self.train_function = self._added_up(super().make_train_function(force))
        return self.train_function

    def make_test_function(self, force=False):
        """Keras' step of `evaluate`."""
        if self._steps_per_execution is not None and int(self._steps_per_execution) > 1:
            raise ValueError("evaluate needs steps_per_execution=1: of several steps Keras gives the last one's")
        self.test_function = self._added_up(super().make_test_function(force))
        return self.test_function

    def reset_metrics(self):
        """Keras calls this before the first batch of `evaluate`, and of each of `fit`'s epochs."""
        super().reset_metrics()
        self.__dict__.update(_steps=0, _sums=None)  # not as attributes, which Keras would track

    def _added_up(self, step):
        if hasattr(step, "added_up"):
            return step

        def added_up(iterator):
            metrics, sums = step(iterator), self._sums or {}
            self.__dict__.update(_steps=self._steps + 1, _sums={name: sums.get(name, 0.0) + value for name, value in metrics.items()})
            return metrics

        added_up.added_up = True
        return added_up

    def _validate_and_get_metrics_result(self, logs):
        """What Keras has of an epoch: means over its batches (with steps_per_execution, over the last one of each execution)."""
        return {name: float(total) / self._steps for name, total in self._sums.items()} if self._sums else logs

    # Estimation and coding.

    @property
    def bytes_per_pixel(self):
        """Peak memory of coding, bytes per pixel of the picture: 180 to 210 were measured at N = 64; in proportion to N, with a margin."""
        return 3.5 * self.config.filters

    @property
    def bytes_per_tiled_pixel(self):
        """Memory that coding in tiles needs beside a tile's own, bytes per pixel of the picture."""
        return 8 + 0.11 * self.config.latents

    def build_weights(self):
        """Creates all variables, by one pass over a small picture."""
        self.loss_fn(tf.zeros([1, 64, 64, 3], tf.uint8), tf.constant([0.01]), tf.constant([0, 0]), tf.constant(0))
        self.built = True
        return self

    def entropy_models(self):
        """{attribute: entropy model}, of all those with a coding table; "name/k" for those in lists."""
        kinds = (entropy.FactorizedPrior, entropy.GaussianConditional)
        found = {}
        for name, value in sorted(vars(self).items()):
            if name.startswith("_"):
                continue
            several = {f"{name}/{k}": v for k, v in enumerate(value)} if isinstance(value, list) else {name: value}
            found.update({key: v for key, v in several.items() if isinstance(v, kinds)})
        return found

    def update_offsets(self):
        """Makes what latents of factorized priors are rounded about that of the present weights; `build_tables` does it too."""
        for model in self.entropy_models().values():
            if isinstance(model, entropy.FactorizedPrior):
                model.update_offset()

    def build_tables(self):
        """Makes the coding tables from the present weights, and the integers anew where there are any; needed once after training."""
        for model in self.entropy_models().values():
            model.build_table()
        if self.has_exact:
            self.build_exact()

    def drop_tables(self):
        """Forgets the coding tables and integers, as those of other weights."""
        for model in self.entropy_models().values():
            model.table = None
        for layer in self.exact_layers().values():
            if hasattr(layer, "quantized"):
                del layer.quantized
        if self.keeps_stages:
            self.__dict__.pop("_stages", None)

    @property
    def has_tables(self) -> bool:
        """Whether all coding tables are there."""
        return all(model.table is not None for model in self.entropy_models().values())

    def exact_layers(self):
        """{path: layer} of all that is computed with integers when coding."""
        found = {}
        for part in self.exact_parts:
            if hasattr(self, part):
                found.update(_leaves(getattr(self, part), part, lambda node: hasattr(node, "quantize")))
        return found

    @property
    def has_exact(self) -> bool:
        """Whether the integers are there, so that entropy parameters are the same on every machine."""
        return all(hasattr(layer, "quantized") for layer in self.exact_layers().values())

    def build_exact(self):
        """Makes the integers from the present weights; ValueError if they do not fit."""
        for path, layer in self.exact_layers().items():
            try:
                layer.quantized = layer.quantize()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        if self.keeps_stages:  # these hold the integers; without graphs around them, NumPy computes with those
            self.__dict__.pop("_stages", None)

    def _made_exact(self, walker, wanted):
        """The walker, set to compute entropy parameters with integers or floats; None: with integers where there are any."""
        if wanted and not self.has_exact:
            raise ValueError("the model has no integer form")
        if wanted or (wanted is None and self.has_exact):
            walker.enter = exact_arithmetic.to_grid
        return walker

    def foldable(self):
        """The layers that have kernels to fold."""
        return [layer for layer in self.submodules if hasattr(layer, "fold") and layer is not self]

    def fold(self):
        """Fixes all convolution kernels at their present values, to code faster, until `fit` or `load_weights`."""
        for layer in self.foldable():
            layer.fold()
        self._is_folded = True
        self.__dict__.pop("_stages", None)

    def estimate(self, x, lmbda, exact=None):
        """Estimate for pictures uint8 [batch, h, w, 3] (sides multiples of `alignment`), lmbda [batch]; exact as in `compress`."""
        decoded, rates = self._rounded(x, lmbda, exact)
        pictures = self.pictures(decoded, lmbda)
        return Estimate(pictures[-1], rates, tuple(pictures))

    def bits(self, x, lmbda, exact=None):
        """The rates of `estimate`, {latent: bits [batch]}, without its pictures."""
        return self._rounded(x, lmbda, exact)[1]

    def _rounded(self, x, lmbda, exact):
        """(what `walk` gives for rounded latents, {latent: bits [batch]})."""
        walker = self._made_exact(entropy.RoundingWalker(self.analysis(x, lmbda)), exact)
        decoded = self.walk(walker)
        return decoded, {name: walker.bits(name) for name in self.latent_names}

    def compress(self, x, lmbda, coder="tfc", reconstruct=False, layers=None, exact=None, tile=None, latents=None):
        """Codes one picture, with the tables and integers that `build_tables` made: to be made anew after training.

        Args:
          x: uint8 [h, w, 3], sides multiples of `alignment`.
          lmbda: the Lagrangian, exactly as the decoder will know it; of no effect without `has_lambda`.
          coder: "tfc" or "range-coder".
          reconstruct: also return the decoded pictures.
          layers: how many layers of a scalable model to code; None for all.
          exact: compute entropy parameters with integers (True), floats (False), or integers where the model has them (None).
          tile: compute in tiles of so many cells a side (see `tiles`).
          latents: code these instead of what `analysis` gives, as `goconv_tf.models.refine.refine` has them.

        Returns:
          Coded.

        Raises:
          ValueError: for a coder that is not there, or what `build_tables` has not made.
        """
        if coder not in entropy.CODERS:
            raise ValueError(f"there is no entropy coder {coder!r}: there are {', '.join(entropy.CODERS)}")
        if not self.has_tables:
            raise ValueError("the model has no coding tables: call build_tables() first")
        lmbda = tf.constant([lmbda], tf.float32)
        with tiles.tiled(tile):
            latents = self.analysis(x[None], lmbda) if latents is None else latents
            walker = self._made_exact(entropy.Encoder(latents, entropy.CODERS[coder], layers), exact)
            del latents
            decoded = self.walk(walker)
            pictures = tuple(tiles.to_uint8(picture)[0] for picture in self.pictures(decoded, lmbda)) if reconstruct else ()
        checksums = tuple(walker.checksums[names[-1]] for names in self.config.layers[:layers])
        return Coded(walker.strings, checksums, pictures)

    def decompress(self, strings, checksums, height, width, lmbda, coder="tfc", exact=None, problems=None, tile=None, window=None):
        """The picture uint8 [height, width, 3] (a padded size) that `compress` coded.

        Args:
          strings, checksums: as in `Coded`, of all layers or of the first ones.
          exact: as the encoder had it.
          problems: if given, a list that wrong checksums are added to instead of raised.
          tile: compute in tiles of so many cells a side; the encoder need not have done so.
          window: ((top, bottom), (left, right)) in cells: give this part of the picture only.

        Raises:
          BitstreamError: if the strings cannot be decoded.
          ModelMismatchError: if they give other integers than were coded.
        """
        if coder not in entropy.CODERS:
            raise BitstreamError(f"the stream needs an entropy coder this version does not have ({coder})")
        walker = entropy.Decoder(strings, self.latent_shapes(height, width), entropy.CODERS[coder], len(checksums), problems is None)
        walker = self._made_exact(walker, exact)
        lmbda = tf.constant([lmbda], tf.float32)
        with tiles.tiled(tile):
            latents = self.walk(walker)
        for names, checksum in zip(self.config.layers, checksums):
            if walker.checksums[names[-1]] != checksum:
                problem = "decoded latents differ from the coded ones: entropy parameters differ between encoder and decoder"
                if problems is None:
                    raise ModelMismatchError(problem)
                problems.append(problem)
                break
        limits.check()
        with tiles.tiled(max(itertools.chain(*window)) if window and tile is None else tile, window):
            return tiles.to_uint8(self.synthesis(latents, lmbda))[0]


# Keras adds these views of the same variables to the object graph.
_VIEWS = {"variables", "trainable_variables", "non_trainable_variables", "regularization_losses", "layers", "keras_api", "optimizer"}


def named_weights(model) -> Dict[str, tf.Variable]:
    """{path of attributes: variable} of a built model, the same in every process."""
    return _leaves(model, "", lambda node: isinstance(node, tf.Variable))


def _leaves(root, path, wanted) -> Dict[str, Any]:
    """{path of attributes: node} of the first nodes below root that are wanted, each once."""
    found: Dict[str, Any] = {}
    seen = set()

    def visit(node, names):
        if id(node) in seen:
            return
        seen.add(id(node))
        if wanted(node):
            found["/".join(names)] = node
            return
        for name, child in sorted(tf.train.TrackableView.children(node).items()):
            if name not in _VIEWS and not name.startswith(("layer-", "layer_with_weights-")):
                visit(child, [*names, name])

    visit(root, [path] if path else [])
    return found
