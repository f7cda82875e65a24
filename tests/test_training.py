"""Training: what is drawn, saved, resumed and refused."""

import dataclasses
import glob
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import tensorflow as tf
from conftest import ROOT, draw, lively_rnn, load_script
from PIL import Image, PngImagePlugin
from test_commands import one_line

from goconv_tf import codec, data, export, files, memory, metrics, picture_io, presets, training, zoo
from goconv_tf.errors import CheckpointError, DataError, GoConvError, UsageError
from goconv_tf.models import named_weights, widen
from goconv_tf.optimizers import Schedule, Soap


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for k, extension in enumerate(("png", "jpg", "webp", "png", "jpg")):
        Image.fromarray(draw(70 + k, 90, seed=k)).save(folder / f"{k}.{extension}")
    Image.fromarray(draw(30, 200)).save(folder / "small.png")
    (folder / "broken.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("no picture")
    return str(folder)


def test_batches_are_functions_of_seed_and_step(photos):
    paths = data.find_pictures([photos])
    assert len(paths) == 7
    source = data.PatchSource(paths, 64, 3, [0.01, 0.1], seed=5)
    assert (len(source.paths), source.too_small, source.unreadable) == (5, 1, 1)
    again = data.PatchSource(data.find_pictures([os.path.join(photos, "*")]), 64, 3, [0.01, 0.1], seed=5, cache_mb=0)
    other = data.PatchSource(paths, 64, 3, [0.01, 0.1], seed=6)
    for a, b, c in zip(source(7), again(7), other(7)):
        np.testing.assert_array_equal(a, b)
        assert a.shape == c.shape and a.dtype == c.dtype
    assert np.abs(source(7)[0].astype(int) - source(8)[0]).max() > 0
    assert np.abs(source(7)[0].astype(int) - other(7)[0]).max() > 0
    assert set(np.concatenate([source(k)[1] for k in range(20)]).tolist()) == {np.float32(0.01), np.float32(0.1)}
    for x, lmbda, noise, step in source.dataset(7).take(1):
        for a, b in zip((x, lmbda, noise), source(7)):
            np.testing.assert_array_equal(a, b)
        assert step.numpy().tolist() == [7] * 3


def test_patches_come_from_the_pictures(tmp_path):
    picture = np.arange(80 * 90 * 3, dtype=np.uint32).reshape(80, 90, 3).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    plain = data.PatchSource([str(tmp_path / "a.png")], 64, 8, [0.01], flip=False)
    windows = np.lib.stride_tricks.sliding_window_view(picture, (64, 64, 3)).reshape(-1, 64, 64, 3)
    for patch in plain(0)[0]:
        assert (windows == patch).all((1, 2, 3)).any()
    flipping = data.PatchSource([str(tmp_path / "a.png")], 64, 32, [0.01], flip=True)
    mirrored = [not (windows == patch).all((1, 2, 3)).any() for patch in flipping(0)[0]]
    assert 4 < sum(mirrored) < 28


def test_what_components_leave_of_pictures(tmp_path, capsys):
    """Of more components less, and of the blocks that they are of nothing once there are as many as those."""
    Image.fromarray(draw(64, 80)).save(tmp_path / "a.png")  # 20 blocks
    load_script(os.path.join(ROOT, "experiments", "components.py")).main(*2 * [str(tmp_path)])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["40", "80", "120", "160", "200", "240", "280"] and float(rows[0][2]) > 80


def test_every_place_of_a_patch_is_drawn(tmp_path):
    Image.fromarray(draw(64, 65)).save(tmp_path / "a.png")
    source = data.PatchSource([str(tmp_path / "a.png")], 64, 16, [0.01], flip=False)
    assert {patch.tobytes() for patch in source(0)[0]} == {draw(64, 65)[:, left : left + 64].tobytes() for left in (0, 1)}


def test_decoded_pictures_keep_within_their_memory(tmp_path):
    paths = [str(tmp_path / f"{k}.png") for k in range(4)]
    for k, path in enumerate(paths):
        Image.fromarray(np.resize(draw(64, 64, k), (512, 512, 3))).save(path)  # 0.75 MiB
    source = data.PatchSource(paths, 64, 16, [0.01], cache_mb=2)
    source(0)
    assert len(source._cache) == 2


def test_vivid_patches(photos):
    paths = data.find_pictures([photos])
    plain, some, all_of_them = (data.PatchSource(paths, 64, 1, [0.01], flip=False, vivid=share)(3)[0][0].astype(int) for share in (0, 1e-9, 1))
    np.testing.assert_array_equal(plain, some)
    assert np.ptp(all_of_them, -1).mean() > 1.5 * np.ptp(plain, -1).mean()

    patch = np.random.default_rng(0).integers(120, 136, (8, 8, 3)).astype(np.uint8)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        more = data.vivid(patch, rng).astype(float)
        again = np.random.default_rng(seed)
        order, factor = again.permutation(3), 16 ** again.random()
        grey = patch.mean(-1, keepdims=True)
        np.testing.assert_allclose(more, np.clip(grey + factor * (patch[..., order] - grey), 0, 255), atol=0.501)
        assert 1 <= factor <= 16


def test_damaged_pictures_are_replaced(photos, tmp_path, capsys, monkeypatch):
    """A file whose header is whole and whose rest is not: named once, and every batch is still a function of its step."""
    for name in ("0.png", "1.jpg"):
        whole = pathlib.Path(photos, name).read_bytes()
        (tmp_path / name).write_bytes(whole if name == "0.png" else whole[: len(whole) * 3 // 4])
    paths = data.find_pictures([str(tmp_path)])
    source, again = (data.PatchSource(paths, 64, 4, [0.01]) for _ in range(2))
    assert len(source.paths) == 2
    batches = [source(k)[0] for k in range(4)]
    assert source.damaged == {str(tmp_path / "1.jpg")} and capsys.readouterr().out.count("1.jpg") == 1
    np.testing.assert_array_equal(again(3)[0], batches[3])
    monkeypatch.setattr(data, "read_rgb", lambda path: pytest.fail(f"{path} is read again"))
    np.testing.assert_array_equal(source(3)[0], batches[3])
    monkeypatch.undo()
    hopeless = data.PatchSource([str(tmp_path / "1.jpg")], 64, 4, [0.01])
    with pytest.raises(DataError, match="cannot be decoded"), training.data_errors():
        list(hopeless.dataset(0).take(1))


def test_memory_that_is_short_for_a_moment_leaves_no_picture_out(photos, monkeypatch, capsys):
    read, tries = picture_io.read_picture, []

    def short(path):
        tries.append(path)
        if len(tries) < limit:
            raise GoConvError("9 GiB are needed")
        return read(path)

    monkeypatch.setattr(picture_io, "read_picture", short)
    monkeypatch.setattr(data, "MEMORY_SECONDS", 0.0)
    limit = 4
    source = data.PatchSource(data.find_pictures([photos])[:1], 64, 1, [0.01])
    assert source(0)[0].shape == (1, 64, 64, 3) and len(tries) == 4 and not source.damaged
    limit = 1000
    source = data.PatchSource(data.find_pictures([photos])[:1], 64, 1, [0.01])
    with pytest.raises(DataError, match="cannot be decoded"), training.data_errors():
        list(source.dataset(0).take(1))
    assert capsys.readouterr().out.count("left out: 9 GiB are needed") == 1


def test_validation_pictures_are_not_trained_with(photos, tmp_path, monkeypatch, capsys):
    sources = []
    monkeypatch.setattr(training, "_compiled_model", lambda options, config, source, *args: sources.append(source))
    monkeypatch.setattr(training, "_fit", lambda *args, **kwargs: None)
    held = data.find_pictures([photos])[:2]
    (tmp_path / "links").mkdir()
    for path in held:
        os.symlink(path, tmp_path / "links" / os.path.basename(path))
    training.train(options(photos, tmp_path / "run", val_glob=(str(tmp_path / "links"),)))
    readable = data.PatchSource(data.find_pictures([photos]), 64, 1, [0.01]).paths
    assert set(held) < set(readable) and set(sources[0].paths) == set(readable) - set(held)
    assert "1 unreadable, 2 to validate with" in capsys.readouterr().out
    with pytest.raises(UsageError, match="none is left to train on"):
        training.train(options(photos, tmp_path / "other", val_glob=(photos,)))


def test_pictures_that_coding_refuses_are_no_training_pictures(photos, tmp_path, capsys):
    good = Image.fromarray(draw(70, 70))
    good.save(tmp_path / "good.png")
    Image.fromarray(draw(70, 70)[..., 0].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    good.convert("RGBA").save(tmp_path / "transparent.png")
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2**21, zip=True)
    good.save(tmp_path / "text.png", pnginfo=text)
    source = data.PatchSource(data.find_pictures([str(tmp_path)]), 64, 4, [0.01], flip=False)
    assert source.unreadable == 1
    windows = np.lib.stride_tricks.sliding_window_view(draw(70, 70), (64, 64, 3)).reshape(-1, 64, 64, 3)
    for k in range(4):
        assert all((windows == patch).all((1, 2, 3)).any() for patch in source(k)[0])
    said = capsys.readouterr().out
    assert "transparent.png: has transparency" in said and "deep.png: mode I;16" in said


def test_our_limit_of_pixels_counts_for_training_pictures(tmp_path, monkeypatch):
    Image.fromarray(draw(70, 70)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own: it refuses twice as many
    assert len(data.PatchSource([str(tmp_path / "large.png")], 64, 4, [0.01]).paths) == 1
    monkeypatch.setattr(picture_io, "MAX_PIXELS", 4899)
    with pytest.raises(DataError, match="none of 1 pictures"):
        data.PatchSource([str(tmp_path / "large.png")], 64, 4, [0.01])


def test_folders_are_no_patterns(tmp_path):
    (tmp_path / "photos [2020]").mkdir()
    Image.fromarray(draw(70, 70)).save(tmp_path / "photos [2020]" / "a.png")
    assert len(data.find_pictures([str(tmp_path / "photos [2020]")])) == 1


def test_data_that_cannot_be_used(photos, tmp_path):
    for patterns in ([str(tmp_path)], [photos, str(tmp_path / "*")]):
        with pytest.raises(DataError, match=f"no PNG, JPEG or WebP pictures match {tmp_path}"):
            data.find_pictures(patterns)
    with pytest.raises(DataError, match="none of 7 pictures"):
        data.PatchSource(data.find_pictures([photos]), 512, 1, [0.01])


def options(photos, folder, **changes):
    values = dict(
        model="variable_rate",
        preset="tiny",
        train_glob=(photos,),
        checkpoint_dir=str(folder),
        lambdas=(0.01, 0.05),
        patchsize=64,
        batchsize=2,
        lr=1e-3,
        last_step=30,
        save_steps=5,
        clip_norm=1.0,
        tensorboard=False,
    )
    return training.Options(**{**values, **changes})


def weights(path):
    return {name: v.numpy() for name, v in _named(zoo.load_pretrained(str(path), fold=False)).items()}


def _named(model):
    from goconv_tf.models import named_weights

    return named_weights(model)


@pytest.fixture(scope="module")
def unbroken(photos, tmp_path_factory):
    """(options, folder) of a run of 30 steps that was never stopped, watched on two pictures."""
    folder = tmp_path_factory.mktemp("unbroken")
    copies = tmp_path_factory.mktemp("watched")  # of pictures that are trained with all the same
    for path in glob.glob(os.path.join(photos, "[01].*")):
        shutil.copy(path, copies)
    watched = {"val_glob": (str(copies),), "val_minutes": 0.0, "tensorboard": True}
    run = options(photos, folder, name="mine", save_steps=10, **watched)
    training.train(run)
    return run, folder


def test_killed_and_resumed_equals_unbroken(photos, unbroken, tmp_path):
    """Kill -9 in the middle; the run that goes on ends with the weights of one that was never stopped."""
    args = [sys.executable, "-m", "goconv_tf.train", "--preset=tiny", f"--train_glob={photos}", "--lambdas=0.01,0.05", "--notensorboard"]
    args += ["--patchsize=64", "--batchsize=2", "--lr=1e-3", "--last_step=30", "--save_steps=5", "--clip_norm=1", f"--checkpoint_dir={tmp_path}"]
    env = {**os.environ, "PYTHONPATH": ROOT}
    process = subprocess.Popen(args, env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 10 "):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # It goes on with saves at other intervals than before.
    done = subprocess.run([*args, "--save_steps=7"], env=env, capture_output=True, text=True, check=True)
    assert "going on from step" in done.stdout and "step 30 " in done.stdout
    # Not the averaged weights, which hardly moved, but weights, averages and both moments of Adam as saved.
    a, b = saved_variables(tmp_path), saved_variables(unbroken[1])
    assert len(a) == len(b) > 1000
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=2e-5, err_msg=name)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    again = int(done.stdout.split("going on from step ")[1].split(",")[0])
    later = [*range(again + 7, 30, 7), 30]
    assert steps[:2] == [5, 10] and steps[-len(later) :] == later, (again, steps)


def test_sigterm_ends_a_run_with_a_save_and_an_export(photos, tmp_path):
    args = [sys.executable, "-m", "goconv_tf.train", "--preset=tiny", f"--train_glob={photos}", "--notensorboard", "--save_steps=5"]
    args += ["--patchsize=64", "--batchsize=1", f"--checkpoint_dir={tmp_path}"]
    process = subprocess.Popen(args, env={**os.environ, "PYTHONPATH": ROOT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 5 "):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-2000:]
    assert training.saved_step(str(tmp_path / "backup")) == training.exported_step(str(tmp_path)) >= 5


def test_a_limit_in_minutes_or_a_signal_ends_a_run(photos, tmp_path):
    """Whatever the interval between saves: fit then saves once more."""

    class Model:
        stop_training = False
        optimizer = tf.keras.optimizers.Adam()

    for minutes, asked, ends in ((0.0, False, False), (1.0, False, False), (1e-9, False, True), (0.0, True, True)):
        progress = training.Progress(options(photos, tmp_path, minutes=minutes), str(tmp_path / "log"), None)
        progress.set_model(Model())
        progress.on_epoch_begin(0)
        if asked:
            progress.stop()
        progress.on_train_batch_end(0, {"loss": 1.0})
        assert progress.model.stop_training == ends
    for gone, ends in ((50, False), (61, True)):
        progress = training.Progress(options(photos, tmp_path, minutes=1.0), str(tmp_path / "log"), None)
        progress.set_model(Model())
        progress.on_epoch_begin(0)
        progress.begin -= gone
        progress.on_train_batch_end(0, {"loss": 1.0})
        assert progress.model.stop_training == ends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "already at step 30"),
        (dict(quantization="mixed"), "already at step 30"),
        (dict(preset="small"), "holds a run with preset"),
        (dict(ema=0.0), "--ema cannot"),
        (dict(model="crpe", balance=0.5), "--balance is for variable_rate"),
        (dict(name="a/b"), "'a/b' is no name for a model"),
        (dict(checkpoint_dir="runs/small[1]"), "TensorFlow would not find the saves"),
    ],
)
def test_folder_of_another_run(photos, unbroken, changes, message):
    before = (unbroken[1] / "run.json").read_bytes()
    with pytest.raises(UsageError, match=message):
        training.train(dataclasses.replace(options(photos, unbroken[1]), **changes))
    assert (unbroken[1] / "run.json").read_bytes() == before


def saved_variables(folder):
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(folder / "backup" / "chief")))
    names = [n for n in reader.get_variable_to_shape_map() if n.startswith("model/") and reader.get_variable_to_dtype_map()[n] == tf.float32]
    return {n: reader.get_tensor(n) for n in names}


def test_training_lowers_the_loss_watches_real_files_and_exports(unbroken):
    run, folder = unbroken
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    history = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [10, 20, 30]
    model = zoo.load_pretrained(str(folder))
    assert (model.info.name, model.info.card["training"]["steps"]) == ("mine", 30)
    assert (model.config.lmbda_min, model.config.lmbda_max) == (0.01, 0.05)
    # What was watched is what the export really gives.
    validator = training.Validator(model, data.find_pictures(run.val_glob), run.lambdas)
    rows, loss = validator(model)
    assert loss == pytest.approx(history[-1]["loss"], rel=1e-3)
    np.testing.assert_allclose(rows, history[-1]["rows"], rtol=1e-3)
    best = zoo.find_model(str(folder / "best"))
    assert best.card["training"]["steps"] == min(history, key=lambda row: row["loss"])["step"]
    assert any(name.startswith("events") for name in os.listdir(folder / "tensorboard"))


def test_killed_before_its_last_export(photos, unbroken, tmp_path, capsys, monkeypatch):
    """The same command writes it; also where a later version has other presets, as a run remembers its own."""
    shutil.copytree(unbroken[1], tmp_path / "run")
    monkeypatch.setitem(
        presets.PRESETS["variable_rate"], "tiny", presets.change_settings(presets.get_preset("variable_rate", "tiny"), ["filters=12"])
    )
    shutil.rmtree(tmp_path / "run" / "export")
    run = dataclasses.replace(unbroken[0], checkpoint_dir=str(tmp_path / "run"))
    training.train(run)
    again, before = (zoo.load_pretrained(str(folder)) for folder in (tmp_path / "run", unbroken[1]))
    assert again.info.card["training"]["steps"] == 30 and again.info.sha256 == before.info.sha256
    with pytest.raises(UsageError, match="already at step 30"):
        training.train(run)
    with files.alone_in(run.checkpoint_dir), pytest.raises(UsageError, match="another process is at work there"):
        training.train(run)
    # Runs of earlier versions do not say.
    shutil.rmtree(tmp_path / "run" / "export")
    contents = json.loads((tmp_path / "run" / "run.json").read_text())
    del contents["config"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(contents))
    with pytest.raises(UsageError, match="a run of other widths"):
        training.train(run)


def test_damaged_saves_do_not_begin_a_run_anew(unbroken, tmp_path):
    for name, damage in (
        ("index", lambda folder: [path.write_bytes(path.read_bytes()[:100]) for path in folder.glob("ckpt-*.index")]),
        ("empty", lambda folder: (folder / "checkpoint").write_bytes(b"")),
        ("missing", lambda folder: (folder / "checkpoint").unlink()),
        ("data", lambda folder: [path.unlink() for path in folder.glob("ckpt-*.data*")]),
    ):
        shutil.copytree(unbroken[1] / "backup", tmp_path / name)
        damage(tmp_path / name / "chief")
        with pytest.raises(CheckpointError, match="the run begins anew") as error:
            training.saved_step(str(tmp_path / name))
        assert "\n" not in str(error.value)
    assert training.saved_step(str(tmp_path / "nothing")) == 0


def test_damaged_settings_of_a_run(tmp_path):
    whole = '{"ema": 0.5, "lambdas": [0.1], "settings": [], "config": {}}'
    (tmp_path / "run.json").write_text(whole)
    assert training.read_run(str(tmp_path / "run.json"))["ema"] == 0.5
    odd = whole.replace("[0.1]", '["a"]'), whole.replace("{}", "[]"), whole.replace("[]", "3")
    for text in ("", "[]", "{}", '{"ema": "yes"}', *odd):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run\.json: is damaged"):
            training.read_run(str(tmp_path / "run.json"))


@pytest.mark.parametrize(
    "change",
    [
        *({"lr": value} for value in (0.0, -1.0, float("inf"))),
        *({"patchsize": value} for value in (-16, 0)),
        *({name: float("nan")} for name in ("ema", "clip_norm", "minutes", "vivid")),
        *({"batchsize": -1}, {"seed": 2**32}, {"last_step": -1}),
        *({"distortion": "ms_ssim"}, {"quantization": "round"}, {"optimizer": "sgd"}, {"gradients": "float16"}),
        {"val_lambdas": (0.01,), "model": "crpe", "lambdas": (0.01,)},
    ],
)
def test_options_out_of_range(change):
    with pytest.raises(UsageError, match=f"--{next(iter(change))}"):
        options("photos", "run", **change).check()


def test_what_a_run_began_with_is_kept(photos, unbroken, tmp_path, monkeypatch):
    """Also where the command that goes on does not say it; and lambdas to watch are of those that are trained for."""
    shutil.copytree(unbroken[1], tmp_path, dirs_exist_ok=True)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "warm_start": "models/another", "init": "pca"}))
    monkeypatch.setattr(tf.keras.Model, "fit", lambda self, *args, **kwargs: None)
    training.train(options(photos, tmp_path, last_step=31))
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["warm_start"], run["init"], run["last_step"]) == ("models/another", "pca", 31)
    with pytest.raises(UsageError, match="holds a run that began with warm_start models/another, not models/mine: name a new folder"):
        training.train(options(photos, tmp_path, last_step=31, warm_start="models/mine"))
    training.train(options(photos, tmp_path, last_step=31, warm_start="models/another"))
    with pytest.raises(UsageError, match=r"--val_lambdas must be within 0\.01 to 0\.05"):
        training.train(options(photos, tmp_path, last_step=31, val_glob=(photos,), val_lambdas=(0.02, 0.9)))


def test_layers_are_set_with_or_without_their_lambdas():
    preset = presets.get_preset("scalable_rnn", "small")
    assert presets.change_settings(preset, ["iterations=3"]).lambdas == (0.01, 0.02, 0.04)
    assert presets.change_settings(preset, ["iterations=2", "lambdas=[0.1, 0.2]"]).lambdas == (0.1, 0.2)


def test_keras_evaluates_and_validates(photos, unbroken):
    """`evaluate` gives the mean over batches of what a step of training gives, and `fit` takes validation data."""
    model = zoo.load_pretrained(str(unbroken[1]), fold=False)
    source = data.PatchSource(data.find_pictures([photos]), 64, 2, [0.01, 0.05])
    model.compile(training.make_optimizer(dataclasses.replace(unbroken[0], lr=1e-9)))
    batches = source.dataset(0).take(3)
    both, *each = (model.evaluate(part, verbose=0, return_dict=True) for part in (batches, *(batches.skip(k).take(1) for k in range(3))))
    for name, value in both.items():
        assert value == pytest.approx(np.mean([one[name] for one in each]), rel=1e-5)
    assert len({one["loss"] for one in each}) == 3
    model.compile(model.optimizer, steps_per_execution=2)
    with pytest.raises(ValueError, match="steps_per_execution"):
        model.evaluate(batches, verbose=0)
    model.compile(model.optimizer)
    history = model.fit(batches.take(1), validation_data=batches, verbose=0).history
    assert history["loss"][0] == pytest.approx(each[0]["loss"], rel=1e-4) and history["val_loss"][0] == pytest.approx(both["loss"], rel=1e-2)
    shown = []
    watch = tf.keras.callbacks.LambdaCallback(on_train_batch_end=lambda _, logs: shown.append(logs["loss"]))
    history = model.fit(batches.repeat(2), epochs=2, steps_per_epoch=3, verbose=0, callbacks=[watch]).history  # an epoch's mean, not its last batch's
    assert history["loss"] == pytest.approx(2 * [both["loss"]], rel=1e-2)
    assert shown == pytest.approx(2 * [one["loss"] for one in each], rel=1e-2)  # of each batch: Keras' progress bar averages them
    assert float(model.make_train_function()(iter(batches))["loss"]) == pytest.approx(each[0]["loss"], rel=1e-2)


def test_pictures_too_small_to_validate_with(unbroken, tmp_path):
    Image.fromarray(draw(10, 40)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="needs 16 pixels a side"):
        training.Validator(zoo.load_pretrained(str(unbroken[1]), fold=False), [str(tmp_path / "small.png")], (0.01,))


def test_pictures_too_large_to_validate_with(photos, unbroken, tmp_path, monkeypatch):
    """They are coded in tiles, as `compress` would, or refused before training."""
    model, pictures = zoo.load_pretrained(str(unbroken[1]), fold=False), [str(tmp_path / "wide.png")]
    Image.fromarray(draw(64, 16 * 64)).save(pictures[0])
    expected = training.Validator(model, pictures, (0.02,))(model)
    cells, choose = [], memory.choose_tile
    monkeypatch.setattr(memory, "WHOLE_BYTES", 1)
    monkeypatch.setattr(memory, "TILE_BYTES", 1)
    monkeypatch.setattr(memory, "choose_tile", lambda *args: cells.append(choose(*args)) or cells[-1])
    found = training.Validator(model, pictures, (0.02,))(model)
    assert cells == [1, 1] and found[1] == pytest.approx(expected[1], rel=1e-3)
    monkeypatch.setattr(memory, "available_memory", lambda: 1.0)
    with pytest.raises(GoConvError, match=r"wide\.png: 1024 x 64 pixels need about"):
        training.Validator(model, pictures, (0.02,))


def test_what_tensorboard_shows_is_what_was_watched(unbroken, tmp_path):
    model = zoo.load_pretrained(str(unbroken[1]), fold=False)
    Image.fromarray(draw(530, 40)).save(tmp_path / "high.png")
    validator = training.Validator(model, [str(tmp_path / "high.png")], (0.02, 0.05))
    validator(model)
    assert [shown.shape for shown in validator.shown] == 3 * [(512, 32, 3)]
    np.testing.assert_array_equal(validator.shown[0], draw(530, 40)[:512, :32])
    assert metrics.psnr(validator.shown[0], validator.shown[2]) > metrics.psnr(validator.shown[0], validator.shown[1])


def test_a_validation_that_fails_is_not_the_end(unbroken, monkeypatch, capsys):
    """Unless nothing comes after it."""
    model = zoo.load_pretrained(str(unbroken[1]), fold=False)
    model.compile(optimizer=training.make_optimizer(unbroken[0]))
    model.optimizer.build(model.trainable_variables)

    def fail():
        raise GoConvError("short of memory")

    watch = training.Watch(dataclasses.replace(unbroken[0], val_minutes=0.0), None, None, SimpleNamespace(nan_step=None))
    watch.set_model(model)
    monkeypatch.setattr(watch, "watch", fail)
    model.stop_training = False
    watch.on_epoch_end(0)
    assert "step 0 not validated: short of memory" in capsys.readouterr().out
    model.stop_training = True
    with pytest.raises(GoConvError, match="short of memory"):
        watch.on_epoch_end(1)


def test_a_trained_model_is_of_no_folder(model_dir):
    """What it would write, the folder's decoder would take for its own."""
    model = zoo.load_pretrained(model_dir, fold=False)
    data = codec.compress(model, draw(40, 40), lmbda=0.02).data
    model.compile(optimizer=tf.keras.optimizers.Adam())
    assert model.info is not None and model.has_tables and model.has_exact
    model.make_train_function()  # as `fit` does
    assert model.info is None and not model.has_tables and not model.has_exact
    for code in (lambda: codec.compress(model, draw(40, 40)), lambda: codec.decompress(model, data), lambda: export.save(model, "x")):
        with pytest.raises(UsageError, match="no model folder"):
            code()


def test_weights_changed_otherwise_are_of_no_folder_either(model_dir, tmp_path):
    """By a training loop of one's own, and by Keras' `load_weights`."""
    batch = tf.zeros([1, 64, 64, 3], tf.uint8), tf.constant([0.02]), tf.constant([0, 0]), tf.constant(0)
    model, optimizer = zoo.load_pretrained(model_dir, fold=False), tf.keras.optimizers.SGD(1e-6)
    with tf.GradientTape() as tape:
        loss, _ = model.loss_fn(*batch)
    assert model.info is not None
    optimizer.minimize(loss, model.trainable_variables, tape=tape)
    assert model.info is None
    with pytest.raises(UsageError, match="no model folder"):
        codec.compress(model, draw(40, 40))
    model.prior_z_low.parameters()["bias"][0].assign_add(1.0 + tf.zeros_like(model.prior_z_low.parameters()["bias"][0]))
    zoo.save_pretrained(model, str(tmp_path / "saved"), "saved")  # with tables of these weights
    saved = zoo.load_pretrained(str(tmp_path / "saved"), fold=False)
    saved.build_tables()
    assert zoo.integers_hash(saved) == saved.info.integers
    with safetensors.safe_open(str(tmp_path / "saved" / zoo.WEIGHTS_FILE), "np") as f:
        np.testing.assert_array_equal(f.get_tensor("tables/prior_z_low/cdf"), saved.prior_z_low.table.cdf)
    model.save_weights(str(tmp_path / "changed.weights.h5"))
    folded = zoo.load_pretrained(model_dir)
    x, lmbda = tf.constant(draw(64, 64)[None]), tf.constant([0.02])
    folded.transform(x, lmbda)  # compiled with the kernels of before
    folded.load_weights(str(tmp_path / "changed.weights.h5"))
    assert folded.info is None and not folded.has_tables
    for ours, theirs in zip(folded.transform(x, lmbda), model.transform(x, lmbda)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["model_dir", "crpe_dir", "rnn_dir"])
def test_models_that_have_coded_can_train(kind, request):
    model = zoo.load_pretrained(request.getfixturevalue(kind))
    codec.compress(model, draw(40, 40), reconstruct=True)
    assert len(model.submodules) > 20  # although stages, which it has now, do not sort
    model.compile(optimizer=tf.keras.optimizers.SGD())
    model.make_train_function()
    assert model.info is None and not any(layer.unfold() for layer in model.foldable())


def test_folded_models_train(photos, model_dir):
    """All their weights: folded kernels are let go of."""
    source = data.PatchSource(data.find_pictures([photos]), 64, 2, [0.01, 0.05])
    trained = []
    for fold in (True, False):
        model = zoo.load_pretrained(model_dir, fold=fold)
        model.compile(optimizer=tf.keras.optimizers.SGD(1e-6))
        model.fit(source.dataset(0).take(1), verbose=0)
        trained.append(named_weights(model))
    for name, weight in trained[0].items():
        np.testing.assert_array_equal(weight, trained[1][name], name)


@pytest.mark.parametrize("kind", ["variable_rate", "crpe", "scalable_rnn"])
def test_keras_own_format(kind, tmp_path):
    """What `ModelCheckpoint` writes comes back with its settings, and can become a model folder."""
    model = zoo.new_model(presets.get_preset(kind, "tiny"))
    model.quantization = "mixed"
    model.compile(Soap(Schedule(1e-3, [5], 0.5, 2)))
    model.save(str(tmp_path / "model.keras"))
    again = tf.keras.models.load_model(str(tmp_path / "model.keras"))
    assert again.config == model.config and again.quantization == "mixed" and type(again.optimizer) is Soap
    assert float(again.optimizer.learning_rate) == pytest.approx(5e-4)  # the first of two steps up to it
    weights = named_weights(again)
    for name, weight in named_weights(model).items():
        np.testing.assert_array_equal(weights[name], weight, name)
    zoo.save_pretrained(again, str(tmp_path / "folder"), "again")


def test_settings_of_the_loss_hold_from_the_next_fit_on(model_dir):
    model = zoo.load_pretrained(model_dir, fold=False)
    model.compile(optimizer=tf.keras.optimizers.Adam())
    for name, value in (("distortion", "mix"), ("balance", 0.5), ("quantization", "mixed"), ("gradients", "bfloat16")):
        model.make_train_function()
        model.make_test_function()
        setattr(model, name, value)
        assert getattr(model, name) == value and model.train_function is None and model.test_function is None
    for name in ("distortion", "quantization", "gradients"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            setattr(model, name, "Mixed")


def test_a_step_with_bfloat16_gradients():
    """All kernels of convolutions move a little otherwise than without, also where stages were compiled before."""
    x = np.random.default_rng(0).integers(0, 256, [1, 64, 64, 3]).astype(np.uint8)
    batch = [x, np.array([0.02], np.float32), np.array([[1, 2]], np.int32), np.array([0], np.int32)]
    moves = {}
    for gradients in ("float32", "bfloat16"):
        tf.keras.utils.set_random_seed(0)
        model = lively_rnn(zoo.new_model(presets.get_preset("scalable_rnn", "tiny")))
        model.compile(tf.keras.optimizers.SGD(0.0))
        model.train_step(batch)
        model.gradients = gradients
        model.compile(tf.keras.optimizers.SGD(1.0))
        before = [v.numpy() for v in model.trainable_variables]
        model.train_step(batch)
        moves[gradients] = [v.numpy() - b for v, b in zip(model.trainable_variables, before)]
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(moves["bfloat16"], moves["float32"]) if a.ndim == 4]
    assert len(errors) == 30 and min(errors) > 1e-3 and max(errors) < 0.1, errors


def test_crpe_trains(photos, tmp_path):
    """Two steps with its information fidelity, two without: `fit` tells the loss of the step."""
    run = options(photos, tmp_path, model="crpe", settings=("if_weight=3", "if_steps=2"), lambdas=(0.01,), gradients="bfloat16")
    training.train(dataclasses.replace(run, last_step=4, save_steps=2))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and all(row["info_fidelity"] > 0.1 for row in rows)
    for row, weight in zip(rows, (3, 0)):
        assert row["loss"] == pytest.approx(row["bpp"] + 0.01 * row["mse"] + weight * row["info_fidelity"], rel=1e-5)


def test_losses_of_layers_count(model_dir):
    model = zoo.load_pretrained(model_dir, fold=False)
    batch = [np.zeros([1, 64, 64, 3], np.uint8), np.array([0.02], np.float32), np.array([[1, 2]], np.int32), np.array([0], np.int32)]
    before = float(model.test_step(batch)["loss"])
    model.h_a[0].high.add_loss(lambda: tf.constant(3.0))
    assert float(model.test_step(batch)["loss"]) == pytest.approx(before + 3, rel=1e-5)


def test_weights_are_watched_with_their_own_integers(photos, unbroken):
    """Not with those of the validation before: other entropy parameters would be other bits."""
    model = zoo.load_pretrained(str(unbroken[1]), fold=False)
    pictures = [os.path.join(photos, "0.png")]
    validator = training.Validator(model, pictures, (0.02,))
    first = validator(model)
    stages = dict(validator.codec.__dict__["_stages"])
    for layer in (*model.h_s, *model.f_pe):
        for variable in layer.trainable_variables:
            variable.assign(variable + 0.1 * tf.random.stateless_normal(variable.shape, [1, 2]))
    second = validator(model)
    assert stages and validator.codec.__dict__["_stages"] == stages  # nothing is compiled twice
    assert second[0][0][1] != first[0][0][1] and second == training.Validator(model, pictures, (0.02,))(model)


def test_best_is_chosen_by_the_loss_that_is_trained(photos, tmp_path, monkeypatch):
    """Of --distortion mix too; a loss of another kind does not count, nor does what is not a whole line of the history."""
    Image.fromarray(draw(180, 190)).save(tmp_path / "large.png")
    run = options(photos, tmp_path / "run", distortion="mix", patchsize=176)
    model = zoo.new_model(training.make_config(run))
    model.distortion = run.distortion
    model.compile(optimizer=training.make_optimizer(run))
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(DataError, match="too small to validate"):
        training.Validator(model, [os.path.join(photos, "0.png")], run.lambdas)
    validator = training.Validator(model, [str(tmp_path / "large.png")], (0.01,))
    rows, loss = validator(model)
    bpp, picture = rows[0][1], validator.pictures[0]
    decoded = validator.codec.compress(picture, 0.01, reconstruct=True).reconstruction
    similarity = metrics.ms_ssim(*(x @ [[0.299], [0.587], [0.114]] for x in (picture, decoded)))
    expected = 0.9 * metrics.mse(picture, decoded) + 0.1 * 255**2 * (1 - similarity)
    assert loss == pytest.approx(bpp + 0.01 * expected, rel=1e-3)

    watch = training.Watch(run, validator, None, None)
    watch.set_model(model)
    best = []
    for kind, value in (("mse", 1.0), ("mix", 5.0), ("mix", 6.0), ("mix", 4.0)):
        monkeypatch.setattr(training.Validator, "__call__", lambda self, model, value=value: (rows, value))
        watch.options = dataclasses.replace(run, distortion=kind)
        watch.watch()
        best.append(zoo.read_info(str(tmp_path / "run" / "best")).card["validation"]["loss"])
        with open(tmp_path / "run" / "validation.jsonl", "a", encoding="utf-8") as f:
            f.write('{"step": ')
    assert best == [1.0, 5.0, 5.0, 4.0]
    validator.digest = "other"  # as many other pictures: losses do not compare
    monkeypatch.setattr(training.Validator, "__call__", lambda self, model: (rows, 9.0))
    watch.watch()
    assert zoo.read_info(str(tmp_path / "run" / "best")).card["validation"]["loss"] == 9.0
    monkeypatch.setattr(training.Validator, "__call__", lambda self, model: ([(0.02, *rows[0][1:])], 12.0))  # nor over other lambdas
    watch.watch()
    assert zoo.read_info(str(tmp_path / "run" / "best")).card["validation"]["loss"] == 12.0


def test_warm_start_begins_with_the_weights_given(photos, tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr(tf.keras.Model, "fit", lambda self, *args, **kwargs: None)
    model = training.train(options(photos, tmp_path, warm_start=model_dir))
    a, b = {name: v.numpy() for name, v in _named(model).items()}, weights(model_dir)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    with pytest.raises(UsageError, match="other widths"):
        training.train(options(photos, tmp_path / "b", num_filters=4, warm_start=model_dir))


def test_a_wider_model_codes_what_the_narrow_one_leaves_out(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(tf.keras.Model, "fit", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(training.principal, "CROPS", (64, 64))
    narrow = training.train(options(photos, tmp_path / "narrow", init="pca"))
    monkeypatch.setattr(training.zoo, "load_pretrained", lambda *args, **kwargs: narrow)
    model = training.train(options(photos, tmp_path / "wide", num_filters=16, num_latents=24, warm_start="narrow"))
    x = np.stack([data.read_rgb(path)[:64, :64] for path in data.find_pictures([photos])[:5]])
    lmbda = tf.constant(5 * [narrow.config.lmbda_max])
    theirs, ours = narrow.transform(x, lmbda), model.transform(x, lmbda)
    kept = type(ours)(*(our * (np.arange(our.shape[-1]) < their.shape[-1]) for our, their in zip(ours, theirs)))
    pictures = [m.synthesis(y, lmbda).numpy() for m, y in ((narrow, theirs), (model, kept), (model, ours))]
    for our, their in zip(ours, theirs):
        np.testing.assert_allclose(our[..., : their.shape[-1]], their, atol=1e-3)
    np.testing.assert_allclose(pictures[0], pictures[1], atol=0.02)
    errors = [np.mean(np.square(x - picture)) for picture in pictures]
    assert errors[2] < 0.97 * errors[0]
    # Of the old latents the same distributions follow, of the new ones wide ones.
    rates = [m.estimate(x, lmbda).rates for m in (narrow, model)]
    for name in ("y_low", "y_high"):
        assert np.all(rates[1][name] >= 0.999 * rates[0][name]) and np.all(rates[1][name] < 4 * rates[0][name] + 4096)
    # No new channel is dead: what nothing reaches reaches something that is used, or the other way round.
    for layer, after, filters in zip(model.g_a, model.g_a[1:], [narrow.g_a[k].filters_high for k in range(3)]):
        incoming = np.abs(layer.high.kernel).max(axis=(0, 1, 2))[filters:]
        outgoing = np.abs(after.high.kernel).max(axis=(0, 1, 3))[filters:]
        assert np.all(incoming + outgoing > 0)


def test_a_model_of_many_more_channels_than_components_keeps_the_old_latents():
    """200 filters more, half of them high: the second stride has 48 components for them, the third four times as many."""
    config = presets.get_preset("variable_rate", "tiny")
    narrow, wide = zoo.new_model(config), zoo.new_model(config.adapt(208, 240))
    x, lmbda = np.stack([draw(128, 128, k) for k in range(16)]), tf.constant([0.05])
    widen.widen(wide, narrow, x)
    for theirs, ours in zip(narrow.transform(x[:1], lmbda), wide.transform(x[:1], lmbda)):
        np.testing.assert_allclose(ours[..., : theirs.shape[-1]], theirs, atol=1e-3)
        assert np.isfinite(ours).all()


def test_principal_components_are_where_a_run_starts(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(tf.keras.Model, "fit", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(training.principal, "CROPS", (8, 64))
    random, start = (training.train(options(photos, tmp_path / init, init=init)) for init in ("random", "pca"))
    x = np.stack([data.read_rgb(path)[:64, :64] for path in data.find_pictures([photos])[:2]])
    lmbda = tf.constant([0.05, 0.05])
    errors = [np.mean(np.square(x - model.synthesis(model.transform(tf.constant(x), lmbda), lmbda).numpy())) for model in (random, start)]
    assert errors[1] < 0.2 * errors[0]
    for changes in (dict(model="crpe", lambdas=(0.01,)), dict(warm_start="tiny")):
        with pytest.raises(UsageError, match="--init pca is for variable_rate and scalable_rnn without --warm_start"):
            training.train(options(photos, tmp_path / "b", init="pca", **changes))
    with pytest.raises(UsageError, match="needs a scalable_rnn with wider cells"):
        training.train(options(photos, tmp_path / "c", init="pca", model="scalable_rnn"))


def test_nan_stops_and_keeps_the_last_good_save(photos, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_schedule", lambda options: training.Schedule(float("inf"), [], 0.5, 0))
    shutil.copytree(unbroken[1], tmp_path, dirs_exist_ok=True)
    good = weights(tmp_path)
    # With a save after every step, the first one sees a finite loss and weights that are not.
    with pytest.raises(GoConvError, match=r"not finite at step 31; the last good save is that of step 30"):
        training.train(options(photos, tmp_path, last_step=40, save_steps=1))
    after = weights(tmp_path)
    assert all(np.array_equal(good[name], after[name]) for name in good)
    assert training.saved_step(str(tmp_path / "backup")) == 30


def test_schedules():
    run = options("", "", lr=1e-3, lr_drops=(0.5, 0.8), lr_drop_factor=0.1, last_step=100)
    schedule = training.make_schedule(run)
    np.testing.assert_allclose([schedule(s) for s in (0, 49, 50, 79, 80, 99)], [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5], rtol=1e-5)
    assert float(training.make_schedule(options("", "", lr=2e-4))(7)) == pytest.approx(2e-4)
    rising = training.make_schedule(options("", "", lr=1e-3, lr_drops=(0.5,), lr_drop_factor=0.1, last_step=100, lr_warmup=10))
    np.testing.assert_allclose([rising(s) for s in (0, 4, 9, 10, 50)], [1e-4, 5e-4, 1e-3, 1e-3, 1e-4], rtol=1e-5)
    with pytest.raises(UsageError, match="not both"):
        training.make_optimizer(options("", "", clip_value=1.0))


@pytest.mark.parametrize("name", ["variable_rate", "crpe", "scalable_rnn"])
def test_losses_in_mixed_precision(name):
    """All rates and distortions are float32 numbers near those of float32 layers."""
    x = tf.constant(np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)), tf.uint8)
    values = {}
    for policy in ("float32", "mixed_bfloat16"):
        tf.keras.mixed_precision.set_global_policy(policy)
        try:
            tf.keras.utils.set_random_seed(0)
            model = zoo.new_model(presets.get_preset(name, "tiny"))
            loss, metrics = model.loss_fn(x, tf.constant([0.01]), tf.constant([0, 1]), tf.constant(0))
        finally:
            tf.keras.mixed_precision.set_global_policy("float32")
        assert loss.dtype == tf.float32 and all(value.dtype == tf.float32 for value in metrics.values())
        values[policy] = float(loss), float(metrics["bpp"]), float(metrics["mse"])
    np.testing.assert_allclose(values["mixed_bfloat16"], values["float32"], rtol=0.05)
    assert values["mixed_bfloat16"] != values["float32"]


def test_another_number_of_layers_does_not_go_on(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(tf.keras.Model, "fit", lambda self, *args, **kwargs: None)
    run = options(photos, tmp_path, model="scalable_rnn", lambdas=(0.01, 0.02))
    training.train(run)
    training.train(dataclasses.replace(run, lambdas=(0.01, 0.03)))
    with pytest.raises(UsageError, match="holds a run with 2 layers, not 3"):
        training.train(dataclasses.replace(run, lambdas=(0.01, 0.02, 0.04)))


def test_soap_on_rounded_latents(photos, tmp_path):
    """A run with both; its moments are in the save, and another optimizer cannot go on from it."""
    run = options(photos, tmp_path, optimizer="soap", quantization="mixed", last_step=4, save_steps=2)
    model = training.train(run)
    assert isinstance(model.optimizer, training.Soap) and model.quantization == "mixed"
    # What z is rounded about is that of the weights at step 0, 500, ...; tables made for an export change nothing of what is trained.
    begun, exported = zoo.new_model(model.config), zoo.load_pretrained(str(tmp_path))
    offsets = [m.prior_z_high.quantization_offset.numpy() for m in (model, exported)]
    assert all(np.abs(offset).max() > 0 for offset in offsets) and not np.array_equal(*offsets)
    model.update_offsets()
    exported.update_offsets()
    assert not np.array_equal(model.prior_z_high.quantization_offset, offsets[0]) and not model.has_tables
    np.testing.assert_allclose(exported.prior_z_high.quantization_offset, offsets[1], atol=1e-6)
    begun.update_offsets()
    assert np.any(begun.prior_z_high.quantization_offset)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(np.isfinite(losses))
    shapes = [shape for _, shape in tf.train.list_variables(tf.train.latest_checkpoint(str(tmp_path / "backup" / "chief")))]
    assert shapes.count([25, 25]) > 20  # of the positions in 5 x 5 kernels
    with pytest.raises(UsageError, match="holds a run with optimizer soap, not adam"):
        training.train(options(photos, tmp_path, last_step=6))


def test_rounded_latents_from_now_on(photos, tmp_path, monkeypatch):
    """A run that goes on with `--quantization mixed` does not wait for the next five hundred steps to know what z is rounded about,
    nor does one that then ended before its first save."""
    stale = []
    monkeypatch.setattr(tf.keras.Model, "fit", lambda self, *args, callbacks, **kwargs: stale.append(callbacks[1].stale))
    for step, quantization in ((10, "noise"), (20, "noise"), (20, "mixed"), (20, "mixed"), (22, "mixed"), (24, "mixed")):
        monkeypatch.setattr(training, "saved_step", lambda _, step=step: step)
        training.train(options(photos, tmp_path, quantization=quantization))
    assert stale == [True, False, True, True, False, False]

    class Model:
        quantization, updates = "mixed", 0

        def update_offsets(self):
            self.updates += 1

    centre, model = training.Centre(stale=True), Model()
    centre.set_model(model)
    for step in (3, 4, 500, 501):
        monkeypatch.setattr(training, "step_of", lambda _, step=step: step)
        centre.on_train_batch_begin(0)
        assert model.updates == (1 if step < 500 else 2)


def test_fused_adam_is_keras_adam():
    a, b = tf.Variable([1.0, -2.0, 3.0]), tf.Variable([1.0, -2.0, 3.0])
    ours, theirs = training.Adam(0.01), tf.keras.optimizers.Adam(0.01)
    for k in range(5):
        gradient = tf.constant([0.3, -1.0 * k, 1e-4])
        ours.apply_gradients([(gradient, a)])
        theirs.apply_gradients([(gradient, b)])
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_mirrored_strategy_in_a_process_of_its_own(photos, unbroken, tmp_path):
    """Two virtual devices see the same global batches as one device."""
    code = """
import sys, tensorflow as tf
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
from goconv_tf import training
training.train(training.Options(model="variable_rate", preset="tiny", train_glob=(sys.argv[1],), checkpoint_dir=sys.argv[2], lambdas=(0.01, 0.05),
    patchsize=64, batchsize=2, lr=1e-3, clip_norm=1.0, last_step=10, save_steps=10, strategy="mirrored", tensorboard=False))
"""
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", code, photos, str(tmp_path)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert zoo.find_model(str(tmp_path)).card["training"]["steps"] == 10
    losses = [json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"] for folder in (tmp_path, unbroken[1])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_command_refuses_in_one_line(command, tmp_path):
    """In one process, which starts TensorFlow once."""
    code = """
import sys
from absl import flags
from goconv_tf import train
for line in sys.argv[1:]:
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS.flags_by_module_dict()["goconv_tf.train"]:
        name.unparse()
    flags.FLAGS(["train", *line.split("|")])
    assert train.main(["train"]) == 1
"""
    cases = (
        (["--checkpoint_dir", tmp_path / "a"], "needed"),
        (["--train_glob", tmp_path / "none*", "--checkpoint_dir", tmp_path / "a"], "no PNG"),
        (["--train_glob", "x", "--checkpoint_dir", tmp_path / "a", "--lambdas", "0.1,many"], "numbers"),
        (["--train_glob", "x", "--checkpoint_dir", tmp_path / "a", "--patchsize", "100"], "multiple of 16"),
        (["--train_glob", "x", "--checkpoint_dir", tmp_path / "a", "--lr_drop_factor", "0"], "above 0"),
        (["--train_glob", "x", "--checkpoint_dir", tmp_path / "a", "--patchsize", "160", "--distortion", "mix"], "161"),
    )
    env = {**os.environ, "PYTHONPATH": ROOT}
    lines = ["|".join(map(str, args)) for args, _ in cases]
    done = subprocess.run([sys.executable, "-c", code, *lines], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("goconv_tf.train: ")]
    assert len(errors) == len(cases) and all(word in line for line, (_, word) in zip(errors, cases))
    assert "needed" in one_line(command("--checkpoint_dir", tmp_path / "a", module="goconv_tf.train"))
    assert not (tmp_path / "a").exists()


def test_averages_are_what_is_exported():
    model = zoo.new_model(presets.get_preset("variable_rate", "tiny"))
    model.compile(training.make_optimizer(options("", "")))
    model.optimizer.build(model.trainable_variables)
    begun = [v.numpy() for v in model.trainable_variables]
    for v in model.trainable_variables:
        v.assign_add(tf.ones_like(v))
    with training.averaged_weights(model):
        for v, value in zip(model.trainable_variables, begun):
            np.testing.assert_array_equal(v, value)
    for v, value in zip(model.trainable_variables, begun):
        np.testing.assert_array_equal(v, value + 1)


@pytest.mark.parametrize("name", ["adam", "soap"])
def test_options_of_the_optimizer_reach_it(name):
    one = training.make_optimizer(options("", "", optimizer=name, clip_norm=0.5, ema=0.9))
    other = training.make_optimizer(options("", "", optimizer=name, clip_norm=0.0, clip_value=0.1, ema=0.0))
    assert (one.global_clipnorm, one.clipvalue, one.use_ema, one.ema_momentum, one.epsilon) == (0.5, None, True, 0.9, 1e-8)
    assert (other.global_clipnorm, other.clipvalue, other.use_ema) == (None, 0.1, False)


def test_options_reach_the_model_and_its_data(tmp_path, monkeypatch):
    monkeypatch.setattr(tf.keras.Model, "fit", lambda self, *args, **kwargs: None)
    Image.fromarray(draw(180, 190)).save(tmp_path / "a.png")
    made, original = [], data.PatchSource
    monkeypatch.setattr(data, "PatchSource", lambda *args: made.append(original(*args)) or made[-1])
    chosen = dict(distortion="mix", balance=0.5, quantization="mixed", gradients="bfloat16", patchsize=176, seed=7, flip=False, vivid=0.25)
    model = training.train(options(str(tmp_path), tmp_path / "run", **chosen))
    assert (model.distortion, model.balance, model.quantization, model.gradients) == ("mix", 0.5, "mixed", "bfloat16")
    (source,) = made
    assert (source.patch, source.batch, source.seed, source.flip, source.vivid) == (176, 2, 7, False, 0.25)
    for changes, message in ((dict(settings=("filters=12",)), "holds a run with --set nothing"), (dict(num_latents=12), "num_latents 0, not 12")):
        with pytest.raises(UsageError, match=message):
            training.train(options(str(tmp_path), tmp_path / "run", **chosen, **changes))


@pytest.mark.parametrize("kind", ["model", "crpe", "rnn"])
def test_validation_measures_what_coding_gives(kind, request, tmp_path):
    model, picture = request.getfixturevalue(kind), draw(64, 80)
    Image.fromarray(picture).save(tmp_path / "a.png")
    rows, loss = training.Validator(model, [str(tmp_path / "a.png")], (0.02,))(model)
    coded = model.compress(picture, 0.02, reconstruct=True)
    lambdas = (0.02,) if kind == "model" else (model.config.lmbda,) if kind == "crpe" else model.config.lambdas
    bits, expected = 0, []
    for lmbda, names, decoded in zip(lambdas, model.config.layers, coded.pictures):
        bits += 8 * sum(len(coded.strings[name]) for name in names)
        expected.append((lmbda, bits / (64 * 80), metrics.psnr(picture, decoded)))
    np.testing.assert_allclose(rows, expected, rtol=1e-3)
    errors = [metrics.mse(picture, decoded) for decoded in coded.pictures]
    assert loss == pytest.approx(np.mean([bpp + lmbda * mse for (lmbda, bpp, _), mse in zip(expected, errors)]), rel=1e-3)
