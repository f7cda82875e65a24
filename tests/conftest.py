"""Pictures that the tests draw, and models that they share (tracing is slow)."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Two test processes share the cores: threads of their own would only wait for each other.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import glob
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHECKPOINTS = sorted(map(os.path.dirname, glob.glob(os.path.join(ROOT, "checkpoints", "*", "config.json"))))


def pytest_collection_modifyitems(items):
    """The longest file first, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_training.py")


def draw(height, width, seed=0):
    """A picture with smooth colours, edges and a little noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    picture = np.stack([128 + 90 * np.sin(x / rng.uniform(9, 40) + y / rng.uniform(9, 40) + rng.uniform(0, 6)) for _ in range(3)], axis=-1)
    for _ in range(6):
        top, left = rng.integers(height), rng.integers(width)
        picture[top : top + rng.integers(4, 60), left : left + rng.integers(4, 60)] = rng.uniform(0, 255, 3)
    return np.clip(picture + rng.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def lively(model, seed=0):
    """Gives an untrained octave model latents that spread over several integers, and entropy parameters that vary."""
    import tensorflow as tf

    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if "/bias" in variable.name:
            variable.assign(rng.normal(0, 0.1, variable.shape))
    x = tf.constant(draw(128, 128))[None]
    if model.config.model == "crpe":
        spreads = [(model.g_a, "y", 4.0), (model.h_a1, "z1", 2.0)] + ([(model.h_a2, "z2", 2.0)] if model.config.second_hyper else [])
        hyper, estimations = ([getattr(model, name) for name in names if hasattr(model, name)] for names in (("h_s1", "h_s2"), ("f_y", "f_z")))
    else:
        spreads, hyper, estimations = [(model.g_a, "y", 4.0), (model.h_a, "z", 2.0)], [model.h_s], [model.f_pe]
    for layers, kind, spread in spreads:
        layer = layers[-1]
        for name, convs in ((f"{kind}_high", (layer.high, layer.up)), (f"{kind}_low", (layer.low, layer.down))):
            gain = spread / np.std(model.analysis(x, tf.constant([0.01]))[name])
            for conv in convs:
                for variable in conv.trainable_variables:
                    variable.assign(gain * variable)
    # Scales that fit: the second half of the channels is large and varies.
    for layers in hyper:
        bias = layers[-1].low.bias_parameter
        bias.assign(np.concatenate([rng.normal(0, 1, bias.shape[0] // 2), rng.uniform(2, 6, bias.shape[0] // 2)]))
    if hasattr(model, "fusion"):  # passes the first layer's parameters on, and hears the second
        for fusion in [model.fusion, model.fusion_scale] if model.config.separate_fusion else [model.fusion]:
            kernel = 0.2 * fusion.kernel.numpy()
            kernel[2, 2, : fusion.filters] += np.eye(fusion.filters)
            fusion.kernel_parameter.set_value(kernel)
    for layers in estimations:
        layers[1].bias_parameter.assign_add(np.full(layers[1].filters, 1.0))
        kernel = layers[-1].kernel.numpy()
        kernel[..., kernel.shape[-1] // 2 :] += rng.uniform(0, 0.6, kernel[..., kernel.shape[-1] // 2 :].shape)
        layers[-1].kernel_parameter.rdft.assign(kernel.reshape(1, -1))
    model.__dict__.pop("_stages", None)
    return model


def lively_rnn(model, seed=0):
    """The same for a ScalableRNN."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if "/bias" in variable.name:
            variable.assign(rng.normal(0, 0.1, variable.shape))
    for name in ("g_a_cells", "h_a_cells", "h_s_cells", "g_s_cells"):
        for cell in getattr(model, name, ()):
            for conv in (cell.conv_inputs, cell.conv_hidden):
                conv.kernel.assign(3 * conv.kernel)
    for name, gain in {"g_a_output": 20, "h_a_output": 20, "h_s_output": 5, "g_s_output": 5}.items():
        if hasattr(model, name):
            getattr(model, name).kernel.assign(gain * getattr(model, name).kernel)
    if model.config.hyperprior:
        model.h_s_output.bias.assign(rng.uniform(2, 6, model.h_s_output.bias.shape))
    return model


def _save_tiny(tmp_path_factory, kind, name, seed, enliven):
    """Path of a model folder of a kind's tiny preset."""
    import tensorflow as tf

    from goconv_tf import presets, zoo

    tf.keras.utils.set_random_seed(seed)
    path = str(tmp_path_factory.mktemp(f"zoo_{kind}") / name)
    zoo.save_pretrained(enliven(zoo.new_model(presets.get_preset(kind, "tiny"))), path, name)
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A model folder of the tiny variable-rate preset, named "tiny-test"."""
    return _save_tiny(tmp_path_factory, "variable_rate", "tiny-test", 1, lively)


@pytest.fixture(scope="session")
def crpe_dir(tmp_path_factory):
    """A model folder of the tiny CRPE preset, named "tiny-crpe"."""
    return _save_tiny(tmp_path_factory, "crpe", "tiny-crpe", 4, lively)


@pytest.fixture(scope="session")
def rnn_dir(tmp_path_factory):
    """A model folder of the tiny scalable preset, three layers, named "tiny-rnn"."""
    return _save_tiny(tmp_path_factory, "scalable_rnn", "tiny-rnn", 2, lively_rnn)


def _load(path):
    from goconv_tf import zoo

    return zoo.load_pretrained(path)


@pytest.fixture(scope="session")
def model(model_dir):
    """The loaded, folded model of `model_dir`."""
    return _load(model_dir)


@pytest.fixture(scope="session")
def crpe(crpe_dir):
    """The loaded, folded model of `crpe_dir`."""
    return _load(crpe_dir)


@pytest.fixture(scope="session")
def rnn(rnn_dir):
    """The loaded model of `rnn_dir`."""
    return _load(rnn_dir)


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    """Path of a PNG, 150 x 203 pixels."""
    path = str(tmp_path_factory.mktemp("photo") / "photo.png")
    Image.fromarray(draw(150, 203)).save(path)
    return path


@pytest.fixture
def command_here(model_dir, rnn_dir, crpe_dir, monkeypatch, capsys):
    """The same in this process, which saves starting TensorFlow; for what needs no process of its own."""

    def run(*args, module="goconv_tf.__main__"):
        monkeypatch.setenv("GOCONV_TF_ZOO", os.pathsep.join(map(os.path.dirname, (model_dir, rnn_dir, crpe_dir))))
        main = load_script(module) if os.sep in module else importlib.import_module(module)
        capsys.readouterr()
        status = getattr(main, "run" if hasattr(main, "run") else "main")(main.make_parser().parse_args(list(map(str, args))))
        out = capsys.readouterr()
        return subprocess.CompletedProcess(args, status, out.out, out.err)

    return run


def load_script(path):
    """A script of experiments/ as a module."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(model_dir, rnn_dir, crpe_dir):
    """Runs `python -m MODULE ARGS` in a process of its own, with the test models in the zoo."""

    def run(*args, module="goconv_tf", timeout=200):
        env = {**os.environ, "GOCONV_TF_ZOO": os.pathsep.join(map(os.path.dirname, (model_dir, rnn_dir, crpe_dir))), "PYTHONPATH": ROOT}
        return subprocess.run([sys.executable, "-m", module, *map(str, args)], env=env, capture_output=True, text=True, timeout=timeout, check=False)

    return run
