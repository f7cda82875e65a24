"""A start for VariableRate's transforms that is a transform coder already: principal components instead of random kernels.

Each stride of 2 takes the principal components of 2 x 2 blocks of what the stride before it gave; those that do not fit in
the high frequency go to the low one, where there are any left. Random kernels take ten thousands of steps to get there
(docs/training.md has numbers).
"""

import math

import numpy as np
import tensorflow as tf

from goconv_tf.layers import exact
from goconv_tf.models.octave import set_kernel
from goconv_tf.models.variable_rate import PIXEL_SCALE

INSIDE = 0.25  # what pixels are multiplied by inside the transforms, so that GDN starts nearly linear
UNUSED = 0.01  # what random kernels are multiplied by on paths that carry nothing yet
CROPS = (256, 128)  # how many crops components are computed from, and their side in pixels
BATCH = 8  # of them go through a model at once, fewer pixels than a training step has
LEAST_WIDTH = 0.1  # of a channel of y
FAINT = 0.02  # what random kernels of the hyper networks are multiplied by
Z_STEPS = 3.0  # z where y is as wide as usual
LEAST_SPREAD = 0.5  # standard deviation of a channel of z that its density shall have


def gain(lmbda):
    """What a component is multiplied by after the transforms' own INSIDE, so that its quantization step suits lambda.

    A uniform step d costs d^2 / 12 of squared error in a component, and 1 / (2 ln 2) bits per natural logarithm of that:
    R + lambda * D, with three components a pixel, is least at d^2 = 18 / (lambda ln 2) in squared 8-bit units.
    """
    return PIXEL_SCALE / INSIDE / np.sqrt(18.0 / (lmbda * math.log(2.0)))


def by_batches(function, pictures):
    """function(pictures [n, h, w, c]), computed for BATCH of them at once: tensors, or a structure of them, of all."""
    parts = [function(pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]
    return tf.nest.map_structure(lambda *part: tf.concat(part, axis=0), *parts)


def blocks(maps):
    """Blocks of 2 x 2 of maps [n, h, w, c], [n, h/2, w/2, 4c]."""
    n, height, width, channels = maps.shape
    cells = maps.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(n, height // 2, width // 2, 4 * channels)


def components(maps, count):
    """Principal components of 2 x 2 blocks of maps [n, h, w, c].

    Returns:
      (components [n, h/2, w/2, k], their vectors [2, 2, c, k]), the largest first; k = min(count, 4c).
    """
    cells = blocks(maps)
    flat = cells.reshape(-1, cells.shape[-1])
    vectors = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :count]
    return cells @ vectors, vectors.reshape(2, 2, maps.shape[-1], -1)


def _put(conv, vectors, transposed=False):
    """Makes a convolution with stride 2 compute components, or, transposed, add them up; other outputs stay random, but small."""
    shape = conv.kernel.shape
    fresh = conv.kernel.numpy() * UNUSED
    before = shape[0] // 2  # where the layer's own block of 2 x 2 begins
    if transposed:
        vectors = vectors.transpose(0, 1, 3, 2)
    _, _, inputs, outputs = vectors.shape
    kernel = np.zeros(shape, np.float32)
    kernel[before : before + 2, before : before + 2, :inputs, :outputs] = vectors
    kernel[..., outputs:] = fresh[..., outputs:]
    set_kernel(conv, kernel)


def _damp(conv, factor=UNUSED):
    set_kernel(conv, conv.kernel * factor)


def _before_softplus(x):
    return x + np.log(-np.expm1(-x))


def fit_factors(net, target, lowest, highest, channels):
    """Makes a ScalingNet's factors of these channels (a range) target(lambda), to about a percent where its hidden units allow it."""
    lmbda = np.geomspace(lowest, highest, 64)
    hidden = np.concatenate([net.hidden(np.log10(lmbda)[:, None] + 2).numpy(), np.ones([len(lmbda), 1])], axis=1)
    ridge = 1e-4 * np.diag([*np.ones(net.units), 0])
    solution = np.linalg.solve(hidden.T @ hidden + ridge, hidden.T @ _before_softplus(target(lmbda)))
    kernel, bias = net.factors.kernel.numpy(), net.factors.bias.numpy()
    kernel[:, channels.start : channels.stop], bias[channels.start : channels.stop] = solution[:-1, None], solution[-1]
    net.factors.kernel.assign(kernel)
    net.factors.bias.assign(bias)


def _fit(net, target, lowest, highest):
    """Makes a new ScalingNet's factors target(lambda) for all channels."""
    units = np.arange(net.units)
    net.hidden.kernel.assign(np.linspace(0.5, 1.5, net.units)[None] * np.where(units % 2, 1, -1))
    net.hidden.bias.assign(np.linspace(-1.5, 1.5, net.units))
    fit_factors(net, target, lowest, highest, range(net.channels))


def share(count, high, low):
    """How many of `count` components the high frequency takes, which has `high` channels beside `low`: wide layers have more than there are."""
    return min(high, -(-count * high // (high + low)))


def principal_start(model, pictures):
    """Gives a new VariableRate transforms made of principal components.

    Args:
      model: VariableRate.
      pictures: uint8 [n, h, w, 3], crops of training pictures with sides divisible by 32; some hundreds of 128 x 128.
    """
    config = model.config
    g_a, g_s = model.g_a, model.g_s
    high, low = g_a[0].filters_high, g_a[0].filters_low
    for layer in (*g_a, *g_s):
        for path in layer.paths:
            net = getattr(layer, f"{path}_scaling")
            net.factors.kernel.assign(0.1 * net.factors.kernel)  # the same for every lambda at first
    for layer in (*g_a[1:], *g_s):
        for path, conv in layer.paths.items():
            if path != "high":
                _damp(conv)
    pixels = pictures.astype(np.float64) / PIXEL_SCALE
    mean = pixels.mean(axis=(0, 1, 2))
    maps, first = components((pixels - mean) * INSIDE, high)
    maps, second = components(maps, high)
    maps, third = components(maps, high + low)
    cut = share(third.shape[-1], high, low)
    _, fourth = components(maps[..., :cut], model.y_high_channels)
    rest, third_low = components(maps[..., cut:], low)
    _, fourth_low = components(rest, model.y_low_channels)

    _put(g_a[0].high, first * INSIDE)
    bias = np.zeros(high, np.float32)
    bias[: first.shape[-1]] = -np.tensordot(first.sum(axis=(0, 1)), mean * INSIDE, axes=[0, 0])
    g_a[0].high.bias_parameter.assign(bias)
    _put(g_s[3].high, first / INSIDE, transposed=True)
    g_s[3].high.bias_parameter.assign(mean)
    for analysis, synthesis, path, vectors in (
        (g_a[1], g_s[2], "high", second),
        (g_a[2], g_s[1], "high", third[..., :cut]),
        (g_a[3], g_s[0], "high", fourth),
        (g_a[2], g_s[1], "low", third_low),
        (g_a[3], g_s[0], "low", fourth_low),
    ):
        _put(getattr(analysis, path), vectors)
        _put(getattr(synthesis, path), vectors, transposed=True)
    # The third stride's other components leave the second layer's high frequency for its low one, and come back there.
    _put(g_a[1].down, third[..., cut:])
    _put(g_s[1].up, third[..., cut:], transposed=True)

    for path in ("high", "low"):
        _fit(getattr(g_a[3], f"{path}_scaling"), gain, config.lmbda_min, config.lmbda_max)
        _fit(getattr(g_s[0], f"{path}_scaling"), lambda lmbda: 1 / gain(lmbda), config.lmbda_min, config.lmbda_max)
    entropy_start(model, pictures)


def entropy_start(model, pictures):
    """Gives a new VariableRate hyper networks that pass on how strong y is, block by block; scales follow that.

    For each block of 16 x 16 pixels z holds the mean magnitude of one or more groups of y_H's channels, each divided by its width
    at the middle lambda: 16 blocks to a position of z_H, whose channels are so used up. Scales are that, times the widths;
    z_L and y_L alike. Means start at about zero. Random networks take thousands of steps to find this.

    Args: as `principal_start`'s; with N under 32 z has too few channels, with a hyper_width under N / 16 they have nowhere
      to go, and nothing is changed.
    """
    config = model.config
    h_a, h_s = model.h_a, model.h_s
    groups_high, groups_low = (count // 16 for count in (h_a[2].filters_high, h_a[2].filters_low))
    if not 0 < groups_high <= h_s[0].filters_high or not 0 < groups_low <= h_s[0].filters_low:
        return
    y = by_batches(lambda part: model.transform(part, tf.constant([config.lmbda_middle])), pictures)
    wide_high, wide_low = (np.maximum(np.sqrt(np.mean(np.square(part), axis=(0, 1, 2))), LEAST_WIDTH) for part in y)
    for layer in (*h_a, *h_s):
        for conv in (layer.up, layer.down):
            _damp(conv, FAINT)
    of_high, of_low = (
        _pass_on([getattr(layer, path) for layer in h_a], [getattr(layer, path) for layer in h_s[:2]], wide, groups)
        for path, wide, groups in (("high", wide_high, groups_high), ("low", wide_low, groups_low))
    )
    # psi_H begins with the groups, P_L has a scale for each channel of y_L.
    _place(h_s[2].high, {(1, 1): np.eye(groups_high)})
    _place(h_s[2].low, {(1, 1): of_low}, np.tile(wide_low, 2))
    set_kernel(h_s[2].down, h_s[2].down.kernel * np.tile(wide_low, 2))
    for conv, first in ((model.f_pe[0], model.y_high_channels), (model.f_pe[1], 0)):  # psi_H follows what is made of y_L
        kernel = conv.kernel.numpy()
        kernel[..., :groups_high] = 0.0
        kernel[0, 0, first : first + groups_high, :groups_high] = np.eye(groups_high)
        set_kernel(conv, kernel)
    _place(model.f_pe[2], {(0, 0): of_high}, np.tile(wide_high, 2))
    z = model.hyper_analysis(y)
    fit_prior(model.prior_z_high, z.high.numpy())
    fit_prior(model.prior_z_low, z.low.numpy())


def fit_prior(prior, values):
    """Gives a new FactorizedPrior's densities the mean and spread of values [n, h, w, channels]: as initialised they are wide, and narrow slowly."""
    mean, spread = values.mean(axis=(0, 1, 2)), np.maximum(values.std(axis=(0, 1, 2)), LEAST_SPREAD)
    parameters = prior.parameters()
    slope, offset = np.ones([len(mean), 1, 1]), np.zeros([len(mean), 1, 1])  # of the logits: without factors they are linear
    for matrix, bias in zip(parameters["matrix"], parameters["bias"]):
        slope, offset = (tf.nn.softplus(matrix).numpy().astype(np.float64) @ part for part in (slope, offset))
        offset = offset + bias.numpy()
    wanted = math.pi / math.sqrt(3) / spread[:, None, None]  # a logistic density's
    matrix, bias = parameters["matrix"][0], parameters["bias"][0]
    first = tf.nn.softplus(matrix).numpy() / slope
    matrix.assign(_before_softplus(first * wanted))
    bias.assign(bias - first * (wanted * mean[:, None, None] + offset))


_QUARTERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def _place(conv, taps, gains=1.0):
    """Makes a kernel {(row, column): [in, out] of its first channels}, and random, but faint, besides; gains: of the outputs."""
    kernel = conv.kernel.numpy() * FAINT * gains
    for (row, column), matrix in taps.items():
        kernel[row, column, : matrix.shape[0], : matrix.shape[1]] += matrix
    set_kernel(conv, kernel.astype(np.float32))


def _pass_on(analysis, synthesis, wide, groups):
    """Makes one frequency's hyper networks, but for the last layer, pass on magnitudes of groups of channels.

    Returns:
      [groups, 2 * channels]: what makes means (zero) and scales of them.
    """
    first, second, third = analysis
    # Pairs of opposite sums of channels: LeakyReLU makes 1 - 0.2 of their magnitudes of them.
    channels, pairs = len(wide), first.filters // 2
    pair = np.arange(channels) * pairs // channels
    sums = np.zeros([channels, 2 * pairs])
    sums[np.arange(channels), 2 * pair] = np.where(np.arange(channels) % 3 == 1, -1, 1) / (wide * np.sqrt(np.bincount(pair, minlength=pairs)[pair]))
    sums[:, 1::2] = -sums[:, ::2]
    group = np.arange(pairs) * groups // pairs
    means = np.repeat(np.eye(groups)[group], 2, axis=0) / np.bincount(group) / (1 - exact.LEAK) / math.sqrt(2 / math.pi)
    middle = first.kernel_support[0] // 2
    _place(first, {(middle, middle): sums})
    # A 2 x 2 block's quarters become channels, twice, and come back.
    for conv, matrix, apart in (
        (second, means, True),
        (third, Z_STEPS * np.eye(4 * groups), True),
        (synthesis[0], np.eye(4 * groups) / Z_STEPS, False),
        (synthesis[1], np.eye(groups), False),
    ):
        middle = conv.kernel_support[0] // 2
        _place(
            conv,
            {
                (middle + row, middle + column): np.kron(np.eye(4)[[q]] if apart else np.eye(4)[:, [q]], matrix)
                for q, (row, column) in enumerate(_QUARTERS)
            },
        )
    return np.concatenate([np.zeros([groups, channels]), np.eye(groups)[group[pair]].T * wide], axis=1)
