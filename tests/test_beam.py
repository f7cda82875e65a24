"""Archives through Apache Beam: nothing lost, nothing twice, no half-written file, on any filesystem."""

import io
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from conftest import ROOT, draw
from PIL import Image

pytest.importorskip("apache_beam")

from apache_beam.io.filesystem import BeamIOError, FileMetadata, FileSystem

import goconv_tf
from goconv_tf import archive, beam, codec, commands, evaluation, picture_io, zoo
from goconv_tf.errors import CheckpointError, GoConvError, RateError, UsageError

REPORTS = {archive.SETTINGS, archive.METRICS, archive.DEAD_LETTERS, archive.SUMMARY}
TWO_PROCESSES = ("--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2")


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def claiming(data, width, height):
    """A PNG whose header claims another size, with its right checksum."""
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def poison():
    """{name: (bytes, what is said of them)}."""
    good = png(draw(32, 48))
    return {
        "text.png": (b"not a picture", "cannot be read"),
        "empty.png": (b"", "cannot be read"),
        "truncated.png": (good[:-700], "cannot be read"),
        "alpha.png": (png(np.zeros([8, 8, 4], np.uint8)), "transparency"),
        "deep.png": (png(np.zeros([8, 8], np.uint16)), "depth"),
        "huge.png": (claiming(good, 60_000, 60_000), "limit is 200000000 pixels"),
    }


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def files_under(folder):
    return {str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*") if path.is_file()}


def test_killed_and_run_again(model, model_dir, tmp_path):
    """200 pictures, some of them poison, two processes, SIGKILL half-way."""
    source, output = tmp_path / "in", tmp_path / "out"
    bad = {f"{folder}/{name}": value for folder in ("x", "y/z [1]") for name, value in poison().items()}
    good = {f"{('x', 'y/z [1]')[k % 2]}/{k}.png": png(draw(32, 48, k)) for k in range(200 - len(bad))}
    for name, data in {**good, **{name: data for name, (data, _) in bad.items()}}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    args = ["compress", f"--input={source}/**.png", f"--output={output}", f"--model={model_dir}", "--lmbda=0.02", *TWO_PROCESSES]
    command = [sys.executable, "-m", "goconv_tf.beam", *args]
    env = {**os.environ, "PYTHONPATH": ROOT}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        deadline = time.time() + 200
        while len(files_under(output)) < 60 and process.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    time.sleep(1)
    made = {name: (output / name).read_bytes() for name in files_under(output) if name.endswith(".gcv")}
    assert 50 < len(made) < len(good)
    for data in made.values():
        assert archive.describe(data)["bytes"] == len(codec.bitstream.pack(codec.bitstream.unpack(data, 10**6)))  # whole
    times = {name: os.stat(output / name).st_mtime_ns for name in made}

    (source / "x" / "empty.png").write_bytes(png(draw(32, 48, 999)))  # somebody mended one
    del bad["x/empty.png"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == beam.STATUS_DEAD_LETTERS, done.stderr[-2000:]
    expected = {name[:-4] + ".gcv" for name in {*good, "x/empty.png"}}
    assert files_under(output) == expected | REPORTS  # no temporary file either
    assert {name: os.stat(output / name).st_mtime_ns for name in made} == times
    for name in sorted(expected)[::40]:
        picture = picture_io.read_picture(str(source / (name[:-4] + ".png")))
        assert (output / name).read_bytes() == codec.compress(model, picture, lmbda=0.02).data

    rows, dead = lines(output / archive.METRICS), lines(output / archive.DEAD_LETTERS)
    assert sorted(row["path"] for row in rows) == sorted(str(source / name) for name in {*good, "x/empty.png"})
    assert sorted(row["path"] for row in dead) == sorted(str(source / name) for name in bad)
    for row in rows:
        size = os.path.getsize(row["output"])
        assert row["bytes"] == size and row["bpp"] == 8 * size / (32 * 48) and row["lmbda"] == pytest.approx(0.02)
    for row in dead:
        assert bad[os.path.relpath(row["path"], source)][1] in row["reason"] and "BytesIO" not in row["reason"]
    summary = json.loads((output / archive.SUMMARY).read_text())
    assert (summary["inputs"], summary["done"], summary["dead_letters"]) == (200, 189, 11)
    assert summary["means"]["bpp"] == {"mean": pytest.approx(np.mean([row["bpp"] for row in rows])), "pictures": 189}
    assert summary["bytes"] == sum(row["bytes"] for row in rows)
    assert done.stdout.splitlines()[-1] == f"{output}: 189 of 200 done, {summary['bpp_overall']:.4f} bpp, 11 dead letters"


class MemoryFileSystem(FileSystem):
    """A filesystem that is no disk: flat names, and rename does not replace, as HDFS'."""

    files: dict = {}

    @classmethod
    def scheme(cls):
        return "mem"

    def join(self, basepath, *paths):
        return "/".join([basepath.rstrip("/"), *paths])

    def split(self, path):
        head, _, tail = path.rpartition("/")
        return head, tail

    def mkdirs(self, path):
        pass

    def has_dirs(self):
        return False

    def _list(self, dir_or_prefix):
        return [self.metadata(path) for path in self.files if path.startswith(dir_or_prefix)]

    def create(self, path, mime_type="application/octet-stream", compression_type="auto"):
        assert compression_type == "uncompressed"
        files = self.files

        class Writer(io.BytesIO):
            def close(self):
                files[path] = self.getvalue()
                super().close()

        return Writer()

    def open(self, path, mime_type="application/octet-stream", compression_type="auto"):
        assert compression_type == "uncompressed"
        if path not in self.files:
            raise BeamIOError(f"{path}: not there")
        return io.BytesIO(self.files[path])

    def copy(self, source_file_names, destination_file_names):
        raise NotImplementedError

    def rename(self, source_file_names, destination_file_names):
        for a, b in zip(source_file_names, destination_file_names):
            if b in self.files:
                raise BeamIOError(f"{b}: is there")
            self.files[b] = self.files.pop(a)

    def exists(self, path):
        return path in self.files

    def size(self, path):
        return len(self.files[path])

    def metadata(self, path):
        return FileMetadata(path, len(self.files[path]), 0.0)

    last_updated = checksum = size

    def delete(self, paths):
        for path in paths:
            del self.files[path]


@pytest.fixture
def memory(monkeypatch, model_dir, rnn_dir):
    monkeypatch.setattr(MemoryFileSystem, "files", {})
    monkeypatch.setenv("GOCONV_TF_ZOO", os.pathsep.join(map(os.path.dirname, (model_dir, rnn_dir))))
    return MemoryFileSystem.files


def run(command, pattern, output, *more):
    return beam.main([command, f"--input={pattern}", f"--output={output}", *more])


def test_there_and_back_on_another_filesystem(model, rnn, memory):
    for k in range(3):
        memory[f"mem://photos/{k}/a.png"] = png(draw(32, 48, k))
    memory["mem://photos/4.png"] = b"?"
    memory["mem://photos/5.tar"] = b"not asked for"
    assert run("compress", "mem://photos/**.png", "mem://coded", "--model=tiny-test") == 3
    streams = {f"mem://coded/{k}/a.gcv": codec.compress(model, draw(32, 48, k)).data for k in range(3)}
    assert {path: memory[path] for path in memory if path.endswith(".gcv")} == streams
    assert json.loads(memory["mem://coded/_dead_letters.jsonl"])["path"] == "mem://photos/4.png"

    memory["mem://coded/2/b.gcv"] = codec.compress(rnn, draw(32, 48)).data
    memory["mem://coded/2/cut.gcv"] = memory["mem://coded/2/b.gcv"][:-1]
    memory["mem://coded/2/odd.gcv"] = b"\x89PNG"
    for _ in range(2):
        assert run("decompress", "mem://coded/**.gcv", "mem://decoded") == 3
        assert {path for path in memory if path.endswith(".png") and "decoded" in path} == {
            "mem://decoded/0/a.png",
            "mem://decoded/1/a.png",
            "mem://decoded/2/a.png",
            "mem://decoded/2/b.png",
        }
        reasons = {row["path"]: row["reason"] for row in map(json.loads, memory["mem://decoded/_dead_letters.jsonl"].splitlines())}
        assert "cut short" in reasons["mem://coded/2/cut.gcv"] and "not a goconv_tf file" in reasons["mem://coded/2/odd.gcv"]
    for k in range(3):
        picture = picture_io.read_picture("", file=io.BytesIO(memory[f"mem://decoded/{k}/a.png"]))
        np.testing.assert_array_equal(picture, codec.decompress(model, streams[f"mem://coded/{k}/a.gcv"]))
    assert run("decompress", "mem://coded/**.gcv", "mem://decoded", "--allow_truncated") == 3
    summary = json.loads(memory["mem://decoded/_summary.json"])
    assert (summary["done"], summary["dead_letters"]) == (5, 1)
    # What was decoded in part is no whole picture now, nor is an original of the same size what decoding gives.
    memory["mem://decoded/0/a.png"] = png(draw(32, 48))
    assert run("decompress", "mem://coded/**.gcv", "mem://decoded") == 3
    reasons = {row["path"]: row["reason"] for row in map(json.loads, memory["mem://decoded/_dead_letters.jsonl"].splitlines())}
    assert len(reasons) == 3 and "cut short" in reasons["mem://coded/2/cut.gcv"] and "in the way" in reasons["mem://coded/0/a.gcv"]
    assert not [path for path in memory if archive.TEMPORARY in path]


def test_evaluate(memory):
    pictures = {"a": draw(32, 48), "b": draw(176, 192, 1)}
    for name, picture in pictures.items():
        memory[f"mem://in/{name}.png"] = png(picture)
    for _ in range(2):  # the second run reads what the first one measured
        assert run("evaluate", "mem://in/*.png", "mem://out", "--model=tiny-rnn", "--layers=2") == 0
        rows = {row["path"]: row for row in map(json.loads, memory["mem://out/_metrics.jsonl"].splitlines())}
        for name, picture in pictures.items():
            subject = evaluation.ModelSubject("tiny-rnn")
            expected, data = evaluation.measure_picture(subject, picture, {"layers": 2})
            row = rows[f"mem://in/{name}.png"]
            assert row["bytes"] == len(data) and row["lmbda"] is None and row["output"] == f"mem://out/{name}.json"
            for key in ("bpp", "psnr-rgb", "ms-ssim-rgb"):
                assert row[key] == expected[key]
        means = json.loads(memory["mem://out/_summary.json"])["means"]
        assert means["ms-ssim-rgb"] == {"mean": rows["mem://in/b.png"]["ms-ssim-rgb"], "pictures": 1}  # the other is too small
        assert means["psnr-rgb"]["mean"] == pytest.approx(np.mean([row["psnr-rgb"] for row in rows.values()]))


@pytest.mark.parametrize("pattern, output", [("**", "coded"), ("photos/**", "./photos"), ("photos/", "photos"), ("{}/photos/**", "photos")])
def test_outputs_among_the_inputs_whatever_they_are_called(pattern, output, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("GOCONV_TF_ZOO", os.path.dirname(model_dir))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png(draw(16, 16)))
    with pytest.raises(UsageError, match="an input itself"):
        run("compress", pattern.format(tmp_path), output, "--model=tiny-test")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "photos"]


def test_names_that_are_no_text(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("GOCONV_TF_ZOO", os.path.dirname(model_dir))
    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "in" / f"{name}.png").write_bytes(png(draw(16, 16)))
    (tmp_path / "in" / f"{name}2.png").write_bytes(b"none")
    assert run("compress", f"{tmp_path}/in/*.png", str(tmp_path / "out"), "--model=tiny-test") == 3
    assert "caf\\udce92.png: cannot be read" in lines(tmp_path / "out" / archive.DEAD_LETTERS)[0]["reason"]
    assert (tmp_path / "out" / f"{name}.gcv").exists()
    assert lines(tmp_path / "out" / archive.METRICS)[0]["path"].endswith("caf\\udce9.png")


def test_what_cannot_be_run(memory, model, model_dir, tmp_path, monkeypatch, capsys):
    for name in ("a.png", "a.jpg", "b/_metrics.png", "_summary.png", f"c/{archive.TEMPORARY}/a.png", "d/../a.png"):
        memory[f"mem://in/{name}"] = png(draw(16, 16))
    before = dict(memory)
    for error, message, args in (
        (UsageError, "a.jpg and mem://in/a.png would both be written to mem://out/a.gcv", ("compress", "mem://in/a.*", "mem://out")),
        (UsageError, "mem://in/d/../a.png: has . or .. as a folder", ("compress", "mem://in/d/**", "mem://out")),
        (UsageError, "no files match", ("compress", "mem://in/*.bmp", "mem://out")),
        (UsageError, "filesystem", ("compress", "s4://in/*.png", "mem://out")),
        (UsageError, "filesystem", ("compress", "mem://in/a.png", "s4://out")),
        (UsageError, "an input itself", ("compress", "mem://in/**", "mem://in/out")),
        (UsageError, "which is kept for reports", ("evaluate", "mem://in/*.png", "mem://out")),
        (UsageError, "kept for reports and temporary files", ("compress", "mem://in/c/**", "mem://out")),
        (UsageError, "wildcards", ("compress", "mem://in/a.png", "mem://o*t")),
        (UsageError, "unknown argument --lmdba", ("compress", "mem://in/a.png", "mem://out", "--lmdba=0.01")),
        (UsageError, "unknown argument in/b", ("compress", "mem://in/a.png", "mem://out", "in/b")),
        (RateError, "outside the model's range", ("compress", "mem://in/a.png", "mem://out", "--lmbda=0.9")),
        (RateError, "2 layers were asked for", ("compress", "mem://in/a.png", "mem://out", "--layers=2")),
        (CheckpointError, "no model 'none'", ("compress", "mem://in/a.png", "mem://out", "--model=none")),
    ):
        with pytest.raises(error, match=message):
            run(*args[:3], "--model=tiny-test", *args[3:])
        assert memory == before
    with pytest.raises(SystemExit) as stop:
        run("compress", "mem://in/a.png", "mem://out", "--model=tiny-test", "--lmbda=0.01", "--target_bpp=1")
    assert stop.value.code == 2

    # What is in an output folder already.
    memory["mem://out/a.gcv"] = b"precious"
    assert run("compress", "mem://in/a.png", "mem://out", "--model=tiny-test") == 3
    assert memory["mem://out/a.gcv"] == b"precious" and b"in the way" in memory["mem://out/_dead_letters.jsonl"]
    for kept in (50, 5):  # a file that was cut is not done
        memory["mem://out/a.gcv"] = codec.compress(model, draw(16, 16)).data[:-kept]
        assert run("compress", "mem://in/a.png", "mem://out", "--model=tiny-test") == 3
        assert b"in the way" in memory["mem://out/_dead_letters.jsonl"]
    memory["mem://out/a.gcv"] = b"precious"
    with pytest.raises(UsageError, match=r"other settings \(lmbda None, not 0.01\)"):
        run("compress", "mem://in/a.png", "mem://out", "--model=tiny-test", "--lmbda=0.01")

    # Pictures of the same name in another folder, which are others.
    memory["mem://in2/a.png"] = png(draw(16, 20))
    with pytest.raises(UsageError, match="input_folder mem://in/, not mem://in2/"):
        run("compress", "mem://in2/a.png", "mem://out", "--model=tiny-test")
    settings = json.loads(memory["mem://out/_settings.json"])
    del settings["input_folder"]  # of an earlier version
    memory["mem://out/_settings.json"] = json.dumps(settings).encode()
    assert run("compress", "mem://in/a.png", "mem://out", "--model=tiny-test") == 3

    memory["mem://out3/a.json"] = b"[]"
    assert run("evaluate", "mem://in/a.png", "mem://out3", "--model=tiny-test") == 3
    assert memory["mem://out3/a.json"] == b"[]" and b"in the way" in memory["mem://out3/_dead_letters.jsonl"]
    memory["mem://out3/_settings.json"] = b"3"
    with pytest.raises(UsageError, match=r"_settings\.json: is not what an earlier run has written"):
        run("evaluate", "mem://in/a.png", "mem://out3", "--model=tiny-test")

    memory["mem://coded/a.gcv"] = codec.compress(model, draw(16, 16)).data
    memory["mem://decoded/a.png"] = png(draw(16, 17))
    assert run("decompress", "mem://coded/a.gcv", "mem://decoded", f"--model={model_dir}") == 3
    assert memory["mem://decoded/a.png"] == png(draw(16, 17)) and b"in the way" in memory["mem://decoded/_dead_letters.jsonl"]

    # A damaged model is no picture's fault.
    folder = tmp_path / "damaged"
    shutil.copytree(model_dir, folder)
    (folder / zoo.WEIGHTS_FILE).write_bytes((folder / zoo.WEIGHTS_FILE).read_bytes()[:-1])
    with pytest.raises(GoConvError, match=r"the pipeline failed: .*SHA-256") as caught:
        run("compress", "mem://in/a.png", "mem://out2", f"--model={folder}")
    assert "\n" not in str(caught.value) and "mem://out2/_dead_letters.jsonl" not in memory

    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "goconv_tf.archive")
    monkeypatch.delattr(goconv_tf, "archive")
    args = ["compress", "--input=a", "--output=b", "--model=tiny-test"]
    assert commands.status_of(beam.main, args) == 1
    assert capsys.readouterr().err == "error: Apache Beam is not installed: pip install 'apache-beam~=2.69'\n"
