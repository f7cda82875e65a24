"""What a model's one walk over its latents is walked with.

A model visits each latent once, in coding order: `value = walker(name, entropy_model, *parameters)`.
Which walker it is given decides whether that trains, estimates, encodes or decodes:

    NoisyWalker     adds uniform noise, collects likelihoods
    AnnealingWalker draws between the two nearest integers, collects likelihoods
    RoundingWalker  rounds, collects likelihoods
    Encoder         rounds, collects coded strings
    Decoder         reads coded strings

The last three return identical values, computed by identical operations.
"""

import zlib

import tensorflow as tf

MAX_SYMBOL = 2**20


class _Walker:
    """latents: {name: [batch, h, w, c]}, and whatever else a model's analysis gives; a scalable model adds to it as it walks."""

    layers = None  # how many layers of a scalable model to walk; None for all
    checksum = 0  # of all integers coded so far
    enter = staticmethod(lambda value: value)  # how a decoded latent enters what computes entropy parameters

    def __init__(self, latents):
        self.latents = dict(latents)
        self.likelihoods = {}

    def size(self, name):
        """Spatial size, int32 [2], of the latent `name`."""
        latent = self.latents[name]
        return tf.constant(latent.shape[1:3]) if tf.executing_eagerly() else tf.shape(latent)[1:3]

    def bits(self, name):
        """Estimated bits of the latent `name`, [batch]."""
        log2 = tf.math.log(self.likelihoods[name]) / -tf.math.log(2.0)
        return tf.reduce_sum(log2, axis=[1, 2, 3])


class NoisyWalker(_Walker):
    """Training: latents [batch, h, w, c] with noise in [-0.5, 0.5); `values` keeps them.

    seed: int32 [2]; or [batch, 2], so that a sample's noise is the same in whatever batch it is.
    mixed: pass on rounded latents, as coding does, with the gradient of unrounded ones; likelihoods are of noisy ones all the
      same (Minnen and Singh 2020, arXiv 2007.08739). z is rounded about its prior's `offset`, which is to be
      updated now and then, as coding has that of the last weights.
    """

    def __init__(self, latents, seed, mixed=False):
        super().__init__(latents)
        self.seed = tf.convert_to_tensor(seed)
        self.mixed = mixed
        self.values = {}

    def __call__(self, name, model, *parameters):
        latent = tf.cast(self.latents[name], tf.float32)
        seed = self.seed + [len(self.likelihoods), 0]
        if len(seed.shape) == 1:
            noisy = latent + tf.random.stateless_uniform(tf.shape(latent), seed, -0.5, 0.5)
        else:
            noise = tf.map_fn(lambda own: tf.random.stateless_uniform(tf.shape(latent)[1:], own, -0.5, 0.5), seed, fn_output_signature=tf.float32)
            noisy = latent + tf.reshape(noise, tf.shape(latent))
        self.likelihoods[name] = model.likelihood(noisy, *parameters)
        self.values[name] = noisy
        return latent + tf.stop_gradient(_rounded(latent, model.offset(*parameters)) - latent) if self.mixed else noisy


class AnnealingWalker(_Walker):
    """Refinement: latents [batch, h, w, c] between their two nearest integers, softly drawn (Yang, Bamler and Mandt 2020, arXiv 2006.04240, Eq. 8).

    The nearer an integer, the more often it is drawn; as the temperature falls, draws come nearer to integers and to rounding.

    seed: int32 [2]. temperature: float32 [], above 0.
    """

    def __init__(self, latents, seed, temperature):
        super().__init__(latents)
        self.seed, self.temperature = tf.convert_to_tensor(seed), temperature

    def __call__(self, name, model, *parameters):
        offset = model.offset(*parameters)
        difference = tf.cast(self.latents[name], tf.float32) - offset
        below = tf.stop_gradient(tf.floor(difference))
        distances = tf.stack([difference - below, below + 1 - difference], axis=-1)
        logits = -tf.atanh(tf.clip_by_value(distances, 0.0, 1 - 1e-5)) / self.temperature
        uniform = tf.random.stateless_uniform(tf.shape(logits), self.seed + [len(self.likelihoods), 0], 1e-6, 1 - 1e-6)
        share = tf.nn.softmax((logits - tf.math.log(-tf.math.log(uniform))) / self.temperature)
        value = below + share[..., 1] + offset
        self.likelihoods[name] = model.likelihood(value, *parameters)
        return value


def _symbols(latent, offset):
    """Integers that are coded: latent - offset, rounded (halves up), kept within what int32 codes can carry."""
    difference = tf.cast(latent, tf.float32) - offset
    difference = tf.where(tf.math.is_finite(difference), difference, 0.0)
    return tf.cast(tf.floor(tf.clip_by_value(difference, -MAX_SYMBOL, MAX_SYMBOL) + 0.5), tf.int32)


def _rounded(latent, offset):
    """What decoding gives."""
    return tf.cast(_symbols(latent, offset), tf.float32) + offset


def _check_table(name, model):
    if model.table is None:
        raise ValueError(f"{name}: its entropy model has no coding table; call its build_table() first")


def _checksum(integers, before):
    return zlib.crc32(integers.astype("<i4").tobytes(), before)


class RoundingWalker(_Walker):
    """Estimate: the values that decoding gives, with their likelihoods."""

    def __call__(self, name, model, *parameters):
        value = _rounded(self.latents[name], model.offset(*parameters))
        self.likelihoods[name] = model.likelihood(value, *parameters)
        return value


class Encoder(_Walker):
    """Coding, batch 1, with one of `CODERS`: `strings` {name: bytes}; `checksums` {name: CRC-32 of all integers so far}."""

    def __init__(self, latents, coder, layers=None):
        super().__init__(latents)
        self.coder = coder
        self.layers = layers
        self.strings = {}
        self.checksums = {}

    def __call__(self, name, model, *parameters):
        _check_table(name, model)
        offset = model.offset(*parameters)
        symbols = _symbols(self.latents[name], offset)
        if symbols.shape[0] not in (1, None):
            raise ValueError(f"{name}: pictures are coded one by one, not {symbols.shape[0]} at once")
        indexes = model.indexes(tf.shape(symbols), *parameters)
        self.write(name, tf.reshape(symbols, [-1]), tf.reshape(indexes, [-1]), model.table)
        return tf.cast(symbols, tf.float32) + offset

    def write(self, name, symbols, indexes, table):
        """Codes a latent: symbols and indexes int32 [n]."""
        flat = symbols.numpy()
        self.strings[name] = self.coder.encode(flat, indexes.numpy(), table)
        self.checksums[name] = self.checksum = _checksum(flat, self.checksum)


class Decoder(_Walker):
    """Decoding, batch 1: from {name: bytes} and {name: (h, w, c)}; `checksums` as an Encoder's."""

    def __init__(self, strings, shapes, coder, layers=None, strict=True):
        super().__init__({})  # there are no latents to look at
        self.strings = strings
        self.shapes = shapes
        self.coder = coder
        self.layers = layers
        self.strict = strict
        self.checksums = {}

    def size(self, name):
        return tf.convert_to_tensor(self.shapes[name][:2], tf.int32)

    def __call__(self, name, model, *parameters):
        _check_table(name, model)
        shape = (1, *self.shapes[name])
        offset = model.offset(*parameters)
        symbols = self.read(name, tf.reshape(model.indexes(shape, *parameters), [-1]), model.table)
        return tf.cast(tf.reshape(symbols, shape), tf.float32) + offset

    def read(self, name, indexes, table):
        """Decodes a latent: symbols int32 [n] for indexes int32 [n]."""
        flat = self.coder.decode(self.strings[name], indexes.numpy(), table, self.strict)
        self.checksums[name] = self.checksum = _checksum(flat, self.checksum)
        return flat
