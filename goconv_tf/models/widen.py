"""A wider VariableRate from a trained one, which then codes what that one leaves out.

The channels of the narrow model go on as before. The new ones are a linear transform coder beside them: they carry, in
principal components, what the narrow model's synthesis misses of its own pictures where nothing is rounded.
"""

import math

import numpy as np
import tensorflow as tf

from goconv_tf.layers import OctaveTensor, exact
from goconv_tf.models.octave import chain, set_kernel
from goconv_tf.models.principal import FAINT, INSIDE, LEAST_WIDTH, UNUSED, blocks, by_batches, components, fit_factors, fit_prior, gain, share
from goconv_tf.models.variable_rate import PIXEL_SCALE

_RIDGE = 1e-3  # of regressions, as a share of the mean square
_ROUNDS = 4  # of those for scales, which are weighed by the scales of the round before


def fits(config, narrow):
    """Whether a VariableRate of `config` can start from one of `narrow`: of more filters and more latents, with nothing narrower."""
    wider = config.filters > narrow.filters and config.latents > narrow.latents
    others = zip(*((c.hyper_width, *c.estimation_widths) for c in (config, narrow)))
    return config.alpha == narrow.alpha and wider and all(ours >= theirs for ours, theirs in others)


def _corner(ours, theirs, axes):
    """ours, with theirs at the positions that axes (a range or an array of indexes for each axis) name."""
    ours = np.array(ours)
    ours[np.ix_(*axes)] = theirs
    return ours


def _embed(ours, theirs, fresh, inputs=None, outputs=None):
    """Gives a convolution another's kernel and bias; new inputs reach no old outputs, new outputs get `fresh` times what they had.

    inputs, outputs: where the old channels are among the new; None for the first ones.
    """
    old = theirs.kernel.numpy()
    inputs = range(old.shape[2]) if inputs is None else inputs
    outputs = range(old.shape[3]) if outputs is None else outputs
    kernel = ours.kernel.numpy() * fresh
    kernel[:, :, :, outputs] = 0.0
    set_kernel(ours, _corner(kernel, old, (range(old.shape[0]), range(old.shape[1]), inputs, outputs)))
    if ours.use_bias:
        ours.bias_parameter.assign(_corner(np.zeros(kernel.shape[3]), theirs.bias.numpy(), (outputs,)))


def _embed_norm(ours, theirs):
    """Gives a GDN another's parameters; new channels are divided by 1."""
    old = theirs.beta().shape[0]
    for name, neutral in (("beta", np.ones), ("gamma", np.zeros)):
        ours_parameter, value = getattr(ours, name), getattr(theirs, name)().numpy()
        wide = _corner(neutral(ours_parameter.variable.shape), value, [range(old)] * value.ndim)
        ours_parameter.variable.assign(np.sqrt(wide + ours_parameter.offset**2))


def _embed_factors(ours, theirs):
    """Gives a ScalingNet another's factors; those of new channels are 1."""
    ours.hidden.kernel.assign(theirs.hidden.kernel)
    ours.hidden.bias.assign(theirs.hidden.bias)
    ours.factors.kernel.assign(_corner(0.1 * ours.factors.kernel.numpy(), theirs.factors.kernel.numpy(), (range(ours.units), range(theirs.channels))))
    ours.factors.bias.assign(_corner(ours.factors.bias.numpy(), theirs.factors.bias.numpy(), (range(theirs.channels),)))


def _add(conv, vectors, inputs, outputs, transposed=False):
    """Makes the kernel of a stride of 2 between these channels what computes vectors [2, 2, in, out], or, transposed, adds them up."""
    block = range(conv.kernel.shape[0] // 2, conv.kernel.shape[0] // 2 + 2)
    vectors = vectors.transpose(0, 1, 3, 2) if transposed else vectors
    set_kernel(conv, _corner(conv.kernel.numpy(), vectors, (block, block, inputs, outputs)))


def _clear(layer, path, channels):
    """No more of other channels in these outputs of a layer's frequency."""
    for conv in (layer.high, layer.up) if path == "high" else (layer.low, layer.down):
        if conv is not None:
            kernel = conv.kernel.numpy()
            kernel[..., channels] = 0.0
            set_kernel(conv, kernel)


def _left_out(narrow, pictures, lmbda):
    """What the synthesis of latents that nobody rounded misses of pictures, [n, h, w, 3] in the model's units."""
    shown = by_batches(lambda part: narrow.synthesis(narrow.transform(part, lmbda), lmbda), pictures).numpy()
    return (pictures.astype(np.float64) - shown) / PIXEL_SCALE


def _encode(maps, vectors):
    """What a stride of 2 makes of maps [n, h, w, c] by vectors [2, 2, c, k]."""
    return blocks(maps) @ vectors.reshape(-1, vectors.shape[-1])


def _solve(square, right):
    """Of a regression's normal equations, with a ridge."""
    return np.linalg.solve(square + np.eye(len(square)) * _RIDGE * np.trace(square) / len(square), right)


def _predict_scales(features, values):
    """[inputs, channels]: weights that make scales of values [n, channels] from features [n, inputs]."""
    magnitudes = np.abs(values) * math.sqrt(math.pi / 2)
    weights = np.ones_like(magnitudes)
    solution = np.zeros([features.shape[1], values.shape[1]])
    for _ in range(_ROUNDS):
        for channel in range(values.shape[1]):
            weighted = features * weights[:, channel : channel + 1]
            solution[:, channel] = _solve(weighted.T @ features, weighted.T @ magnitudes[:, channel])
        weights = 1 / np.square(np.maximum(features @ solution, LEAST_WIDTH))
    return solution


def widen(model, narrow, pictures):
    """Starts a VariableRate from a narrower one.

    Args:
      model: VariableRate, whose config `fits`.
      narrow: VariableRate, not folded.
      pictures: uint8 [n, h, w, 3], crops of training pictures with sides divisible by 64; some hundreds of 128 x 128.
    """
    config = model.config
    for ours_layers, theirs_layers in ((model.g_a, narrow.g_a), (model.g_s, narrow.g_s)):
        for ours, theirs in zip(ours_layers, theirs_layers):
            for path, conv in ours.paths.items():
                _embed(conv, theirs.paths[path], UNUSED)
                _embed_factors(getattr(ours, f"{path}_scaling"), getattr(theirs, f"{path}_scaling"))
                if getattr(ours, f"{path}_activation") is not None:
                    _embed_norm(getattr(ours, f"{path}_activation"), getattr(theirs, f"{path}_activation"))

    def parted(new, old):  # where old means and scales are among the new
        return np.concatenate([np.arange(old), new + np.arange(old)])

    low = parted(model.y_low_channels, narrow.y_low_channels)
    for k, (ours, theirs) in enumerate(zip([*model.h_a, *model.h_s], [*narrow.h_a, *narrow.h_s])):
        makes_z, makes_parameters = k == 2, k == 5
        for path, conv in ours.paths.items():
            _embed(
                conv,
                theirs.paths[path],
                FAINT if makes_z or (makes_parameters and path in ("low", "down")) else 1.0,
                low if makes_parameters and path == "up" else None,
                low if makes_parameters and path in ("low", "down") else None,
            )
    _embed(model.f_up, narrow.f_up, 1.0)
    psi = model.y_high_channels + np.arange(narrow.h_s[2].filters_high)
    _embed(model.f_pe[0], narrow.f_pe[0], 1.0, np.concatenate([np.arange(narrow.y_high_channels), psi]))
    _embed(model.f_pe[1], narrow.f_pe[1], 1.0)
    _embed(model.f_pe[2], narrow.f_pe[2], FAINT, None, parted(model.y_high_channels, narrow.y_high_channels))

    _add_components(model, narrow, pictures)
    _add_entropy(model, narrow, pictures, np.geomspace(config.lmbda_min, config.lmbda_max, 5))


def _add_components(model, narrow, pictures):
    """The new channels of the transforms."""
    config, g_a, g_s = model.config, model.g_a, model.g_s
    new_high, new_low = (range(getattr(narrow.g_a[0], f"filters_{path}"), getattr(g_a[0], f"filters_{path}")) for path in ("high", "low"))
    y_high, y_low = range(narrow.y_high_channels, model.y_high_channels), range(narrow.y_low_channels, model.y_low_channels)
    high, rgb = len(new_high), range(3)
    left = _left_out(narrow, pictures, tf.constant([config.lmbda_max]))
    maps, first = components(left * INSIDE, high)
    maps, second = components(maps, high)
    maps, third = components(maps, high + len(new_low))
    # The narrow model has a share of what these components find in a picture already: the rest of them, from all of them.
    pixels = pictures / PIXEL_SCALE
    mean = pixels.mean(axis=(0, 1, 2))
    found = _encode(_encode(_encode((pixels - mean) * INSIDE, first), second), third)
    flat, wanted = found.reshape(-1, found.shape[-1]), maps.reshape(-1, maps.shape[-1])
    square = flat.T @ flat
    rest = _solve(square, flat.T @ wanted)
    order = np.linalg.eigh(rest.T @ square @ rest)[1][:, ::-1]
    third, third_back = third @ (rest @ order), third @ order
    maps = found @ rest @ order
    cut = share(third.shape[-1], high, len(new_low))
    _, fourth = components(maps[..., :cut], len(y_high))
    coarse, third_low = components(maps[..., cut:], len(new_low))
    _, fourth_low = components(coarse, len(y_low))

    def first_of(channels, count):
        return range(channels.start, channels.start + count)

    one = first_of(new_high, first.shape[-1])
    two = first_of(new_high, second.shape[-1])
    three = first_of(new_high, cut)
    down = first_of(new_low, third.shape[-1] - len(three))
    three_low, four = first_of(new_low, third_low.shape[-1]), first_of(y_high, fourth.shape[-1])
    four_low = first_of(y_low, fourth_low.shape[-1])
    # What the new channels are made of comes from them only: old ones are far larger than what is left out.
    for layer, high_outputs, low_outputs in (
        (g_a[0], one, ()),
        (g_a[1], two, down),
        (g_a[2], three, three_low),
        (g_a[3], four, four_low),
        (g_s[0], three, three_low),
        (g_s[1], two, down),
        (g_s[2], one, ()),
    ):
        _clear(layer, "high", high_outputs)
        _clear(layer, "low", low_outputs)
    _add(g_a[0].high, first * INSIDE, rgb, one)
    bias = g_a[0].high.bias.numpy()
    bias[one.start : one.stop] = -np.tensordot(first.sum(axis=(0, 1)), mean * INSIDE, axes=[0, 0])
    g_a[0].high.bias_parameter.assign(bias)
    _add(g_s[3].high, first / INSIDE, one, rgb, transposed=True)
    for k, path, there, back, inputs, outputs in (
        (1, "high", second, second, one, two),
        (2, "high", third[..., :cut], third_back[..., :cut], two, three),
        (3, "high", fourth, fourth, three, four),
        (2, "low", third_low, third_low, down, three_low),
        (3, "low", fourth_low, fourth_low, three_low, four_low),
    ):
        _add(getattr(g_a[k], path), there, inputs, outputs)
        _add(getattr(g_s[3 - k], path), back, outputs, inputs, transposed=True)
    # As in the start from nothing, the third stride's weaker components leave by the low frequency.
    _add(g_a[1].down, third[..., cut:], two, down)
    _add(g_s[1].up, third_back[..., cut:], down, two, transposed=True)
    for net, target, channels in (
        (g_a[3].high_scaling, gain, y_high),
        (g_a[3].low_scaling, gain, y_low),
        (g_s[0].high_scaling, lambda lmbda: 1 / gain(lmbda), new_high),
        (g_s[0].low_scaling, lambda lmbda: 1 / gain(lmbda), new_low),
    ):
        fit_factors(net, target, config.lmbda_min, config.lmbda_max, channels)


def _add_entropy(model, narrow, pictures, lambdas):
    """Scales of the new latents, and priors of the new channels of z."""
    pieces = []
    for k, lmbda in enumerate(lambdas):
        part = pictures[k :: len(lambdas)]
        y = by_batches(lambda crops, at=lmbda: model.transform(crops, tf.constant([at], tf.float32)), part)
        z = model.hyper_analysis(y)
        z_rounded, y_low = OctaveTensor(*map(tf.round, z)), tf.round(y.low)
        p = chain(model.h_s[:2], z_rounded)
        estimate = tf.concat([model.f_up(y_low), model.h_s[2](p).high], axis=-1)
        for layer in model.f_pe[:-1]:
            estimate = tf.nn.leaky_relu(layer(estimate), exact.LEAK)
        pieces.append([np.asarray(t, np.float64).reshape(-1, t.shape[-1]) for t in (p.low, estimate, y.low, y.high, z.high, z.low)])
    features_low, features_high, y_low, y_high, z_high, z_low = map(np.concatenate, zip(*pieces))
    for conv, features, y, old, new in (
        (model.h_s[2].low, features_low, y_low, narrow.y_low_channels, model.y_low_channels),
        (model.f_pe[2], features_high, y_high, narrow.y_high_channels, model.y_high_channels),
    ):
        kernel = conv.kernel.numpy()
        middle = kernel.shape[0] // 2
        if conv.use_bias:
            features = np.concatenate([features, np.ones([len(features), 1])], axis=1)
        solution = _predict_scales(features, y[:, old:])
        kernel[..., new + old :] = 0.0
        kernel[middle, middle, :, new + old :] = solution[: kernel.shape[2]]
        set_kernel(conv, kernel)
        if conv.use_bias:
            bias = conv.bias.numpy()
            bias[new + old :] = solution[-1]
            conv.bias_parameter.assign(bias)
    for ours, theirs, z in ((model.prior_z_high, narrow.prior_z_high, z_high), (model.prior_z_low, narrow.prior_z_low, z_low)):
        fit_prior(ours, z[None, None])
        for a, b in zip(ours.variables, theirs.variables):
            a.assign(_corner(a.numpy(), b.numpy(), [range(n) for n in b.shape]))
