"""Our side of the comparisons: a JSON request a line in, an answer a line out.

{"model": "variable_rate", "preset": "base", "filters": 192}   makes it, untrained
{"model": "crpe-small-mse-0.01"}                               loads it
{"image": "kodim01.png", "exact": false, "layers": 2}          codes a picture and decodes it
{"image": "kodim01.png", "jpeg2000": 0.5}                      codes it by JPEG 2000 at so many bits per pixel
{"peak": "kodim01.png"}                                        GFLOP/s of analysis and synthesis, beside those of a matrix product
{"symbols": "a.npz", "image": "kodim01.png"}                   coders on the integers of y_high, which a.npz then holds
{"sizes": 24, "image": "kodim01.png"}                          how many functions pictures of so many sizes compile
{"train": "small", "model": "crpe", "variant": "plain"}        seconds of a training step
"""

import contextlib
import importlib.metadata
import os
import tempfile
import time

from clock import answer_requests, entropy_coding, measure, repeat

import goconv_tf  # noqa: F401  # before NumPy, whose kernels it chooses

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc

from goconv_tf import codec, data, evaluation, picture_io, presets, training, zoo
from goconv_tf.entropy import CODERS, Encoder
from goconv_tf.layers import Conv2D, SignalConv2D

state = {}


def load(request):
    """A model of the zoo, or an untrained one through a folder of its own, as a user would load it."""
    if "preset" not in request:
        return zoo.load_pretrained(request["model"])
    tf.keras.utils.set_random_seed(0)
    config = presets.get_preset(request["model"], request["preset"]).adapt(request.get("filters", 0), request.get("latents", 0), ())
    with tempfile.TemporaryDirectory() as folder:
        zoo.save_pretrained(zoo.new_model(config), folder, "untrained")
        return zoo.load_pretrained(folder)


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def count_macs(model, height, width):
    """{stage: multiply-adds} of coding and decoding one picture, from the shapes that its layers meet."""
    counts = {"analysis": 0, "entropy parameters": 0, "synthesis": 0}
    part_of = {id(layer): "entropy parameters" for layer in model.exact_layers().values()}
    for name, value in vars(model).items():
        if name.startswith("g_s"):
            part_of.update((id(layer), "synthesis") for part in tf.nest.flatten(value) for layer in part.submodules + (part,))

    def counting(method):
        def counted(self, inputs, *args):
            outputs = method(self, inputs, *args)
            positions = inputs.shape[1:3] if getattr(self, "_transpose", False) else outputs.shape[1:3]
            # By the layer's own kernel, however it is computed.
            size = self.kernel_support if isinstance(self, SignalConv2D) else self.kernel_size
            counts[part_of.get(id(self), "analysis")] += int(np.prod(positions)) * size[0] ** 2 * inputs.shape[-1] * self.filters
            return outputs

        return counted

    x, lmbda = tf.zeros([1, height, width, 3], tf.uint8), tf.constant([0.01])
    with replaced(SignalConv2D, "_convolve", counting(SignalConv2D._convolve)), replaced(Conv2D, "call", counting(Conv2D.call)):
        tf.config.run_functions_eagerly(True)  # so that all sizes are known
        try:
            model.pictures(model.walk(Tracer(model.analysis(x, lmbda), None)), lmbda)
        finally:
            tf.config.run_functions_eagerly(False)
    return counts


def jpeg2000(picture, bpp):
    """Seconds of JPEG 2000 at a rate, through Pillow."""
    coding = evaluation.PillowSubject("jpeg2000").code(picture, {"rate": 24 / bpp})
    return {"encode": {"seconds": coding.encoding_time}, "decode": {"seconds": coding.decoding_time}, "bytes": len(coding.data)}


class Tracer(Encoder):
    """Visits the latents without coding them."""

    def __call__(self, name, model, *parameters):
        return tf.cast(self.latents[name], tf.float32) + 0.0 * model.offset(*parameters)


def peak(model, path):
    """GFLOP/s of float32 and float64 matrix products and of the two transforms, taking turns."""
    x = picture_io.read_picture(path)[None]
    lmbda = tf.constant([0.01])
    latents = model.transform(tf.constant(x), lmbda)
    single = tf.random.normal([3000, 3000])
    double = np.random.default_rng(0).normal(size=(1500, 1500))
    product = tf.function(lambda a: tf.matmul(a, a), autograph=False)
    macs = count_macs(model, *x.shape[1:3])
    # y is what transform gives; the hyper analysis is counted with it but is a stage of its own.
    picture = tf.constant(x)
    actions = {
        "float32": (2 * 3000**3, lambda: product(single).numpy()),
        "float64": (2 * 1500**3, lambda: double @ double),
        "analysis": (2 * macs["analysis"], lambda: model.analysis(picture, lmbda)["z_low" if "z_low" in model.latent_names else "z1_low"].numpy()),
        "synthesis": (2 * macs["synthesis"], lambda: model.synthesis(latents, lmbda).numpy()),
    }
    seconds = repeat({name: action for name, (_, action) in actions.items()}, 7)
    return {name: {"seconds": seconds[name], "gflops": flops / seconds[name] / 1e9} for name, (flops, _) in actions.items()}


def coders(model, path, npz):
    """Symbols a second of both coders, on the integers of y_high and their tables, saved for the peer."""
    caught = {}
    encode = CODERS["tfc"].encode

    def catch(symbols, indexes, table):
        caught.update(symbols=symbols, indexes=indexes, table=table)  # y_high comes last
        return encode(symbols, indexes, table)

    with replaced(CODERS["tfc"], "encode", catch):
        codec.compress(model, picture_io.read_picture(path))
    symbols, indexes, table = caught["symbols"], caught["indexes"], caught["table"]
    rows = table.rows[:-2]
    widest = max(map(len, rows))
    cdf = np.array([row + [0] * (widest - len(row)) for row in rows], np.int32)
    np.savez(npz, symbols=symbols, indexes=indexes, cdf=cdf, lengths=[len(row) for row in rows], offset=table.offset)
    answer = {}
    for name, coder in CODERS.items():
        string = coder.encode(symbols, indexes, table)
        seconds = repeat(
            {"encode": lambda c=coder: c.encode(symbols, indexes, table), "decode": lambda c=coder, s=string: c.decode(s, indexes, table)}, 7
        )
        answer[name] = {**{key: len(symbols) / value for key, value in seconds.items()}, "bytes": len(string)}
    return {"symbols": len(symbols), "coders": answer}


def compiled_functions(model, path, count):
    """Traces after each of `count` pictures of different sizes."""
    picture = picture_io.read_picture(path)
    traces = []
    for k in range(count):
        part = picture[: 200 + 7 * k, : 300 + 11 * k]
        codec.decompress(model, codec.compress(model, part).data)
        traces.append(sum(f.experimental_get_tracing_count() for f in model._stages.values()))
    return {"traces": traces}


def plain(self, inputs, factors=None):
    """tfc.SignalConv2D as it is, with the factors applied to its output."""
    outputs = tfc.SignalConv2D.call(self, inputs)
    return outputs if factors is None else outputs * tf.cast(factors, outputs.dtype)


def train_step(request):
    """Seconds of a training step, of `variant`: ours, plain (tfc's layers, Keras' Adam), bfloat16, xla."""
    variant, patch, batch = request["variant"], request.get("patch", 128), request.get("batch", 8)
    options = training.Options(request["model"], request["train"], ("-",), "-", lr=1e-4, clip_norm=1.0)
    tf.keras.utils.set_random_seed(0)
    config = presets.get_preset(request["model"], request["train"])
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16" if variant == "bfloat16" else "float32")
    with contextlib.ExitStack() as stack:
        optimizer = training.make_optimizer(options)
        if variant == "plain":
            stack.enter_context(replaced(SignalConv2D, "call", plain))
            stack.enter_context(replaced(SignalConv2D, "build", lambda self, shape: tfc.SignalConv2D.build(self, shape)))
            optimizer = tf.keras.optimizers.Adam(1e-4, global_clipnorm=1.0, use_ema=True, jit_compile=False)
        model = zoo.new_model(config)
        model.compile(optimizer=optimizer, jit_compile=variant == "xla")
        rng = np.random.default_rng(0)
        x = tf.constant(rng.integers(0, 256, (batch, patch, patch, 3)), tf.uint8)
        lmbda = getattr(config, "lmbda_min", 0.01)
        feed = (x, tf.fill([batch], float(lmbda)), tf.zeros([batch, 2], tf.int32), tf.zeros([batch], tf.int32))
        step = tf.function(model.train_step, autograph=False, jit_compile=variant == "xla")
        seconds = repeat({"step": lambda: step(feed)["loss"].numpy()}, request.get("steps", 10))["step"]
    tf.keras.mixed_precision.set_global_policy("float32")
    return {"step": seconds}


def pipeline(folder, patch=128, batch=8, count=40):
    """Seconds of drawing a batch, by one thread, pictures decoded."""
    source = data.PatchSource(data.find_pictures([folder]), patch, batch, [0.01])
    for step in range(count):
        source(step)
    begin = time.perf_counter()
    for step in range(count):
        source(step)
    return {"batch": (time.perf_counter() - begin) / count}


def answer(request):
    if "train" in request:
        return train_step(request)
    if "pipeline" in request:
        return pipeline(request["pipeline"])
    if "model" in request:
        state["model"] = model = load(request)
        versions = {
            "tensorflow": tf.__version__,
            "tensorflow_compression": importlib.metadata.version("tensorflow_compression"),
            "numpy": np.__version__,
        }
        result = {"parameters": model.count_params(), "versions": versions}
        return {**result, "macs": count_macs(model, 512, 768)}
    model = state["model"]
    if "peak" in request:
        return peak(model, request["peak"])
    if "symbols" in request:
        return coders(model, request["image"], request["symbols"])
    if "sizes" in request:
        return compiled_functions(model, request["image"], request["sizes"])
    picture = picture_io.read_picture(request["image"], 10**9)
    if "jpeg2000" in request:
        return jpeg2000(picture, request["jpeg2000"])
    options = {"layers": request.get("layers"), "exact": request.get("exact", True)}
    coded, encode = measure(lambda: codec.compress(model, picture, **options))
    _, decode = measure(lambda: codec.decompress(model, coded.data, 10**9))
    return {"encode": encode, "decode": decode, "bytes": len(coded.data), "bpp": coded.bpp}


if __name__ == "__main__":
    coder = CODERS["tfc"]
    coder.encode, coder.decode = entropy_coding(coder.encode), entropy_coding(coder.decode)
    answer_requests(answer)
