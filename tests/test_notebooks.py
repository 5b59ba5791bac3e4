"""The lessons run, from top to bottom, without an error or a warning, and keep the shape of a lesson."""

import ast
import math
import os
import queue
import re
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks' extra is not installed")
nbclient = pytest.importorskip("nbclient", reason="the notebooks' extra is not installed")

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_LINES = 10  # of a code cell, blank ones not counted; the cell of the imports may be longer
THIRD_PARTY = {"l2m_viz", "torch", "matplotlib", "ipywidgets"}
CELL_TIMEOUT_S = 300

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parse(cell):
    """Syntax tree of a cell without its IPython magics."""
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")))


def imports(cell):
    """Top-level packages that a cell imports."""
    names = set()
    for node in ast.walk(parse(cell)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def test_the_lessons_are_there():
    expected = {"01_lifting", "02_pairs", "03_gaussians", "04_feature_lifting", "05_encoder", "06_matching"}
    assert expected <= {path.stem for path in LESSONS}


@every_lesson
def test_nothing_is_stored_but_the_lesson(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None, f"strip cell {cell.id}: make format"
    assert not re.search(r"/(home|work|tmp|root|Users)/", path.read_text()), "a path of somebody's machine"


@every_lesson
def test_first_says_what_and_second_imports(path):
    first, second, *rest = read(path).cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    for word in ("**Purpose.**", "**Prerequisites.**", "**Time.**"):
        assert word in first.source
    assert second.cell_type == "code" and second.source.startswith("%matplotlib inline\n")
    assert imports(second) - set(sys.stdlib_module_names) <= THIRD_PARTY
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in parse(second).body)
    for cell in (cell for cell in rest if cell.cell_type == "code"):
        assert not imports(cell), f"cell {cell.id} imports; the second cell should"


@every_lesson
def test_code_is_short_and_explained(path):
    cells = read(path).cells
    for before, cell in pairwise(cells[1:]):
        if cell.cell_type != "code":
            continue
        assert before.cell_type == "markdown", f"cell {cell.id} comes without a word"
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= MAX_LINES, f"cell {cell.id} has {len(lines)} lines"
    assert cells[-1].cell_type == "markdown"
    assert "## Summary" in cells[-1].source and "## Exercises" in cells[-1].source
    assert sum("**Question.**" in cell.source for cell in cells) >= 5


@every_lesson
def test_the_last_code_checks_what_was_claimed(path):
    *_, check = code_cells(read(path))
    assert sum(isinstance(node, ast.Assert) for node in parse(check).body) >= 3


@every_lesson
def test_a_lesson_defines_nothing_but_what_a_widget_moves(path):
    cells = code_cells(read(path))
    widgets = "\n".join(line for cell in cells for line in cell.source.splitlines() if "interact(" in line)
    for cell in cells:
        for node in ast.walk(parse(cell)):
            assert not isinstance(node, ast.ClassDef), f"cell {cell.id} defines a class"
            if isinstance(node, ast.FunctionDef):
                assert f"interact({node.name}," in widgets, f"cell {cell.id} defines library code"
                assert f"{node.name}(" in cell.source.replace(f"def {node.name}(", ""), (
                    "call it in plain code, too"
                )


@every_lesson
def test_it_runs(path, tmp_path):
    from jupyter_client.asynchronous.client import AsyncKernelClient
    from jupyter_client.channels import AsyncZMQSocketChannel
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import Type

    class ShortPolls(AsyncZMQSocketChannel):
        """Look again every second: nbclient answers widgets on the socket it polls and can miss its own wake-up."""

        async def get_msg(self, timeout=None):
            end = math.inf if timeout is None else time.monotonic() + timeout
            while True:
                try:
                    return await super().get_msg(timeout=max(0.0, min(1.0, end - time.monotonic())))
                except queue.Empty:
                    if time.monotonic() >= end:
                        raise

    class Client(AsyncKernelClient):
        shell_channel_class = Type(ShortPolls)

    class ThisPython(AsyncKernelManager):
        """A kernel of the Python that runs the tests, whatever kernels the user has installed."""

        def client(self, **kwargs):
            self.client_factory = Client
            return super().client(**kwargs)

        @property
        def kernel_spec(self):
            return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(found), "IPYTHONDIR": str(tmp_path)}
    notebook = read(path)
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=env)  # raises at the first cell that does

    pictures = 0
    for cell, after in pairwise(notebook.cells):
        outputs = cell.get("outputs", [])
        said = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stderr")
        assert not said, f"cell {cell.id} warns: {said}"
        shown = sum("image/png" in out.get("data", {}) for out in outputs)
        assert shown <= 1, f"cell {cell.id} shows {shown} pictures"
        if shown:
            pictures += 1
            assert "**What we see.**" in after.source, (
                f"the picture of cell {cell.id} comes without a reading"
            )
    assert pictures >= 5
    # an error inside a widget's function is kept in the widget and fails no cell
    assert "'output_type': 'error'" not in str(notebook.metadata.get("widgets", {}))


def test_the_viewer_is_inline():
    """`show_scene` ends a cell of the third lesson; that it draws is checked with a real browser elsewhere."""
    assert any(
        "show_scene(" in cell.source for cell in code_cells(read(ROOT / "notebooks/03_gaussians.ipynb"))
    )
