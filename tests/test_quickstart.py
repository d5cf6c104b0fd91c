"""The quickstart notebook runs without noise on any machine, and its stored outputs tell nothing of one.

`python tests/test_quickstart.py` runs it and renews the outputs. The notebook itself asserts how good its modules are.
"""

import os
import re
import tempfile
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
MACHINE = re.compile(r"/(home|root|tmp|usr|opt|var|work|Users|mnt)\b|[A-Z]:\\|site-packages|ipykernel_\d+")
MOST_BYTES = 120_000
FOR_TESTS = "Needs what [test] installs: "


def executed(folder):
    """The notebook with the outputs of a run in a folder, by the Python that runs this."""
    import nbformat
    from nbclient import NotebookClient

    plt.close(plt.figure())  # builds matplotlib's cache of fonts, which the notebook would report
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    places = {"resources": {"metadata": {"path": str(folder)}}, "kernel_name": "python3"}
    client = NotebookClient(notebook, timeout=600, record_timing=False, **places)
    source = {"PYTHONPATH": str(NOTEBOOK.parents[1] / "src")}
    client.execute(env={**os.environ, **source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        outputs = [output for output in cell.get("outputs", []) if not _is_progress(output)]
        if cell.cell_type == "code":
            cell["outputs"] = outputs
    return notebook


def _is_progress(output):
    """Whether an output is the bar of something that takes long, which nothing is left of when it is stored."""
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def outputs_of(notebook, kind):
    return [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == kind]


def read():
    return pytest.importorskip("nbformat", reason=FOR_TESTS + "nbformat").read(NOTEBOOK, as_version=4)


def test_the_stored_notebook_has_its_outputs_and_no_trace_of_a_machine():
    notebook, text = read(), NOTEBOOK.read_text(encoding="utf-8")
    assert MACHINE.findall(text) == []
    assert len(text.encode()) < MOST_BYTES
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell.metadata for cell in cells] == [{}] * len(cells)
    assert [output for output in outputs_of(notebook, "stream") if output.name == "stderr"] == []
    assert outputs_of(notebook, "error") == []
    assert sum("image/png" in output.data for output in outputs_of(notebook, "display_data")) == 2
    links = [link for cell in notebook.cells for link in re.findall(r"\]\(([^)#]+)\)", cell.source)]
    assert [link for link in links if "://" not in link and not (NOTEBOOK.parent / link).exists()] == []


@pytest.mark.slow
def test_the_notebook_runs_without_noise(tmp_path):
    for name in ("nbclient", "ipykernel", "ipywidgets"):
        pytest.importorskip(name, reason=FOR_TESTS + name)
    stored, notebook = read(), executed(tmp_path)
    assert [output.text for output in outputs_of(notebook, "stream") if output.name == "stderr"] == []
    assert [cell.source for cell in stored.cells] == [cell.source for cell in notebook.cells]
    for cell, known in zip(notebook.cells, stored.cells, strict=True):
        kinds = [[output.output_type for output in each.get("outputs", [])] for each in (cell, known)]
        found, expected = ([kind for kind, _ in groupby(own)] for own in kinds)  # what is printed may come in parts
        assert found == expected, cell.source
    assert {path.name for path in tmp_path.iterdir()} <= {"digits-389", "digits-389-onnx", "quickstart"}
    assert (tmp_path / "digits-389" / "model.safetensors").exists()


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as name:
        nbformat.write(executed(name), NOTEBOOK)
