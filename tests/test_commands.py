"""The command line as a user meets it, in processes of its own."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, draw, load_script
from PIL import Image

from goconv_tf import arguments, bitstream, commands, metrics, training


def one_line(done):
    """The process failed with one line on stderr, and no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode != 0 and len(lines) == 1 and lines[0].startswith(("error: ", "goconv_tf.train: ")), done.stderr
    return lines[0]


def test_compress_info_decompress(command, photo, tmp_path):
    stream, picture = tmp_path / "a.gcv", tmp_path / "a.png"
    done = command("compress", photo, stream, "--model", "tiny-test", "--lmbda", "0.03", "--verify")
    assert done.returncode == 0 and "verified" in done.stdout, done.stderr
    seen = done.stdout.split()[-1]

    done = command("info", stream)
    info = json.loads(done.stdout)
    assert (info["width"], info["height"], info["model"], info["weights_match"]) == (203, 150, "tiny-test", True)
    assert info["bytes"] == os.path.getsize(stream) == info["header_bytes"] + sum(s["bytes"] for s in info["layers"][0]["substreams"].values())
    assert list(info["layers"][0]["substreams"]) == ["z_low", "z_high", "y_low", "y_high"]
    assert info["header_bytes"] <= 48

    done = command("decompress", stream, picture)
    assert done.returncode == 0 and done.stdout.split()[-1] == seen, done.stderr
    assert Image.open(picture).size == (203, 150)

    data = stream.read_bytes()
    for name, damage in (("cut", data[:-7]), ("flip", data[:60] + bytes([data[60] ^ 4]) + data[61:]), ("text", b"hello"), ("empty", b"")):
        bad, out = tmp_path / f"{name}.gcv", tmp_path / f"{name}.png"
        bad.write_bytes(damage)
        assert f"{name}.gcv" in one_line(command("decompress", bad, out))
        one_line(command("info", bad))
        assert not out.exists()
    assert sorted(os.listdir(tmp_path)) == sorted(["a.gcv", "a.png", "cut.gcv", "flip.gcv", "text.gcv", "empty.gcv"])


def test_flags_of_coding(command_here, photo, tmp_path):
    """What each does to files and pixels; that it does, its own tests say in more depth than a command line can."""
    stream, floats, picture = tmp_path / "a.gcv", tmp_path / "floats.gcv", tmp_path / "a.png"
    for path, flags in ((stream, ("--tile", "128")), (floats, ("--noexact",))):
        done = command_here("compress", photo, path, "--model", "tiny-test", "--lmbda", "0.03", *flags)
        assert done.returncode == 0, done.stderr
    assert [json.loads(command_here("info", path).stdout)["exact"] for path in (stream, floats)] == [True, False]
    done = command_here("decompress", stream, picture, "--tile", "128", "--max_seconds", "1000")
    assert done.returncode == 0, done.stderr
    whole = np.asarray(Image.open(picture))
    assert command_here("decompress", stream, picture, "--region", "20", "30", "50", "40").returncode == 0
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), whole[30:70, 20:70])
    damaged = bitstream.unpack(stream.read_bytes(), 10**6)
    damaged.layers[0] = damaged.layers[0]._replace(checksum=damaged.layers[0].checksum ^ 1)
    stream.write_bytes(bitstream.pack(damaged))
    assert "decoded latents differ" in one_line(command_here("decompress", stream, picture))
    done = command_here("decompress", stream, picture, "--force")
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), whole)
    assert done.returncode == 0 and "written by --force" in done.stdout
    shown = command_here("models", "--verbose").stdout
    assert "tiny-test" in shown and len(shown.splitlines()) > len(command_here("models").stdout.splitlines())


def test_folders_go_on_after_a_bad_file(command, tmp_path):
    source, streams, pictures = (tmp_path / name for name in ("in", "streams", "out"))
    source.mkdir()
    for k in range(2):
        Image.fromarray(draw(40 + k, 50, seed=k)).save(source / f"{k}.png")
    (source / "bad.png").write_text("no picture")
    done = command("compress", source, "--output_dir", streams, "--model", "tiny-test", "--entropy_coder", "range-coder")
    assert "bad.png" in one_line(done) and "[2/3" in done.stdout
    assert sorted(os.listdir(streams)) == ["0.gcv", "1.gcv"]
    done = command("decompress", streams, "--output_dir", pictures)
    # Originals stay, what decompress wrote is replaced.
    before = (source / "1.png").read_bytes()
    again = command("decompress", streams / "1.gcv", "--output_dir", source)
    assert "is there already" in one_line(again) and (source / "1.png").read_bytes() == before
    assert command("decompress", streams / "1.gcv", "--output_dir", pictures).returncode == 0
    assert done.returncode == 0 and Image.open(pictures / "1.png").size == (50, 41)
    assert bitstream.unpack((streams / "0.gcv").read_bytes(), 10**6).coder == "range-coder"


def test_two_inputs_for_one_output(command_here, tmp_path):
    for name in ("a.png", "b.png", "b.bmp"):
        Image.fromarray(draw(20, 30)).save(tmp_path / name)
    line = one_line(command_here("compress", tmp_path, "--output_dir", tmp_path / "out", "--model", "tiny-test"))
    assert f"{tmp_path}/b.bmp and {tmp_path}/b.png would both be written to {tmp_path}/out/b.gcv" in line
    assert not (tmp_path / "out").exists()


def test_formats_that_pictures_are_decoded_to(command_here, photo, tmp_path):
    """What the line says of pixels is true of the file, or the line says that it is not; JPEG loses little."""
    stream = tmp_path / "a.gcv"
    command_here("compress", photo, stream, "--model", "tiny-test")
    exactly = command_here("decompress", stream, tmp_path / "a.png").stdout.split()[-1]
    decoded = np.array(Image.open(tmp_path / "a.png"))
    for extension in ("bmp", "jp2", "ppm", "tga", "tiff", "webp", "sgi"):
        done = command_here("decompress", stream, tmp_path / f"a.{extension}")
        assert done.stdout.split()[-1] == exactly, extension
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / f"a.{extension}").convert("RGB")), decoded, extension)
    for extension, kind in (("jpg", "JPEG"), ("gif", "GIF")):
        assert command_here("decompress", stream, tmp_path / f"a.{extension}").stdout.endswith(f"{exactly} before {kind} changed them\n")
    Image.fromarray(decoded).save(tmp_path / "default.jpg")
    fine, default = (metrics.psnr(np.array(Image.open(tmp_path / name)), decoded) for name in ("a.jpg", "default.jpg"))
    assert fine > default + 10, (fine, default)


def test_wrong_use_is_one_line(command, command_here, photo, tmp_path):
    out = tmp_path / "x.gcv"
    big = bitstream.pack(bitstream.Stream("tfc", 1, 2, 3, 20_000, 20_000, [bitstream.Layer(4, [b""] * 4)]))
    (tmp_path / "big.gcv").write_bytes(big)
    (tmp_path / "stranger.gcv").write_bytes(bitstream.pack(bitstream.Stream("tfc", 1, 2, 3, 20, 20, [bitstream.Layer(4, [b""] * 4)])))
    os.symlink(photo, tmp_path / "photo.link")
    (tmp_path / "kept.sgi").write_bytes(b"a photograph")
    with open(tmp_path / "huge.gcv", "wb") as f:
        f.truncate(2**40)
    before = pathlib.Path(photo).read_bytes()
    for args, word in (
        (("compress", photo, tmp_path / "kept.sgi", "--model", "tiny-test"), "is there already, and no compressed file"),
        (("compress", photo, f"{tmp_path}/new/", "--model", "tiny-test"), "is a folder"),
        (("info", tmp_path / "huge.gcv"), "not a"),
        (("decompress", tmp_path / "huge.gcv"), "not a"),
        (("compress", photo, out, "--model", "no-such-model"), "no model"),
        (("compress", photo, out, "--model", "tiny-test", "--lmbda", "0.9"), "outside"),
        (("compress", photo, out, "--model", "tiny-test", "--target_bpp", "50"), "out of reach"),
        (("compress", tmp_path / "nothing.png", out, "--model", "tiny-test"), "no such file"),
        (("compress", f"{tmp_path}/two\nlines\x1b[31m.png", out, "--model", "tiny-test"), r"two\nlines\x1b[31m.png: no such file"),
        (("compress", photo, tmp_path / "no" / "x.gcv", "--model", "tiny-test"), "no such folder"),
        (("compress", photo, photo, photo, "--model", "tiny-test"), "--output_dir"),
        (("compress", photo, photo, "--model", "tiny-test"), "--output_dir"),
        (("compress", photo, "two.avif", "--model", "tiny-test"), "--output_dir"),
        (("compress", photo, "/dev/null", "--model", "tiny-test"), "not a regular file"),
        (("compress", photo, "-", "--model", "tiny-test"), "not written to the standard output"),
        (("compress", photo, tmp_path / "photo.link", "--model", "tiny-test"), "overwritten by its own output"),
        (("compress", photo, out, "--model", "tiny-test", "--max_megapixels", "0.01"), "limit"),
        (("decompress", tmp_path / "big.gcv"), "limit is 200000000"),
        (("decompress", tmp_path / "stranger.gcv"), "not in the zoo"),
        (("decompress", tmp_path / "stranger.gcv", "--model", "tiny-test"), "another model"),
        (("truncate", tmp_path / "big.gcv", tmp_path / "kept.sgi", "--layers", "1"), "is there already, and no compressed file"),
    ):
        assert word in one_line(command_here(*args)), args
    one_line(command("compress", photo, out, "--model", "tiny-test", "--lmbda", "0.9"))
    with pytest.raises(SystemExit):
        command_here("evaluate", os.path.dirname(photo), "--points", "0", "--model", "tiny-test")
    assert sorted(os.listdir(tmp_path)) == ["big.gcv", "huge.gcv", "kept.sgi", "photo.link", "stranger.gcv"]
    assert (tmp_path / "kept.sgi").read_bytes() == b"a photograph"
    assert pathlib.Path(photo).read_bytes() == before


def test_output_that_cannot_be_written_is_one_line():
    for target in ("/dev/full", "closed"):
        with open("/dev/full", "w", encoding="utf-8") as full:
            process = subprocess.Popen(
                [sys.executable, "-m", "goconv_tf", "models"],
                env={**os.environ, "PYTHONPATH": ROOT},
                stdout=full if target == "/dev/full" else subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            if process.stdout:
                process.stdout.close()
            error = process.stderr.read()
        assert process.wait() == 1 and error.startswith("error: [Errno") and len(error.splitlines()) == 1, error


def test_no_output_at_all():
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(f"{sys.executable} -m goconv_tf models >&-", shell=True, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""


def test_lack_of_memory_is_one_line(capsys):
    def greedy(*_):
        raise MemoryError

    assert commands.status_of(greedy) == 1 and commands.for_each([("a", "b")], greedy) == 1
    assert capsys.readouterr().err == "error: not enough memory\nerror: a: not enough memory\n"


def test_ctrl_c_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert commands.status_of(interrupted) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_help_and_info_do_not_load_tensorflow(command, tmp_path):
    (tmp_path / "a.gcv").write_bytes(bitstream.pack(bitstream.Stream("tfc", 1, 2, 3, 20, 20, [bitstream.Layer(4, [b"abc"] * 4)])))
    code = (
        "import sys, runpy; sys.argv = ['goconv_tf', *{args}]\n"
        "try: runpy.run_module('goconv_tf', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'tensorflow' not in sys.modules"
    )
    for args in (["--help"], ["info", str(tmp_path / "a.gcv")], ["models"], ["compress", "--help"]):
        done = subprocess.run([sys.executable, "-c", code.format(args=args)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "tiny-test: variable_rate" in command("models").stdout
    for name in ("compress", "decompress", "truncate", "info", "import_tf1", "models"):
        assert name in command("--help").stdout


def test_library_in_ten_lines(model_dir, photo):
    import goconv_tf

    model = goconv_tf.load_pretrained(model_dir)
    picture = goconv_tf.read_picture(photo)
    result = goconv_tf.compress(model, picture, lmbda=0.02, reconstruct=True)
    np.testing.assert_array_equal(goconv_tf.decompress(model, result.data), result.reconstruction)


def test_python_in_the_readme_runs(photo, tmp_path, monkeypatch):
    """Each block as it stands; but for the one on exports, which tests/test_export.py has."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        blocks = [block for block in re.findall(r"```python\n(.*?)```", f.read(), re.S) if '"exported"' not in block]
    assert len(blocks) == 3
    shutil.copy(photo, tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
    assert (tmp_path / "photo.gcv").stat().st_size > 100


def test_original_commands(command_here, model_dir, photo, tmp_path):
    script = os.path.join(ROOT, "experiments", "variable_rate.py")
    env = {**os.environ, "PYTHONPATH": ROOT}

    def run(*args):
        return subprocess.run([sys.executable, script, *map(str, args)], env=env, capture_output=True, text=True, check=False)

    stream, picture = tmp_path / "a.gcv", tmp_path / "a.png"
    done = run("--checkpoint_dir", model_dir, "compress", photo, stream, "--lmbda", "0.02")
    assert done.returncode == 0, done.stderr
    done = run("--checkpoint_dir", model_dir, "decompress", stream, picture)
    assert done.returncode == 0 and Image.open(picture).size == (203, 150)
    one_line(command_here("--checkpoint_dir", tmp_path, "decompress", stream, picture, module=script))
    assert run("train", "--help").returncode == 0


def test_original_training_flags_reach_training(monkeypatch):
    """The papers' settings where nothing is said."""
    runs, start = [], ("--restore_path", "start")
    monkeypatch.setattr(training, "train", runs.append)
    for name, *flags in (
        ("variable_rate", "train"),
        ("variable_rate", "--num_filters", "192", "--num_latents", "320", "train", "--lambdas", "high", "--distortion", "mse", "--lr", "1e-3"),
        ("variable_rate", "train", "--lambdas", "low"),
        ("crpe", "train"),
        ("crpe", *start, "--num_filters", "448", "--if_weight", "0", "train", "--lambda", "0.003", "--lr", "2e-4", "--lr_scheduling"),
    ):
        script = load_script(os.path.join(ROOT, "experiments", f"{name}.py"))
        assert script.command(script.make_parser().parse_args(flags)) == 0
    rate, rate_high, rate_low, crpe, crpe_high = runs
    assert [(c.filters, c.latents) for c in map(training.make_config, runs)] == [(448, 448), (192, 320), (448, 448), (192, 192), (448, 448)]
    assert (rate.batchsize, rate.patchsize, rate.lr, rate.last_step, rate.distortion) == (12, 256, 4e-4, 2_000_000, "mix")
    assert (rate_high.distortion, rate_high.lr) == ("mse", 1e-3)
    assert rate_low.lambdas == (1e-6, 5e-6, 1e-5, 3e-5, 7e-5, 1e-4, 3e-4, 7e-4, 1e-3, 3e-3, 5e-3)
    assert rate.lambdas == (1e-4, 3e-4, 7e-4, 1e-3, 3e-3, 5e-3, 7e-3, 0.01, 0.03, 0.05, 0.07, 0.1)
    assert rate_high.lambdas == (*rate.lambdas, 0.2, 0.3, 0.4, 0.5)
    assert (crpe.batchsize, crpe.patchsize, crpe.lr, crpe.last_step, crpe.lambdas, crpe.lr_drops) == (8, 256, 1e-4, 1_000_000, (0.01,), ())
    assert (crpe.warm_start, crpe_high.warm_start) == ("", "start")
    assert crpe.clip_value == pytest.approx(100) and crpe_high.clip_value == pytest.approx(50)
    assert (crpe_high.lambdas, crpe_high.lr_drops, crpe_high.lr_drop_factor) == ((0.003,), (0.5, 0.6, 0.7, 0.8, 0.9), 0.5)
    assert [training.make_config(run).if_weight for run in (crpe, crpe_high)] == [1.0, 0.0]
    assert all((run.flip, run.ema, run.optimizer, run.quantization, run.vivid) == (False, 0.0, "adam", "noise", 0.0) for run in runs)


@pytest.mark.parametrize(("name", "command"), [("crpe", "decode"), ("rnn", "decompress"), ("variable_rate", "decompress")])
def test_original_decoding_replaces_what_is_named_only(monkeypatch, name, command):
    """Of two names `commands.decompress` takes the second as meant; what the first alone leads to, it looks at."""
    calls = []
    monkeypatch.setattr(commands, "check_kind", lambda *args: None)
    monkeypatch.setattr(commands, "decompress", lambda files, *args, **kwargs: calls.append(files))
    script = load_script(os.path.join(ROOT, "experiments", f"{name}.py"))
    for files in (["a.bin"], ["a.bin", "b.png"]):
        script.command(script.make_parser().parse_args([command, *files]))
        assert calls.pop() == files


def test_numbers_on_the_command_line():
    wrong = {arguments.pixels: ("1e-7", "0", "1e10", "nan"), arguments.count: ("0", "-1"), arguments.positive: ("0", "inf", "nan")}
    for take, texts in wrong.items():
        for text in texts:
            with pytest.raises(ValueError):
                take(text)
    assert (arguments.pixels("1e-6"), arguments.count("1")) == (1, 1)
