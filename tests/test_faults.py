"""Full disks, kills, and paths that are not what they should be: nothing lost, nothing half-written."""

import contextlib
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, draw
from PIL import Image

from goconv_tf import codec, commands, memory, training, zoo
from goconv_tf.errors import CheckpointError, GoConvError
from goconv_tf.files import atomic_write, taking_turns


@contextlib.contextmanager
def full_disk(room):
    """Inside, no file can grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with full_disk(1000), pytest.raises(OSError, match="cannot be written: File too large"):
        atomic_write(str(path), bytes(5000))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_names_as_long_as_names_may_be(tmp_path):
    atomic_write(str(tmp_path / ("\u5199" * 85)), b"x")
    assert [len(os.fsencode(name)) for name in os.listdir(tmp_path)] == [255]


def test_a_full_disk_while_coding(model, model_dir, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(zoo, "load_pretrained", lambda path: model)
    stream, picture = tmp_path / "a.gcv", tmp_path / "a.png"
    with full_disk(100):
        assert commands.compress([photo, str(stream)], model_dir) == 1
    stream.write_bytes(codec.compress(model, draw(150, 203), lmbda=0.02).data)
    with full_disk(1000):
        assert commands.decompress([str(stream), str(picture)], model_dir) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("cannot be written: File too large" in line for line in errors)
    assert os.listdir(tmp_path) == ["a.gcv"]


def test_a_full_disk_under_the_range_coder_package(model):
    """It writes files of its own, and does not tell when it cannot."""
    picture = draw(150, 203)
    assert len(codec.compress(model, picture, lmbda=0.1, entropy_coder="range-coder").data) > 400
    with full_disk(60), pytest.raises(OSError, match="is there space left"):
        codec.compress(model, picture, lmbda=0.1, entropy_coder="range-coder")


def test_a_filesystem_without_hard_links(model, tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    for name in ("first", "second"):
        info = zoo.save_pretrained(model, str(tmp_path), name)
        assert zoo.load_pretrained(str(tmp_path)).info == info and sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]


def test_a_full_disk_while_a_model_is_saved(model_dir, tmp_path):
    folder = str(tmp_path / "m")
    shutil.copytree(model_dir, folder)
    before = {name: pathlib.Path(folder, name).read_bytes() for name in os.listdir(folder)}
    loaded = zoo.load_pretrained(folder, fold=False)
    loaded.g_s[0].high.bias_parameter.assign_add([0.1] * 4)
    with full_disk(5000), pytest.raises(OSError, match="cannot be written"):
        zoo.save_pretrained(loaded, folder, "tiny-test")
    assert {name: pathlib.Path(folder, name).read_bytes() for name in os.listdir(folder)} == before


def test_killed_between_the_two_files_of_a_model(model, model_dir, tmp_path, monkeypatch):
    """config.json is the old one, the weights are the new ones, twice in a row: the old model is found."""
    folder = str(tmp_path / "m")
    shutil.copytree(model_dir, folder)
    loaded = zoo.load_pretrained(folder, fold=False)
    loaded.g_s[0].high.bias_parameter.assign_add([0.1] * 4)
    original, calls = os.replace, []

    def replace(a, b):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(b)
        original(a, b)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(2):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            zoo.save_pretrained(loaded, folder, "tiny-test")
        loaded.g_s[0].high.bias_parameter.assign_add([0.1] * 4)
    monkeypatch.undo()
    found = zoo.load_pretrained(folder)
    assert found.info.fingerprint == model.info.fingerprint
    data = codec.compress(model, draw(40, 40), lmbda=0.02).data
    np.testing.assert_array_equal(codec.decompress(found, data), codec.decompress(model, data))
    saved = zoo.save_pretrained(loaded, folder, "tiny-test")
    assert saved.fingerprint != model.info.fingerprint and sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    os.remove(os.path.join(folder, zoo.WEIGHTS_FILE))
    with pytest.raises(CheckpointError, match="no such file"):
        zoo.load_pretrained(folder)


def test_two_who_write_one_model_folder_take_turns(model, tmp_path):
    folder, done = str(tmp_path / "m"), []
    info = zoo.save_pretrained(model, folder, "first")
    writer = threading.Thread(target=lambda: done.append(zoo.save_pretrained(model, folder, "second")))
    with taking_turns(folder):
        writer.start()
        writer.join(2)
        assert not done and zoo.read_info(folder) == info
    writer.join(60)
    assert [found.name for found in done] == ["second"] and zoo.read_info(folder) == done[0]
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]


def test_what_a_kill_left_in_a_model_folder_goes(model, tmp_path):
    names = [f".{name}.0123456789abcdef" for name in ("model.safetensors", "config.json", "previous.safetensors", "README.md")]
    names += [".model.safetensors.fedcba9876543210", ".model.safetensors.mine"]
    for age, name in zip((7200, 7200, 7200, 7200, 60, 7200), names):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    zoo.save_pretrained(model, str(tmp_path), "m")
    assert sorted(os.listdir(tmp_path)) == sorted(["README.md", "config.json", "model.safetensors", *names[4:]])


def test_ended_by_a_signal(tmp_path):
    """One line, and nothing half-written."""
    code = "import sys, time\nfrom goconv_tf import commands, files\n\ndef action():\n    with files.staged(sys.argv[1], b'half'):\n"
    code += "        print('there', flush=True)\n        time.sleep(60)\n\nsys.exit(commands.status_of(action))\n"
    for number in (signal.SIGTERM, signal.SIGHUP):
        args = [sys.executable, "-c", code, str(tmp_path / "a")]
        process = subprocess.Popen(args, env={**os.environ, "PYTHONPATH": ROOT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()
        assert len(os.listdir(tmp_path)) == 1
        process.send_signal(number)
        assert process.communicate()[1] == f"error: ended by {number.name}\n" and process.returncode == 128 + number
        assert os.listdir(tmp_path) == []


def test_what_replaces_a_private_file_is_private(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o600)
    atomic_write(str(path), b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600


def test_pipes_are_read_where_there_is_memory_for_them(model, monkeypatch):
    def piped(data):
        reader, writer = os.pipe()
        with os.fdopen(writer, "wb") as f:
            f.write(data)
        try:
            return commands.read_stream_file(f"/dev/fd/{reader}")
        finally:
            os.close(reader)

    data = codec.compress(model, draw(40, 40)).data
    assert piped(data) == data
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * len(data) - 1)
    with pytest.raises(GoConvError, match="GiB are available"):
        piped(data)


def test_killed_while_writing(tmp_path):
    """kill -9 at some moment among many replacements: the file is whole, of one of them."""
    path = tmp_path / "a"
    code = "import sys\nfrom goconv_tf.files import atomic_write\nk = 0\n"
    code += "while True:\n    k += 1\n    atomic_write(sys.argv[1], bytes([k % 251]) * 300_000)\n    print('go', flush=True)\n"
    for pause in (0.01, 0.05, 0.1, 0.2):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": ROOT}, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(pause)
        process.kill()
        process.wait()
        data = path.read_bytes()
        assert len(data) == 300_000 and len(set(data)) == 1


def test_paths_that_are_not_what_they_should_be(model, model_dir, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(zoo, "load_pretrained", lambda path: model)
    (tmp_path / "folder.gcv").mkdir()
    (tmp_path / "file").write_text("x")
    for action in (
        lambda: commands.compress([photo, str(tmp_path / "folder.gcv")], model_dir),
        lambda: commands.compress([photo, str(tmp_path / "file" / "a.gcv")], model_dir),
        lambda: commands.decompress([str(tmp_path / "folder.gcv"), str(tmp_path / "a.png")], model_dir, None),
        lambda: commands.compress([photo, "/proc/a.gcv"], model_dir),
    ):
        try:
            assert action() == 1
            assert len(capsys.readouterr().err.splitlines()) == 1
        except GoConvError as error:
            assert "\n" not in str(error)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.gcv"]
    with pytest.raises(OSError):
        commands.compress([photo], model_dir, output_dir=str(tmp_path / "file"))


def test_a_disk_that_is_full_when_a_run_saves(tmp_path):
    """One line, and the last whole save stays."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(2):
        Image.fromarray(draw(70, 80, k)).save(folder / f"{k}.png")
    code = """
import resource, sys
from goconv_tf import train
if "--last_step=2" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
from absl import app
app.run(train.main)
"""
    args = ["--preset=tiny", f"--train_glob={folder}", "--patchsize=64", "--batchsize=1", "--save_steps=1", "--notensorboard"]
    args.append(f"--checkpoint_dir={tmp_path / 'run'}")
    env = {**os.environ, "PYTHONPATH": ROOT}
    for last, status in ((1, 0), (2, 1)):
        done = subprocess.run([sys.executable, "-c", code, *args, f"--last_step={last}"], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("goconv_tf.train:")]
    assert len(lines) == 1 and "failed" in lines[0] and "the last whole one is of step 1" in lines[0] and "Traceback" not in done.stderr
    assert training.saved_step(str(tmp_path / "run" / "backup")) == 1
