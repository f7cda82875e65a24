"""The optimizers of the training command, and its schedule of rates."""

import functools
import math

import tensorflow as tf


@tf.keras.saving.register_keras_serializable("goconv_tf")
class Schedule(tf.keras.optimizers.schedules.LearningRateSchedule):
    """A rate that rises in equal parts over the first `warmup` steps, and is multiplied by `factor` at each of `boundaries` (steps).

    Also without boundaries: a plain number would be saved with the optimizer, and a resumed run
    would not heed a new --lr.
    """

    def __init__(self, rate, boundaries=(), factor=1.0, warmup=0):
        self.rate, self.boundaries, self.factor, self.warmup = rate, list(boundaries), factor, warmup

    def __call__(self, step):
        drops = sum(tf.cast(step >= boundary, tf.float32) for boundary in self.boundaries)
        rate = self.rate * tf.pow(tf.constant(self.factor, tf.float32), drops)
        return rate * tf.minimum((tf.cast(step, tf.float32) + 1) / self.warmup, 1) if self.warmup else rate

    def get_config(self):
        return {"rate": self.rate, "boundaries": self.boundaries, "factor": self.factor, "warmup": self.warmup}


class Adam(tf.keras.optimizers.Adam):
    """Keras' Adam with TensorFlow's fused kernel: the same formula, one operation a variable instead of twenty.

    Arguments as there; ValueError for amsgrad, which it does not have.
    """

    def __init__(self, *args, amsgrad=False, **kwargs):
        if amsgrad:
            raise ValueError("there is no amsgrad here")
        super().__init__(*args, **kwargs)

    def update_step(self, gradient, variable):
        index = self._index_dict[self._var_key(variable)]
        moments = self._momentums[index], self._velocities[index]
        _adam(variable, *moments, gradient, self.learning_rate, self.iterations + 1, self.beta_1, self.beta_2, self.epsilon)

    def _update_model_variables_moving_average(self, var_list):
        """As Keras has it, but early averages go back a tenth of the steps only: else short runs would export mostly what they began with."""
        momentum = self.ema_momentum
        step = tf.cast(self.iterations, tf.float32)
        self.ema_momentum = tf.minimum(momentum, (1 + step) / (10 + step))
        super()._update_model_variables_moving_average(var_list)
        self.ema_momentum = momentum


def _adam(variable, mean, square, gradient, rate, step, beta_1, beta_2, epsilon):
    """Adam's step number `step`, from 1."""
    number = {
        "beta1_power": tf.pow(tf.cast(beta_1, variable.dtype), tf.cast(step, variable.dtype)),
        "beta2_power": tf.pow(tf.cast(beta_2, variable.dtype), tf.cast(step, variable.dtype)),
        "lr": rate,
        "beta1": beta_1,
        "beta2": beta_2,
        "epsilon": epsilon,
    }
    number = {name: tf.cast(value, variable.dtype) for name, value in number.items()}
    tf.raw_ops.ResourceApplyAdam(var=variable.handle, m=mean.handle, v=square.handle, grad=gradient, **number)


def _multiply(x, matrix, axis):
    """x [a, b, c] times matrix [n, n] along `axis`: sum over i of x[.., i, ..] matrix[i, j]."""
    if axis == 0:
        return tf.reshape(tf.matmul(matrix, tf.reshape(x, (x.shape[0], -1)), transpose_a=True), x.shape)
    if axis == 1:
        return tf.matmul(matrix[None], x, transpose_a=True)
    return tf.reshape(tf.matmul(tf.reshape(x, (-1, x.shape[2])), matrix), x.shape)


def _second_moment(x, axis):
    """[n, n] sums of products of x [a, b, c] along the two axes other than `axis`."""
    if axis == 0:
        flat = tf.reshape(x, (x.shape[0], -1))
        return tf.matmul(flat, flat, transpose_b=True)
    if axis == 1:
        return tf.reduce_sum(tf.matmul(x, x, transpose_b=True), axis=0)
    flat = tf.reshape(x, (-1, x.shape[2]))
    return tf.matmul(flat, flat, transpose_a=True)


class Soap(Adam):
    """SOAP (Vyas et al. 2024, arXiv 2409.11321, Algorithm 3): Adam in the eigenbasis of Shampoo's preconditioner.

    Kernels and matrices are seen as tensors [positions, inputs, outputs]. For each of these axes the
    optimizer averages the gradient's second moment, and Adam works on the gradient as seen from the
    eigenvectors of the three, where one rate per number fits better. Eigenvectors are renewed by one
    power iteration every `renewal` steps; the first step of all only finds them. No number moves by more
    than the rate, as seen from the eigenvectors (not in the paper; without it runs could break in the first
    tens of steps). Other variables (biases, factorized priors) are trained by Adam with the same betas.

    Args:
      learning_rate, beta_1, beta_2, epsilon: as in Adam.
      shampoo_beta: decay of the averages that the eigenvectors are of.
      sampling: steps between gradients that are taken into these averages.
      renewal: steps between renewals of the eigenvectors.
      largest: axes longer than this are left as they are.
      kwargs: as in tf.keras.optimizers.Adam.
    """

    def __init__(
        self,
        learning_rate=1e-3,
        beta_1=0.95,
        beta_2=0.99,
        epsilon=1e-8,
        shampoo_beta=0.98,
        sampling=2,
        renewal=10,
        largest=640,
        name="Soap",
        **kwargs,
    ):
        super().__init__(learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, name=name, **kwargs)
        self.shampoo_beta, self.sampling, self.renewal, self.largest = shampoo_beta, sampling, renewal, largest

    def get_config(self):
        own = {name: getattr(self, name) for name in ("shampoo_beta", "sampling", "renewal", "largest")}
        return {**super().get_config(), **own}

    def build(self, var_list):
        if getattr(self, "_built", False):
            return
        super().build(var_list)
        constants = {name: getattr(self, name) for name in ("beta_1", "beta_2", "epsilon", "shampoo_beta", "sampling", "renewal")}
        # Traced once for all variables of the same shape; a partial, as Keras would save a function.
        self._turned_adam = functools.partial(tf.function(_turned_adam, autograph=False), **constants)
        self._moments, self._bases, self._directions = [], [], []
        self._views = tuple(self._view(variable) for variable in var_list)
        for variable, (view, axes) in zip(var_list, self._views):
            sides = [view[axis] for axis in axes]
            self._moments.append([self.add_variable_from_reference(variable, "moment", (n, n), tf.zeros((n, n))) for n in sides])
            self._bases.append([self.add_variable_from_reference(variable, "basis", (n, n), tf.eye(n)) for n in sides])
            self._directions.append(self.add_variable_from_reference(variable, "direction", None if axes else ()))

    def _view(self, variable):
        """((positions, inputs, outputs) of a kernel or matrix, the axes that are turned: none of other variables)."""
        shape = getattr(variable, "kernel_shape", None) or tuple(variable.shape)
        if len(shape) not in (2, 4):
            return (1, 1, 1), ()
        view = (math.prod(shape[:-2]), *shape[-2:])
        return view, tuple(axis for axis, n in enumerate(view) if 1 < n <= self.largest)

    def update_step(self, gradient, variable):
        index = self._index_dict[self._var_key(variable)]
        view, axes = self._views[index]
        if not axes:
            super().update_step(gradient, variable)
            return
        self._turned_adam(
            tf.reshape(gradient, view),
            variable,
            self._momentums[index],
            self._velocities[index],
            self._directions[index],
            self._moments[index],
            self._bases[index],
            self.iterations,
            tf.cast(self.learning_rate, variable.dtype),
            axes=axes,
        )


def _turned_adam(
    gradient, variable, mean, square, direction, moments, bases, step, rate, *, axes, beta_1, beta_2, epsilon, shampoo_beta, sampling, renewal
):
    """One step of `Soap` on `variable`; `direction` is space for Adam's step as seen from the eigenvectors."""
    view, shape = gradient.shape, variable.shape

    def sample():
        for axis, moment in zip(axes, moments):
            moment.assign(shampoo_beta * moment + (1 - shampoo_beta) * _second_moment(gradient, axis))

    def renew():
        m, v = tf.reshape(mean, view), tf.reshape(square, view)
        for axis, moment, basis in zip(axes, moments, bases):
            m = _multiply(m, tf.transpose(basis), axis)
            image = tf.matmul(moment, basis)
            order = tf.argsort(tf.reduce_sum(basis * image, axis=0), direction="DESCENDING")
            basis.assign(tf.linalg.qr(tf.gather(image, order, axis=1))[0])
            m, v = _multiply(m, basis, axis), tf.gather(v, order, axis=axis)
        mean.assign(tf.reshape(m, shape))
        square.assign(tf.reshape(v, shape))

    _when(tf.equal(step % sampling, 0), sample)
    _when(tf.equal(step % renewal, 0), renew)
    turned = gradient
    for axis, basis in zip(axes, bases):
        turned = _multiply(turned, basis, axis)
    # The eigenvectors of the first gradient alone would make one number of it in a few, and noise of the others.
    turned = tf.reshape(turned, shape) * tf.cast(step > 0, gradient.dtype)
    direction.assign(tf.zeros(shape))
    _adam(direction, mean, square, turned, rate, tf.maximum(step, 1), beta_1, beta_2, epsilon)
    # Where new eigenvectors meet squares averaged over others, a quotient can be far above the 1 that Adam's are at most.
    update = tf.reshape(tf.clip_by_value(direction, -rate, rate), view)
    for axis, basis in zip(axes, bases):
        update = _multiply(update, tf.transpose(basis), axis)
    variable.assign_add(tf.reshape(update, shape))


def _when(condition, do):
    """do() where the boolean tensor `condition` is true."""

    def branch():
        do()
        return tf.constant(0)

    tf.cond(condition, branch, lambda: tf.constant(0))
