"""The sdist, the wheel that is built from it, and the wheel installed outside the checkout."""

import email
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import CHECKPOINTS, ROOT, draw
from PIL import Image

import goconv_tf

MODELS = [os.path.basename(folder) for folder in CHECKPOINTS]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder with both, built with what is installed here."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """(run a command, folder): the wheel without its dependencies in a folder that comes first on the path; runs elsewhere."""
    folder, elsewhere = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    wheel = next(dist.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True)
    env = {key: value for key, value in os.environ.items() if key != "GOCONV_TF_ZOO"}

    def run(*command):
        done = subprocess.run(
            command, env={**env, "PYTHONPATH": str(folder)}, cwd=elsewhere, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run, folder


def test_wheel_holds_the_package_and_its_models_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(next(name for name in names if name.endswith("METADATA"))))
        commands = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    sources = {str(path.relative_to(ROOT)) for path in pathlib.Path(ROOT, "goconv_tf").rglob("*.py")}
    models = {f"goconv_tf/pretrained/{name}/{part}" for name in MODELS for part in ("config.json", "model.safetensors", "README.md", "curve.png")}
    data = {f"goconv_tf/{name}" for name in ("py.typed", "published.json", "report_template.html")}
    info = f"goconv_tf-{goconv_tf.__version__}.dist-info/"
    assert MODELS and {name for name in names if not name.startswith(info)} == sources | models | data
    assert metadata["Name"] == "goconv_tf" and metadata["Version"] == goconv_tf.__version__
    assert metadata["Requires-Python"] and "goconv = " in commands and "goconv-train = " in commands


def test_sdist_holds_what_tests_and_documentation_need(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    tracked = pathlib.Path(ROOT)
    wanted = [
        path
        for folder in ("tests", "experiments", "notebooks", "docs", "benchmarks", "checkpoints")
        for path in tracked.joinpath(folder).rglob("*")
        if path.is_file()
    ]
    missing = {str(path.relative_to(ROOT)) for path in wanted if not {"__pycache__", "executed"} & set(path.parts)} - names
    assert not missing
    assert {".pre-commit-config.yaml", "Makefile", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md", "checkpoints/README.md"} <= names
    assert not [name for name in names if name.startswith((".venv", "build", "dist", ".git/")) or name.endswith(".pyc")]


def test_installed_wheel_codes_a_picture_with_its_own_model(installed, tmp_path):
    run, folder = installed
    photo, stream = tmp_path / "photo.png", tmp_path / "photo.gcv"
    Image.fromarray(draw(96, 130)).save(photo)
    code = """
import sys, goconv_tf
model = goconv_tf.load_pretrained("variable-rate-small-mse")
picture = goconv_tf.read_picture(sys.argv[1])
result = goconv_tf.compress(model, picture, lmbda=0.05, reconstruct=True)
open(sys.argv[2], "wb").write(result.data)
decoded = goconv_tf.decompress(model, result.data)
assert decoded.shape == picture.shape and (decoded == result.reconstruction).all() and goconv_tf.metrics.psnr(picture, decoded) > 20
print(goconv_tf.__file__, model.info.path, sep="\\n")
"""
    places = run(sys.executable, "-c", code, str(photo), str(stream)).splitlines()[-2:]
    assert all(place.startswith(str(folder)) for place in places), places
    goconv = str(folder / "bin" / "goconv")
    assert '"variable-rate-small-mse"' in run(goconv, "info", str(stream))
    listed = run(goconv, "models")
    assert all(name in listed for name in MODELS)


def test_training_command_knows_its_flags(installed):
    _, folder = installed
    help_text = subprocess.run(
        [str(folder / "bin" / "goconv-train"), "--help"], env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False
    )
    assert "--checkpoint_dir" in help_text.stdout
