"""Every notebook runs from its first cell to its last, as a user would run it, and shows pictures.

make notebooks: the same, and leaves the notebooks with what they show, and their pictures, in $NOTEBOOKS_OUTPUT.
"""

import base64
import os
import pathlib

import nbclient
import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted(pathlib.Path(ROOT, "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    for name in ("IMAGES", "GOCONV_TF_ZOO"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "notebooks are committed without outputs"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    pictures = [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and all(len(picture) > 5000 for picture in pictures)
    if os.environ.get("NOTEBOOKS_OUTPUT"):
        folder = pathlib.Path(os.environ["NOTEBOOKS_OUTPUT"])
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, folder / path.name)
        for number, picture in enumerate(pictures):
            (folder / f"{path.stem}-{number}.png").write_bytes(picture)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"layers", "train", "curve", "scalable"}
