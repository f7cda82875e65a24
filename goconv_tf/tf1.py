"""Reads checkpoints of the originals' TensorFlow 1 code, by their variables' names, into models of ours."""

import math
import os
import re

import numpy as np

from goconv_tf import presets
from goconv_tf.errors import CheckpointError, UsageError, first_line

# What a training checkpoint holds besides the model.
_IGNORED = re.compile(r"(.*/Adam(_1)?|beta[12]_power(_1)?|global_step)$")


def import_scalable_rnn(path):
    """The ScalableRNN of a checkpoint of github.com/Sue128/RNN-based-hyper, weights and coding tables, for `zoo.save_pretrained`.

    Widths and the number of iterations follow from the variables' shapes. Coding tables are the checkpoint's,
    with offsets from its quantiles, so that all layers code the integers with the original's probabilities.

    Args:
      path: the checkpoint's prefix (".../model.ckpt-400000"), or a folder with a `checkpoint` file.

    Raises:
      CheckpointError: if it cannot be read, or its variables are not the original's; a line for each that is missing,
        has another shape, or is not known.
    """
    reader, shapes = _open(path)
    problems = []
    config = _scalable_rnn_config(path, shapes)
    if sum(math.prod(shape) for shape in shapes.values()) < config.fewest_weights:  # before memory is taken for what its biases claim
        raise CheckpointError(f"{path}: its kernels do not fit its biases")
    model, weights = _scalable_rnn_weights(config)
    tables = {f"entropy_iter{k}/{name}" for k in range(config.iterations) for name in ("quantized_cdf", "cdf_length", "quantiles")}
    tables |= {f"conditional{k}/{name}" for k in range(config.iterations) for name in ("quantized_cdf", "cdf_length")}
    problems += [f"{name}: missing" for name in sorted({*weights, *tables} - set(shapes))]
    problems += [f"{name}: not a variable of scalable_rnn" for name in sorted(set(shapes) - {*weights, *tables}) if not _IGNORED.match(name)]
    for name in sorted(set(weights) & set(shapes)):
        if tuple(shapes[name]) != tuple(weights[name].shape):
            problems.append(f"{name}: shape {tuple(shapes[name])} instead of {tuple(weights[name].shape)}")
    if problems:
        raise CheckpointError(f"{path}: {len(problems)} variables do not fit scalable_rnn: {'; '.join(problems)}")
    for name, variable in weights.items():
        variable.assign(_read(path, reader, name))
    for k, prior in enumerate(model.priors):
        scope = f"entropy_iter{k}"
        quantiles = _read(path, reader, f"{scope}/quantiles")
        if quantiles.size != 3 * config.filters or quantiles.dtype != np.float32:
            found = f"{quantiles.dtype} {quantiles.shape}"
            raise CheckpointError(f"{path}: {scope}/quantiles: {found} is not three numbers for {config.filters} channels")
        lower, median, _ = quantiles.reshape(-1, 3).T
        prior.table = _table(path, reader, scope, config.filters, -np.maximum(np.ceil(median - lower), 0))
        prior.quantization_offset.assign(median)
    scales = len(model.conditional.scale_table)
    conditionals = []
    for k in range(config.iterations):
        conditionals.append(_table(path, reader, f"conditional{k}", scales))
    if any((c.cdf.shape != conditionals[0].cdf.shape) or (c.cdf != conditionals[0].cdf).any() for c in conditionals):
        raise CheckpointError(f"{path}: the iterations' conditional tables differ, which the original's never do")
    model.conditional.table = conditionals[0]
    return model


IMPORTERS = {"scalable_rnn": import_scalable_rnn}


def _open(path):
    """(reader, {name: shape}) of a checkpoint."""
    import tensorflow as tf

    if os.path.isdir(path):
        try:
            latest = tf.train.latest_checkpoint(path)
        except ValueError as error:  # also what is not text
            raise CheckpointError(f"{path}: its file `checkpoint` cannot be read: {first_line(error)}") from error
        if latest is None:
            raise CheckpointError(f"{path}: no TensorFlow checkpoint in this folder")
        path = latest
    if not os.path.exists(path + ".index"):
        raise CheckpointError(f"{path}: no such checkpoint (there is no {os.path.basename(path)}.index)")
    try:
        reader = tf.train.load_checkpoint(path)
        return reader, reader.get_variable_to_shape_map()
    except (tf.errors.OpError, ValueError, RuntimeError, LookupError) as error:
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from error


def _read(path, reader, name):
    import tensorflow as tf

    try:
        return reader.get_tensor(name)
    except (tf.errors.OpError, ValueError, RuntimeError, LookupError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {first_line(error)}") from error


def _scalable_rnn_config(path, shapes):
    """Widths from the biases' shapes; CheckpointError names those that are needed for that and missing."""
    cells = {"encoder": 3, "decoder": 4}
    biases = {scope: [f"{scope}/{scope}_rnn_conv_{k + 1}/conv_hidden/bias" for k in range(n)] for scope, n in cells.items()}
    needed = ["encoder/encoder_rnn_input/bias", "encoder/encoder_outputs/bias", *biases["encoder"], *biases["decoder"]]
    missing = [name for name in needed if len(shapes.get(name, ())) != 1]
    iterations = 0
    while f"entropy_iter{iterations}/quantiles" in shapes:
        iterations += 1
    if not iterations:
        missing.append("entropy_iter0/quantiles")
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of scalable_rnn: {'; '.join(f'{name}: missing' for name in missing)}")
    try:
        return presets.ScalableRNNConfig(
            filters=shapes["encoder/encoder_outputs/bias"][0],
            input_filters=shapes["encoder/encoder_rnn_input/bias"][0],
            encoder_filters=tuple(shapes[name][0] // 4 for name in biases["encoder"]),
            decoder_filters=tuple(shapes[name][0] // 4 for name in biases["decoder"]),
            iterations=iterations,
        )
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _scalable_rnn_weights(config):
    """(a new model, {original name: variable})."""
    from goconv_tf import zoo

    model = zoo.new_model(config)
    weights = {}

    def conv(name, layer):
        weights[f"{name}/kernel"], weights[f"{name}/bias"] = layer.kernel, layer.bias

    def network(first, cells, last, first_layer, cell_layers, last_layer):
        conv(first, first_layer)
        for name, cell in zip(cells, cell_layers):
            conv(f"{name}/conv_inputs", cell.conv_inputs)
            conv(f"{name}/conv_hidden", cell.conv_hidden)
        conv(last, last_layer)

    m = model
    network(
        "encoder/encoder_rnn_input",
        [f"encoder/encoder_rnn_conv_{k}" for k in (1, 2, 3)],
        "encoder/encoder_outputs",
        *(m.g_a_input, m.g_a_cells, m.g_a_output),
    )
    network(
        "decoder/decoder_rnn_input",
        [f"decoder/decoder_rnn_conv_{k}" for k in (1, 2, 3, 4)],
        "decoder/output",
        *(m.g_s_input, m.g_s_cells, m.g_s_output),
    )
    # The original's own names: the second cell lacks its "hyper_", the hyper decoder lies in the decoder's scope.
    network(
        "hyper_encoder/hyper_encoder_rnn_input",
        ["hyper_encoder/hyper_encoder_rnn_conv_1", "hyper_encoder/encoder_rnn_conv_2"],
        "hyper_encoder/hyper_encoder_outputs",
        *(m.h_a_input, m.h_a_cells, m.h_a_output),
    )
    network(
        "decoder/hyper_decoder_rnn_input",
        ["decoder/hyper_decoder_rnn_conv_1", "decoder/hyper_decoder_rnn_conv_2"],
        "decoder/hyper_outputs",
        *(m.h_s_input, m.h_s_cells, m.h_s_output),
    )
    for k, prior in enumerate(model.priors):
        for kind, variables in prior.parameters().items():
            weights.update({f"entropy_iter{k}/{kind}_{n}": variable for n, variable in enumerate(variables)})
    return model, weights


def _table(path, reader, scope, rows, offset=None):
    """CodingTable from a padded matrix of cumulative frequencies and its rows' lengths; offset: None for rows that are symmetric about 0."""
    from goconv_tf.entropy import CodingTable
    from goconv_tf.entropy.tables import PRECISION

    cdf, lengths = _read(path, reader, f"{scope}/quantized_cdf"), _read(path, reader, f"{scope}/cdf_length")
    integers = cdf.dtype.kind == lengths.dtype.kind == "i"
    if not integers or cdf.ndim != 2 or len(cdf) != rows or lengths.shape != (rows,) or (lengths < 2).any() or (lengths > cdf.shape[1]).any():
        found = f"{cdf.dtype} {cdf.shape} with lengths {lengths.dtype} {lengths.shape}"
        raise CheckpointError(f"{path}: {scope}/quantized_cdf: {found} is not a table of {rows} rows")
    offset = -((lengths - 3) // 2) if offset is None else offset
    table = CodingTable([value for row, length in zip(cdf, lengths) for value in (-PRECISION, *row[:length])], offset)
    try:
        table.check(rows)
    except ValueError as error:
        raise CheckpointError(f"{path}: {scope}/quantized_cdf: {error}") from error
    return table
