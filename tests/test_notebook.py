"""The notebook runs top to bottom, and is committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from data.assets import fetch_checkpoint
from data.errors import DataError
from data.sources import DataConfig, load_source

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "loraberta.ipynb"


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.real_cache
def test_it_trains_the_quickstart_at_a_small_size(tmp_path, monkeypatch):
    try:
        fetch_checkpoint("minilm")
        load_source(DataConfig("reuters-r8"), 0)
    except DataError as error:
        pytest.skip(f"the quickstart's files are not cached and can't be fetched: {error}")
    small = "--data.train-rows 64 --data.validation-fraction 0.02 --data.max-length 16 --train.epochs 1"
    monkeypatch.setenv("LORABERTA_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("LORABERTA_ARGUMENTS", f"{small} --train.device cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that the quickstart is chosen everywhere
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert "experiments/quickstart.toml" in printed and "test accuracy" in printed
    images = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(images) == 6
    answer = printed.strip().splitlines()[-1]
    assert "Oil prices rise" in answer and (tmp_path / "run" / "report.html").is_file()
