"""docs/quickstart.ipynb runs as it stands, on fewer images, and holds no outputs."""

import pathlib
import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def test_it_is_valid_and_holds_no_outputs(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_links_lead_somewhere(notebook: nbformat.NotebookNode) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    pages = re.findall(r"docs/[\w.]+", text)
    assert len(pages) == 3
    for page in pages:
        assert (ROOT / page).exists(), page


# The kernel is a process of its own, reached by sockets that it closes when it pleases.
@pytest.mark.filterwarnings("default::ResourceWarning", "default::DeprecationWarning")
def test_it_runs(
    notebook: nbformat.NotebookNode, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    (sizes,) = (cell for cell in notebook.cells if "NUM_TRAIN, NUM_TEST =" in cell.source)
    sizes.source = re.sub(r"= 60, 40", "= 8, 4", sizes.source)
    assert "= 8, 4" in sizes.source
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable  # whatever `python3` may mean
    client.execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert "8 images to fit, 4 to score" in printed
    area = re.search(r"area under the ROC curve: ([\d.]+)", printed)
    assert area is not None
    assert 0.5 <= float(area[1]) <= 1
    assert "results/quickstart/0" in printed
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert (tmp_path / "results" / "quickstart" / "0").is_dir()
