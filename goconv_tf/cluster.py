"""Training on several machines: who they are, what each is given, and how they agree to stop."""

import concurrent.futures
import contextlib
import json
import os

import tensorflow as tf

from goconv_tf.errors import GoConvError, UsageError, first_line


def make_resolver(cluster="auto", port=8888):
    """The cluster resolver of this process.

    Args:
      cluster: "tf_config", the JSON in $TF_CONFIG; "slurm", the variables of a Slurm job step; "auto", whichever is there.
      port: of the first process on each host under Slurm; the next ones take the next ports.

    Raises:
      UsageError: if the environment does not describe a cluster.
    """
    if cluster == "auto":
        cluster = "tf_config" if "TF_CONFIG" in os.environ else "slurm"
        if cluster == "slurm" and "SLURM_STEP_NUM_TASKS" not in os.environ:
            raise UsageError("--strategy multi_worker needs $TF_CONFIG, or a Slurm job step (srun)")
    return _from_slurm(port) if cluster == "slurm" else _from_tf_config()


def _from_tf_config():
    try:
        config = json.loads(os.environ.get("TF_CONFIG", ""))
        kind, index = config["task"]["type"], int(config["task"]["index"])
        if kind not in ("chief", "worker") or not 0 <= index < len(config["cluster"][kind]):
            raise ValueError(f"there is no {kind} {index}")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"$TF_CONFIG does not describe a cluster and this task: {type(error).__name__}: {error}") from error
    return tf.distribute.cluster_resolver.TFConfigClusterResolver()


def _from_slurm(port):
    # TensorFlow's resolver counts tasks by their GPUs, and fails where there is none. Slurm itself shows each task its own.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    gpus = {"gpus_per_node": int(tasks) if tasks.isdigit() else 0, "gpus_per_task": 1, "auto_set_gpu": False}
    try:
        found = tf.distribute.cluster_resolver.SlurmClusterResolver(port_base=port, **gpus)
        spec = found.cluster_spec()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f"the environment does not describe a Slurm job step: {error}") from error
    kind, index = found.get_task_info()
    visible = {"GPU": len(tf.config.list_physical_devices("GPU"))}
    return tf.distribute.cluster_resolver.SimpleClusterResolver(spec, task_type=kind, task_id=index, rpc_layer="grpc", num_accelerators=visible)


def make_strategy(cluster="auto", port=8888):
    """A MultiWorkerMirroredStrategy, before anything else of TensorFlow is used; UsageError as `make_resolver`."""
    resolver = make_resolver(cluster, port)
    tf.get_logger().setLevel("WARNING")  # it tells of every sum
    return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)


def spans_machines(strategy) -> bool:
    """Whether the strategy has other processes."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def is_chief(strategy) -> bool:
    """Whether this process writes what a run leaves."""
    return not spans_machines(strategy) or strategy.extended.should_checkpoint


def dataset(source, start, strategy):
    """`PatchSource.dataset` for `fit`: every process draws the same batches and takes its share of each, in order."""
    if not spans_machines(strategy):
        return source.dataset(start)

    def shares(context):
        replicas = strategy.num_replicas_in_sync
        here = replicas // context.num_input_pipelines
        size = source.batch // replicas
        first = context.input_pipeline_id * here * size

        def split(*batch):
            pieces = (tf.reshape(part[first : first + here * size], [here, size, *part.shape[1:]]) for part in batch)
            return tf.data.Dataset.from_tensor_slices(tuple(pieces))

        return source.dataset(start).flat_map(split)

    return strategy.distribute_datasets_from_function(shares)


def make_total(strategy):
    """A function that adds up an integer over all devices of all processes, each of which has to call it; of one process the integer itself."""
    if not spans_machines(strategy):
        return int

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)], autograph=False)
    def total(number):
        return strategy.reduce("SUM", strategy.run(tf.identity, [number]), axis=None)

    return lambda number: int(total(tf.constant(int(number), tf.int64)))


def share(strategy, variables):
    """Gives all processes the chief's values: what each computed itself may differ by the machine."""
    if not spans_machines(strategy):
        return

    def values_of_first():
        first = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, 0)
        return [tf.where(first, v, tf.zeros_like(v)) for v in variables]

    @tf.function(autograph=False)
    def total():
        return [strategy.reduce("SUM", values, axis=None) for values in strategy.run(values_of_first)]

    for variable, value in zip(variables, total()):
        variable.assign(value)


def alone(strategy, action):
    """action() of this process only: outside the strategy's scope, where a new variable would wait for the other processes."""
    if not spans_machines(strategy):
        return action()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # scopes belong to threads
        return thread.submit(action).result()


@contextlib.contextmanager
def lost_workers(strategy, folder):
    """Turns what TensorFlow makes of a process that is gone into a GoConvError."""
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError) as error:
        if not spans_machines(strategy):
            raise
        raise GoConvError(f"another worker is gone ({first_line(error)}); start all of them again to go on from the last save in {folder}") from error
