"""SOAP against its formulas in NumPy, and what it is for."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from goconv_tf.layers import RDFTKernel
from goconv_tf.optimizers import Adam, Soap


def turned(x, bases, back=False):
    """x [a, b, c] with each axis multiplied by its basis."""
    for axis, basis in bases.items():
        x = np.moveaxis(np.tensordot(x, basis.T if back else basis, axes=[axis, 0]), -1, axis)
    return x


class Reference:
    """SOAP of one tensor [positions, inputs, outputs] in float64, written from the paper's Algorithm 3, with the bound on a step."""

    def __init__(self, value, axes, rate, beta_1, beta_2, epsilon, shampoo_beta, sampling, renewal):
        self.value, self.rate, self.betas, self.epsilon = value.astype(np.float64), rate, (beta_1, beta_2), epsilon
        self.shampoo_beta, self.sampling, self.renewal = shampoo_beta, sampling, renewal
        self.moments = {axis: np.zeros([value.shape[axis]] * 2) for axis in axes}
        self.bases = {axis: np.eye(value.shape[axis]) for axis in axes}
        self.mean, self.square = np.zeros_like(self.value), np.zeros_like(self.value)  # mean: in the kernel's own coordinates

    def step(self, t, gradient):
        if t % self.sampling == 0:
            for axis, moment in self.moments.items():
                flat = np.moveaxis(gradient, axis, 0).reshape(gradient.shape[axis], -1)
                self.moments[axis] = self.shampoo_beta * moment + (1 - self.shampoo_beta) * flat @ flat.T
        if t % self.renewal == 0:  # one power iteration, the largest eigenvalue first
            for axis, moment in self.moments.items():
                image = moment @ self.bases[axis]
                order = np.argsort(-np.sum(self.bases[axis] * image, axis=0), kind="stable")
                self.bases[axis] = np.linalg.qr(image[:, order])[0]
                self.square = np.take(self.square, order, axis)
        if t == 0:
            return
        beta_1, beta_2 = self.betas
        self.mean = beta_1 * self.mean + (1 - beta_1) * gradient
        self.square = beta_2 * self.square + (1 - beta_2) * turned(gradient, self.bases) ** 2
        mean = turned(self.mean, self.bases) / (1 - beta_1**t)
        step = mean / (np.sqrt(self.square / (1 - beta_2**t)) + self.epsilon)
        self.value -= self.rate * turned(np.clip(step, -1, 1), self.bases, back=True)


# No axis is longer than the others together: its first eigenvectors would be arbitrary.
@pytest.mark.parametrize("shape, axes", [((3, 3, 4, 6), (0, 1, 2)), ((1, 1, 5, 5), (1, 2)), ((6, 6), (1, 2)), ((3, 3, 12, 4), (0, 2))])
def test_soap_is_the_papers(shape, axes):
    rng = np.random.default_rng(0)
    value = rng.normal(size=shape).astype(np.float32)
    view = (int(np.prod(shape[:-2])), *shape[-2:])
    settings = {"beta_1": 0.9, "beta_2": 0.95, "epsilon": 1e-6, "shampoo_beta": 0.8, "sampling": 2, "renewal": 4}
    reference = Reference(value.reshape(view), axes, 0.01, **settings)
    variable, optimizer = tf.Variable(value), Soap(0.01, largest=9, jit_compile=False, **settings)
    optimizer.build([variable])
    scale = np.geomspace(1, 0.3, view[1])[:, None] * np.geomspace(1, 0.1, view[2])
    for t in range(11):
        gradient = scale * rng.normal(size=view) + 0.1 * scale
        optimizer.apply_gradients([(tf.constant(gradient.reshape(shape), tf.float32), variable)])
        reference.step(t, gradient)
        np.testing.assert_allclose(variable.numpy().reshape(view), reference.value, atol=2e-4, err_msg=f"step {t}")
    assert np.abs(reference.value - value.reshape(view)).max() > 0.05


def test_soap_turns_rdft_kernels_by_their_channels_and_leaves_vectors_to_adam():
    kernel = RDFTKernel(tf.random.stateless_normal([5, 5, 2, 3], [0, 1]))
    bias = tf.Variable([1.0, -2.0])
    soap, adam = Soap(0.01, jit_compile=False), Adam(0.01, beta_1=0.95, beta_2=0.99, epsilon=1e-8)
    soap.build([kernel.rdft, bias])
    assert [tuple(v.shape) for v in soap._bases[0]] == [(25, 25), (2, 2), (3, 3)] and not soap._bases[1]
    twin = tf.Variable(bias)
    for k in range(3):
        gradient = tf.constant([0.3, -1.0 * k])
        soap.apply_gradients([(tf.ones_like(kernel.rdft), kernel.rdft), (gradient, bias)])
        adam.apply_gradients([(gradient, twin)])
    np.testing.assert_allclose(bias, twin, rtol=1e-6)


def test_soap_beats_adam_where_coordinates_are_mixed(tmp_path):
    """Least squares whose curvatures span four decades along directions that are no axes; and a saved optimizer goes on as if never stopped."""
    rng = np.random.default_rng(0)
    matrix = tf.constant(
        np.linalg.qr(rng.normal(size=(24, 24)))[0] * np.geomspace(1, 0.01, 24) @ np.linalg.qr(rng.normal(size=(24, 24)))[0], tf.float32
    )
    target = tf.constant(rng.normal(size=(24, 16)), tf.float32)

    def runner(optimizer):
        variable = tf.Variable(tf.zeros([24, 16]))
        optimizer.build([variable])
        saved = tf.train.Checkpoint(variable=variable, optimizer=optimizer)

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(matrix @ (variable - target)))
            optimizer.minimize(loss, [variable], tape=tape)
            return loss

        return saved, lambda steps: [float(step()) for _ in range(steps)]

    _, run = runner(Adam(0.03))
    adam = run(400)
    saved, run = runner(Soap(0.03, jit_compile=False))
    first, path = run(205), saved.save(str(tmp_path / "save"))
    soap = run(195)
    assert soap[-1] < 0.2 * adam[-1] < 0.2 * first[0]
    again, run = runner(Soap(0.03, jit_compile=False))
    again.restore(path).assert_consumed()
    assert run(195) == soap


def test_soap_on_two_devices_is_soap_on_one():
    """In a process of its own, with two virtual devices."""
    code = """
import numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
from goconv_tf.layers import RDFTKernel
from goconv_tf.optimizers import Soap
results = []
for strategy in (tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), tf.distribute.get_strategy()):
    with strategy.scope():
        kernel = RDFTKernel(tf.random.stateless_normal([3, 3, 4, 4], [0, 1]))
        optimizer = Soap(0.01, jit_compile=False)
        optimizer.build([kernel.rdft])
    replicas = strategy.num_replicas_in_sync
    @tf.function
    def step(seed):
        def replica():
            share = tf.random.stateless_normal(kernel.rdft.shape, [seed, 0]) / replicas
            optimizer.apply_gradients([(share, kernel.rdft)])
        strategy.run(replica)
    for seed in range(12):
        step(tf.constant(seed))
    copies = strategy.experimental_local_results(kernel.rdft)
    assert len(copies) == replicas
    results += [copy.numpy() for copy in copies]
for result in results[:2]:
    np.testing.assert_allclose(result, results[2], atol=1e-5)
"""
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_averages_of_short_runs_are_of_what_was_learned():
    """Not of the first weights, which 0.999 a step would keep for thousands of steps; Keras' own averages in the long run."""
    optimizer = Adam(0.1, use_ema=True, ema_momentum=0.75)
    variable = tf.Variable([4.0])
    optimizer.build([variable])
    expected = 4.0
    for step in range(40):
        optimizer.apply_gradients([(2 * variable, variable)])
        momentum = min(0.75, (1 + step) / (10 + step))
        expected = momentum * expected + (1 - momentum) * float(variable[0])
    optimizer.finalize_variable_values([variable])
    assert float(variable[0]) == pytest.approx(expected, rel=1e-5)


def test_soap_config_round_trip():
    settings = {"shampoo_beta": 0.8, "sampling": 3, "renewal": 5, "largest": 9}
    again = Soap.from_config(Soap(0.01, **settings).get_config())
    assert {name: getattr(again, name) for name in settings} == settings
