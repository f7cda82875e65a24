"""Two processes of one run, on this machine: the same losses as one, and what happens when one is killed."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, draw
from PIL import Image

from goconv_tf import cluster, training, zoo
from goconv_tf.errors import UsageError

FLAGS = dict(lambdas="0.01,0.05", preset="tiny", patchsize=64, batchsize=4, lr=1e-3, clip_norm=1.0, last_step=9, save_steps=3)


@pytest.fixture
def start(tmp_path):
    """A function that starts both workers of a run; they do not outlive the test. A flag may be a pair of values, one for each."""
    started = []

    def start(photos, folder, **changes):
        flags = {**FLAGS, "train_glob": photos, "checkpoint_dir": folder, "strategy": "multi_worker", **changes}
        addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        for index in range(2):
            given = {name: value[index] if isinstance(value, tuple) else value for name, value in flags.items()}
            args = [sys.executable, "-m", "goconv_tf.train", *(f"--{name}={value}" for name, value in given.items()), "--notensorboard"]
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            env = {**os.environ, "PYTHONPATH": ROOT, "TF_CONFIG": json.dumps(task)}
            started.append(subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-2:]

    yield start
    for process in started:
        process.kill()


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def read_log(folder):
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def test_two_workers_equal_one_also_after_one_was_killed(start, tmp_path, model_dir):
    photos, one, two = (str(tmp_path / name) for name in ("photos", "one", "two"))
    os.mkdir(photos)
    for k in range(4):
        Image.fromarray(draw(70 + k, 90, seed=k)).save(os.path.join(photos, f"{k}.png"))

    # What a start computes may depend on the machine: here one of the workers has got other weights.
    other = zoo.load_pretrained(model_dir, fold=False)
    for variable in other.trainable_variables:
        variable.assign(1.1 * variable)
    zoo.save_pretrained(other, str(tmp_path / "other"), "other")
    workers = start(photos, two, last_step=1000, warm_start=(model_dir, str(tmp_path / "other")))
    for line in workers[0].stdout:
        if line.startswith("step 6 "):
            workers[1].send_signal(signal.SIGKILL)
            break
    _, errors = workers[0].communicate(timeout=200)
    workers[1].communicate()
    # The chief does not wait for ever, nor end as if it had finished.
    assert workers[0].returncode == 1 and "another worker is gone" in errors, errors[-2000:]
    assert training.saved_step(os.path.join(two, "backup")) in (3, 6)

    workers = start(photos, two)
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], [errors[-2000:] for _, errors in outputs]
    assert "going on from step" in outputs[0][0] and "step 9 " in outputs[0][0] and outputs[1][0] == ""

    options = {**FLAGS, "lambdas": (0.01, 0.05), "train_glob": (photos,), "checkpoint_dir": one, "model": "variable_rate", "tensorboard": False}
    options["warm_start"] = model_dir
    training.train(training.Options(**options))
    theirs, ours = ({row["step"]: row for row in read_log(folder)} for folder in (two, one))
    assert sorted(theirs) == sorted(ours) == [3, 6, 9]
    for step in ours:
        for name in ours[step].keys() - {"time"}:
            assert theirs[step][name] == pytest.approx(ours[step][name], rel=1e-3), (step, name)
    # Both leave the same weights, and one of both wrote them.
    models = [zoo.load_pretrained(folder) for folder in (two, one)]
    for a, b in zip(*(model.variables for model in models)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert sorted(os.listdir(two)) == sorted(os.listdir(one)) and len(read_log(two)) <= 4

    # A folder that only the chief sees would start the others anew.
    workers = start(photos, (two, str(tmp_path / "elsewhere")), last_step=12)
    outputs = [worker.communicate(timeout=200) for worker in workers]
    for worker, (_, errors) in zip(workers, outputs):
        assert worker.returncode == 1 and "the workers see different saves" in errors, errors[-2000:]


def test_clusters(monkeypatch):
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="needs \\$TF_CONFIG"):
        cluster.make_resolver()
    for wrong in ("{", "[]", "{}", '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}'):
        monkeypatch.setenv("TF_CONFIG", wrong)
        with pytest.raises(UsageError, match="does not describe a cluster"):
            cluster.make_resolver()
    # Four tasks on two hosts, this one the third.
    step = {"PROCID": "2", "STEP_NUM_TASKS": "4", "STEP_NODELIST": "node[01-02]", "STEP_TASKS_PER_NODE": "2(x2)"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    resolver = cluster.make_resolver("slurm", 9000)
    assert resolver.cluster_spec().as_dict() == {"worker": ["node01:9000", "node01:9001", "node02:9000", "node02:9001"]}
    assert (resolver.task_type, resolver.task_id) == ("worker", 2)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "many")
    with pytest.raises(UsageError, match="Slurm job step"):
        cluster.make_resolver("slurm")
    monkeypatch.delenv("TF_CONFIG")
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(UsageError, match="Slurm job step"):
        cluster.make_resolver("auto")
