"""A start for ScalableRNN that is a scalable transform coder already: `principal.principal_start`'s idea for recurrent cells.

Cells are made nearly linear: gates constant, states forgotten, activations small. What a layer codes has to differ from what the
layers before it coded, though all share their weights. So some units count the layers, and gates follow them: each layer has a
group of the principal components to itself, the strongest first, and where there are fewer groups than layers, a
group's next turn codes what its quantization left with a third of the step.
"""

import math

import numpy as np
import tensorflow as tf

from goconv_tf.entropy import RoundingWalker
from goconv_tf.errors import UsageError
from goconv_tf.models.principal import LEAST_WIDTH, Z_STEPS, by_batches, components, fit_prior

MAGNITUDE = 0.06  # in the hyper networks, of a channel as wide as usual: small for tanh
WRITE, KEEP, OUT, CANDIDATE = range(4)  # the order in a cell's kernels
OPEN, SHUT, SURE = 2.0, -4.0, 6.0  # before the sigmoid: gates that let pass, those that do not, and those of units that count
QUIET = -3.0  # the output gate of units that count: all convolutions see them, and a step moves all kernels
UNUSED = 1e-3  # what random kernels are multiplied by
LARGEST = 0.15  # of what tanh is applied to, so that it hardly matters
EVEN = 1.25  # strong channels are kept farther from where tanh bends than weak ones: 1 would make them equal, 0 leave them as they are
ENTRY = 20.0  # how much larger than what the first cell needs the decoder's first convolution leaves y
SLOPES = (0.5, 2.0)  # of what the last cell's units are of a residual, two for each colour: their difference undoes the output's tanh


def _sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def _logit(x):
    return np.log(x / (1 - x))


def _scales(maps):
    """What to multiply channels of maps [n, h, w, c] by, so that the strongest stays below LARGEST, and weaker ones not far above."""
    largest = np.abs(maps).max(axis=(0, 1, 2)) + 1e-9
    return LARGEST / largest.max() * (largest.max() / largest) ** EVEN


def _set(conv, taps, outputs=None):
    """Writes {(row, column): [in, out]} into a kernel, at the first channels or at those given."""
    kernel = conv.kernel.numpy()
    for (row, column), matrix in taps.items():
        kernel[row, column, : matrix.shape[0], np.arange(matrix.shape[1]) if outputs is None else outputs] = matrix.T
    conv.kernel.assign(kernel)


def _fade(conv):
    conv.kernel.assign(UNUSED * conv.kernel)
    conv.bias.assign(tf.zeros_like(conv.bias))


class _Cell:
    """A ConvLSTM cell made nearly linear; `gain` is what small candidates are multiplied by."""

    def __init__(self, cell):
        self.cell, self.units = cell, cell.filters
        self.centre = ((cell.kernel_size - 1) // 2,) * 2
        for conv in (cell.conv_inputs, cell.conv_hidden):
            _fade(conv)
        self.gates = np.tile(np.array([[OPEN], [SHUT], [OPEN], [0.0]]), (1, self.units))  # i, f, o; g
        self._assign()
        self.gain = float(_sigmoid(OPEN)) ** 2

    def _assign(self):
        self.cell.conv_inputs.bias.assign(self.gates.ravel())

    def candidates(self, taps, units=None):
        """Makes units (the first ones or those given) linear functions {(row, column): [in, out]} of the inputs."""
        count = next(iter(taps.values())).shape[1]
        _set(self.cell.conv_inputs, taps, CANDIDATE * self.units + (np.arange(count) if units is None else units))

    def count(self, units, layers):
        """Makes `units` (indexes, at least layers - 1) know how many layers there have been."""
        self.counters = list(units)[: layers - 1]
        signal = _sigmoid(QUIET) * math.tanh(math.tanh(SURE / 2))
        hidden = self.cell.conv_hidden.kernel.numpy()
        for before, unit in zip([None, *self.counters], self.counters):
            self.gates[:, unit] = SURE, -SURE, QUIET, SURE / 2
            hidden[self.centre][:, np.arange(4) * self.units + unit] = 0.0
            if before is not None:  # off in the layer after which `before` turns on, then on
                self.gates[CANDIDATE, unit] = -SURE / 2
                hidden[(*self.centre, before, CANDIDATE * self.units + unit)] = SURE / signal
        self.cell.conv_hidden.kernel.assign(hidden)
        self._assign()
        weights = hidden[self.centre][np.ix_(self.counters, [CANDIDATE * self.units + u for u in self.counters])]
        seen = [np.zeros(len(self.counters))]  # the counters' output of the layer before
        for _ in range(layers - 1):
            candidates = np.tanh(self.gates[CANDIDATE, self.counters] + seen[-1] @ weights)
            seen.append(_sigmoid(QUIET) * np.tanh(_sigmoid(SURE) * candidates))
        self.seen = np.concatenate([np.ones([layers, 1]), np.array(seen)], axis=1)

    def schedule(self, gates, units, values):
        """Makes gates (WRITE, OUT) of units take values [layers], each between 0 and 1, layer by layer."""
        solution = np.linalg.solve(self.seen, _logit(np.asarray(values, np.float64)))
        hidden = self.cell.conv_hidden.kernel.numpy()
        for gate in gates:
            self.gates[gate, units] = solution[0]
            for counter, weight in zip(self.counters, solution[1:]):
                hidden[(*self.centre, counter, gate * self.units + np.asarray(units))] = weight
        self.cell.conv_hidden.kernel.assign(hidden)
        self._assign()


def _blocks(vectors):
    """Vectors [2, 2, in, out] as the taps of a convolution with stride 2, which pads even sides at their end only."""
    return {(row, column): vectors[row, column] for row in (0, 1) for column in (0, 1)}


def _spread(vectors, room):
    """Vectors [2, 2, in, out] as what a 1x1 convolution and depth-to-space add them up with: [out, 4 * room]."""
    _, _, maps, count = vectors.shape
    matrix = np.zeros([count, 4, room])
    matrix[..., :maps] = vectors.reshape(4, maps, count).transpose(2, 0, 1)
    return matrix.reshape(count, -1)


def _steps(lambdas, groups):
    """Quantization step of each layer's components, 8-bit units.

    Components of a layer count in its distortion and in those of the layers after it, and so do their bits: as in
    `principal`, with the mean of these layers' lambdas. A group's later turns have a third of the step: the middle of three
    equal parts of what was one step is where it was.
    """
    steps = []
    for k in range(len(lambdas)):
        steps.append(steps[k - groups] / 3 if k >= groups else math.sqrt(18 / (np.mean(lambdas[k:]) * math.log(2))))
    return np.array(steps)


def _expand():
    """Weights of the last cell's two units of a colour that make of a residual r what the output's tanh makes r of, as well as can be."""
    gain = _sigmoid(OPEN)
    r = np.linspace(-0.49, 0.49, 99)
    units = np.stack([gain * np.tanh(gain * np.tanh(slope * r)) for slope in SLOPES], axis=1)
    weight = (1 - 4 * r**2) * np.sqrt(0.1 + np.exp(-np.abs(r) / 0.1))  # small residuals are the rule
    return np.linalg.lstsq(units * weight[:, None], np.arctanh(2 * r) * weight, rcond=None)[0]


def scalable_start(model, pictures):
    """Gives a new ScalableRNN transforms made of principal components, and a hyperprior that passes on how strong y is.

    Args:
      model: ScalableRNN.
      pictures: uint8 [n, h, w, 3], crops of training pictures with sides divisible by 64; some hundreds of 128 x 128.

    Raises:
      UsageError: for cells that are too narrow.
    """
    c = model.config
    share = c.filters // 4  # of the maps at h/8, whose 2 x 2 blocks make y
    room = [n // 4 for n in c.decoder_filters]
    most = min(c.encoder_filters[1], 4 * min(c.encoder_filters[0], room[1]))  # maps at h/8
    groups = min(c.iterations, c.encoder_filters[2] // c.filters, c.decoder_filters[0] // c.filters, most // share if share else 0)
    spare = c.iterations - 1  # units that count; where there are no others, the last maps make room for them
    lost = max(0, math.ceil((spare + groups * c.filters - min(c.encoder_filters[2], c.decoder_filters[0])) / 4))
    if groups < 1 or lost >= share or min(c.input_filters, room[2]) < 12 or room[3] < 6:
        raise UsageError(f"--init pca needs a scalable_rnn with wider cells, such as those of preset small, not {c}")
    encoder, decoder = ([_Cell(cell) for cell in cells] for cells in (model.g_a_cells, model.g_s_cells))
    for conv in (model.g_a_input, model.g_a_output, model.g_s_input, model.g_s_output):
        _fade(conv)

    residual = pictures.astype(np.float64) / 255.0 - 0.5
    maps, first = components(residual, 12)
    scales = [_scales(maps)]
    maps, second = components(maps, min(c.encoder_filters[0], room[1]))
    scales.append(_scales(maps))
    maps, third = components(maps, groups * share - lost)
    scales.append(_scales(maps))

    # The strides of 2 before the last. Each undoes the scales that the one before has put in.
    _set(model.g_a_input, _blocks(first * scales[0]))
    encoder[0].candidates(_blocks(second * scales[1] / scales[0][:, None]))
    encoder[1].candidates(_blocks(third * scales[2] / (encoder[0].gain * scales[1])[:, None]))
    # And what brings them back.
    at = (1, 1)
    decoder[1].candidates({at: _spread(third * scales[1][:, None], room[1]) / (decoder[0].gain * scales[2])[:, None]})
    decoder[2].candidates({at: _spread(second * scales[0][:, None], room[2]) / (decoder[1].gain * scales[1])[:, None]})
    pixels = _spread(np.concatenate([slope * first for slope in SLOPES], axis=2), room[3])
    decoder[3].candidates({at: pixels / (decoder[2].gain * scales[0])[:, None]})
    _set(model.g_s_output, {at: np.concatenate([weight * np.eye(3) for weight in _expand()])})

    # The last stride: a group of maps for each turn of the layers.
    encoder[2].count(range(encoder[2].units - spare, encoder[2].units), c.iterations)
    decoder[0].count([q * room[0] + k for k in range(maps.shape[-1], room[0]) for q in range(4)][:spare], c.iterations)
    steps = _steps(c.lambdas, groups) / 255.0
    to_y = np.zeros([encoder[2].units, c.filters])
    for group in range(groups):
        mine = np.arange(group * share, min((group + 1) * share, maps.shape[-1]))
        parts, vectors = components(maps[..., mine], c.filters)
        scale = _scales(parts)
        if group == 0:
            # What y is multiplied by before the first cell of the decoder, which takes it to the size that cells need: no kernel
            # is so small that an optimizer's first steps are large beside it.
            entry = np.clip(ENTRY * scale * steps[0], ENTRY * scale[0] * steps[0], 1)
        turns = np.arange(c.iterations) % groups == group
        coarse, fine = steps[turns].max(), steps[turns].min()

        units = group * c.filters + np.arange(len(scale))
        kernel = np.zeros([2, 2, encoder[1].units, len(scale)])
        kernel[:, :, mine] = vectors * scale / (encoder[1].gain * scales[2][mine])[:, None]
        encoder[2].candidates(_blocks(kernel), units)
        encoder[2].schedule((OUT,), units, np.where(turns, _sigmoid(OPEN) * fine / steps, _sigmoid(SHUT)))
        to_y[units, np.arange(len(scale))] = 1 / (encoder[2].gain * scale * fine)

        units = np.concatenate([q * room[0] + mine for q in range(4)])
        kernel = _spread(vectors * scales[2][mine][:, None], len(mine)) * (coarse / entry[: len(scale)])[:, None]
        decoder[0].candidates({(0, 0): kernel}, units)
        decoder[0].schedule((WRITE, OUT), units, np.where(turns, _sigmoid(OPEN) * np.sqrt(steps / coarse), _sigmoid(SHUT)))
    _set(model.g_a_output, {(0, 0): to_y})
    entry = np.pad(entry, (0, c.filters - len(entry)), mode="edge")
    model.g_s_input.kernel.assign(model.g_s_input.kernel * entry[:, None])
    _set(model.g_s_input, {at: np.diag(entry)})
    if c.hyperprior:
        widths = np.array([np.sqrt(np.mean(np.square(y), axis=(0, 1, 2))) for y, _ in _latents(model, pictures)])
        _hyper_start(model, np.maximum(widths, LEAST_WIDTH))
        for prior, (_, z) in zip(model.priors, _latents(model, pictures)):
            fit_prior(prior, z.numpy())


def _latents(model, pictures):
    """[(y, z)] of each layer."""

    def walk(part):
        walker = RoundingWalker(model.analysis(part, None))
        model.walk(walker)
        return [(walker.latents[f"y_{k}"], walker.latents[f"z_{k}"]) for k in range(model.config.iterations)]

    return by_batches(walk, pictures)


def _hyper_start(model, widths):
    """Makes scales follow the mean magnitude of a few groups of channels in each block of 16 x 16 pixels, which z holds.

    A position of z has 16 blocks. The last cell of h_s has units for each layer, as channels are not as wide in all of them.
    With too few channels for that, nothing is changed.
    """
    layers, channels = widths.shape
    room = channels // 4
    groups = min(channels // 16, (room - math.ceil((layers - 1) / 4)) // layers)
    if groups < 1:
        return
    for conv in (model.h_a_input, model.h_a_output, model.h_s_input, model.h_s_output):
        _fade(conv)
    analysis, synthesis = ([_Cell(cell) for cell in cells] for cells in (model.h_a_cells, model.h_s_cells))
    group = np.arange(channels) * groups // channels
    members = np.eye(groups)[group]  # [channels, groups]
    usual = widths.mean(axis=0)
    at = (1, 1)
    _set(model.h_a_input, {at: MAGNITUDE * members / members.sum(axis=0) / usual[:, None]})
    # A block's quarter becomes a part of the channels, twice, and comes back.
    for cell, count, before in zip(analysis, (groups, 4 * groups), (1, analysis[0].gain)):
        cell.candidates(_blocks(np.eye(4 * count).reshape(2, 2, count, 4 * count) / before))
    _set(model.h_a_output, {(0, 0): Z_STEPS * np.eye(16 * groups) / (MAGNITUDE * analysis[1].gain)})
    _set(model.h_s_input, {at: MAGNITUDE / Z_STEPS * np.eye(16 * groups)})
    quarters = np.arange(4)[:, None] * room
    synthesis[0].candidates({at: np.eye(16 * groups)}, (quarters + np.arange(4 * groups)).ravel())
    synthesis[1].count([q * room + k for k in range(layers * groups, room) for q in range(4)][: layers - 1], layers)
    matrix = np.zeros([layers * groups, channels])
    for layer in range(layers):
        units = layer * groups + np.arange(groups)
        synthesis[1].candidates({at: np.eye(4 * groups) / synthesis[0].gain}, (quarters + units).ravel())
        values = np.where(np.arange(layers) == layer, _sigmoid(OPEN), _sigmoid(SHUT))
        synthesis[1].schedule((WRITE, OUT), (quarters + units).ravel(), values)
        magnitudes = math.sqrt(2 / math.pi) * members.T @ (widths[layer] / usual) / members.sum(axis=0)
        matrix[units] = (members * widths[layer][:, None]).T / magnitudes[:, None] / (MAGNITUDE * synthesis[1].gain)
    _set(model.h_s_output, {at: matrix})
