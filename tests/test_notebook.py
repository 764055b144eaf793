"""eval/inspect_rewards.ipynb runs top to bottom on a run folder and shows every panel; as committed it has no outputs."""

import base64
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.conftest import ROOT
from tests.small_run import write_run

NOTEBOOK = ROOT / "eval" / "inspect_rewards.ipynb"
# tag of a cell -> figures in it (of pairs: three)
FIGURES = {
    "training": 1,
    "margins": 1,
    "length": 1,
    "worst_pairs": 3,
    "tokens": 3,
    "labeler": 2,
    "pair_order": 1,
    "results": 2,
    "best_of_n": 1,
}


@pytest.fixture
def execute(monkeypatch):
    """execute(run) runs all cells on a run folder; gives the pictures of every tagged cell as grey values."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this tree's muffin, whatever is installed

    def function(run: Path) -> dict[str, list[np.ndarray]]:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        (parameters,) = (cell for cell in notebook.cells if tags(cell) == ["parameters"])
        parameters.source = f"RUN = {str(run)!r}"
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
        return {tags(cell)[0]: pictures(cell) for cell in notebook.cells if tags(cell) and tags(cell) != ["parameters"]}

    return function


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def pictures(cell: nbformat.NotebookNode) -> list[np.ndarray]:
    found = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L")) for data in found]


def test_every_panel_is_drawn(execute, tiny_llava_path, tmp_path):
    shown = execute(write_run(tmp_path / "run", tiny_llava_path))
    assert {tag: len(found) for tag, found in shown.items()} == FIGURES
    for tag, found in shown.items():
        for picture in found:
            assert min(picture.shape) > 100 and picture.std() > 10, tag  # a blank page is one grey value


def test_photos_have_no_truth(execute, tiny_llava_path, tmp_path):
    shown = execute(write_run(tmp_path / "run", tiny_llava_path, truth=False))
    without = {"labeler": 0, "pair_order": 0, "results": 0}
    assert {tag: len(found) for tag, found in shown.items()} == FIGURES | without


def test_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == len(FIGURES) + 2
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert 'RUN = "../outputs/demo"' in [cell.source for cell in code if tags(cell) == ["parameters"]]
