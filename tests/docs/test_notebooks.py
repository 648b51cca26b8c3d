"""The notebooks run from top to bottom, their exercises' solutions too, and what is committed
comes from such a run."""

import ast
import base64
import io
import os
import re
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from PIL import Image
from run import run, smaller, tidy

from helpers import ROOT
from helpers.pages import PAGES, README

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PACKAGES = {"chat", "judge", "experiments"}
READ = {path.stem for path in FOLDER.parent.glob("*.py")} - {"train"} | PACKAGES
OURS = READ | {"train", "benchmarks", "tests", "recordings"}
MOST_CELLS = 70


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def solutions_of(notebook):
    """(place of the cell it stands in, Python) of each hidden solution."""
    return [
        (place, code)
        for place, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown"
        for text in re.findall(r"<details>.*?</details>", cell.source, re.S)
        for code in re.findall(r"```python\n(.*?)```", text, re.S)
    ]


def kinds_of_output(notebook):
    return [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]


SMALLER = {  # notebook -> size -> the size that the test runs it with
    "1_preferences_and_nash": {"(2, 3, 5, 8, 12, 20, 30)": "(2, 3, 5, 30)", "rand(500": "rand(100"},
    "3_theorem_1": {
        "3_162, 10_000), 50": "3_162, 10_000), 15",
        "10_000: 150, 31_623: 60, 100_000: 30}": "10_000: 60, 31_623: 20, 100_000: 8}",
        "10_000, 30_000), 200": "10_000, 30_000), 80",
        "np.linspace(0, 1, 9), 10_000, 50": "np.linspace(0, 1, 9), 10_000, 10",
    },
    "4_algorithm_2": {"SEEDS = 120, (0, 1, 2)": "SEEDS = 120, (0,)", "--survey 16": "--survey 8"},
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


class Cells:
    """Runs cells as a kernel does, but in this process, which has imported torch; keeps the kinds
    of their outputs."""

    def __init__(self):
        self.names, self.outputs = {"__name__": "__main__"}, []
        plt.close("all")  # what another test left open

    def show(self):
        """In place of plt.show: draw every open figure. Its layout is the time of a drawing."""
        for number in plt.get_fignums():
            figure = plt.figure(number)
            figure.set_layout_engine("none")
            figure.canvas.draw()
            self.outputs.append("display_data")
        plt.close("all")

    def run(self, source):
        """The kinds of a cell's outputs."""
        self.outputs, tree = [], ast.parse(source)
        value = tree.body.pop().value if isinstance(tree.body[-1], ast.Expr) else None
        printed, complaints = io.StringIO(), io.StringIO()
        with (
            warnings.catch_warnings(record=True) as warned,
            redirect_stdout(printed),
            redirect_stderr(complaints),
        ):
            warnings.simplefilter("ignore", DeprecationWarning)  # of libraries
            exec(compile(tree, source, "exec"), self.names)
            if value is not None:
                result = eval(compile(ast.Expression(value), source, "eval"), self.names)
                self.outputs += ["execute_result"] * (result is not None)
            self.show()
        streams = [printed.getvalue(), complaints.getvalue() + "".join(map(str, warned))]
        return ["stream" for text in streams if text] + self.outputs


@pytest.fixture
def cells(monkeypatch):
    """A new `Cells`, in the notebooks' folder; what a notebook changes in this process goes with
    it."""
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys, "path", [*sys.path])
    cells = Cells()
    plt.switch_backend("Agg")  # now: it would put its own `show` back at the first figure
    monkeypatch.setattr(plt, "show", cells.show)
    environment = dict(os.environ)
    with plt.rc_context():
        yield cells
    os.environ.clear()
    os.environ.update(environment)
    torch.set_printoptions(profile="default")
    torch.set_num_threads(1)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_so_do_the_solutions_of_its_exercises(path, cells):
    """The notebook's own assert cells and those of the solutions decide."""
    notebook = read(path)
    solutions = solutions_of(notebook)
    assert solutions
    assert all("assert" in code for _, code in solutions)
    smaller_sizes = SMALLER.get(path.stem, {})
    for size in smaller_sizes:
        assert size in code_of(notebook), f"{path.stem} has no {size!r} any more"
    committed = kinds_of_output(notebook)
    again = []
    for place, cell in enumerate(notebook.cells):
        source = cell.source
        for size, less in smaller_sizes.items():
            source = source.replace(size, less)
        again.append(cells.run(source) if cell.cell_type == "code" else [])
        for _, code in (solution for solution in solutions if solution[0] == place):
            cells.run(code)
    assert [sorted(kinds) for kinds in again] == [sorted(kinds) for kinds in committed], (
        "the committed outputs are of another version; python notebooks/run.py makes them anew"
    )


@pytest.mark.slow
def test_the_shortest_runs_in_a_new_kernel_as_python_notebooks_run_py_does_it():
    """The others are run in this process, whose path has the project's modules already."""
    shortest = read(NOTEBOOKS[-1])
    committed = kinds_of_output(shortest)
    run(shortest)
    tidy(shortest)
    assert kinds_of_output(shortest) == committed


def test_its_committed_outputs_are_of_one_clean_run(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type in ("stream", "display_data")
        assert output.get("name") != "stderr", output.get("text")
        assert "/home/" not in str(output.get("text"))


def test_it_is_short_small_and_imports_only_modules_that_one_reads(path):
    notebook = read(path)
    assert len(notebook.cells) <= MOST_CELLS
    assert path.stat().st_size < 300 * 1024
    imported = set()
    for node in ast.walk(ast.parse(code_of(notebook))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported & OURS <= READ
    assert imported & OURS
    before_ours = code_of(notebook).split("import matplotlib")[0]
    assert '\nsys.path.insert(0, "..")' in before_ours  # the project's modules are one folder up


def test_it_defines_no_algorithm_ends_in_checks_and_has_exercises(path):
    notebook = read(path)
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert "assert" in last.source
    assert "expected" in "".join(output.text for output in last.outputs)
    assert 2 <= len(solutions_of(notebook)) <= 12
    assert not re.search(
        r"def (algorithm\d|dno_loss|contrastive_loss|soft_policy_iteration|nash|solve)\b",
        code_of(notebook),
    )
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "> **Paper" in prose
    assert "*Ours*" in prose
    assert "operatorname" not in prose  # GitHub does not show it


BLOCK = re.compile(
    r"\s*(>|([-+*]|#{1,6}|\d{1,9}[.)])(\s|$)|(=+|-+|\*{3,}|_{3,})\s*$|```|~~~|\||<[A-Za-z/!?]|$)"
)


def read_as_markdown(text):
    """The lines inside $$...$$ after the first that Markdown takes for the start of something else:
    a quotation, a list, a heading or what underlines one, a rule, a table, code, HTML, or a new
    paragraph."""
    without_code = re.sub(r"(?ms)^```.*?^```|(?<!`)`[^`\n]+`(?!`)", "", text)
    formulas = re.findall(r"\$\$(.*?)\$\$", without_code, re.S)
    return [line for formula in formulas for line in formula.split("\n")[1:] if BLOCK.match(line)]


def test_no_line_of_a_formula_starts_as_a_block_of_markdown_does(path):
    """Some viewers take formulas out before they look for blocks, and show `>` as "greater"; others
    look for blocks first."""
    prose = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    assert [line for source in prose for line in read_as_markdown(source)] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_a_formula_in_a_page_starts_as_a_block_of_markdown_does(page):
    assert read_as_markdown(PAGES[page]) == []


@pytest.mark.parametrize(
    "start",
    [
        "> b",
        "  - b",
        "+ b",
        "* b",
        "# b",
        "2. b",
        "3) b",
        "===",
        "--",
        "***",
        "```",
        "| b",
        "<b>",
        "",
    ],
)
def test_a_line_that_markdown_would_read_is_found_inside_a_formula_only(start):
    assert read_as_markdown(f"{start}\n$$a\n  = b$$\n{start}\n`$$`{start}`$$`") == []
    assert read_as_markdown(f"$$a\n{start}\n = c$$") == [start]


def test_there_are_as_many_as_the_readme_says():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        assert f"](notebooks/{path.name})" in README, path.name


def test_tidying_keeps_pictures_and_drops_what_depends_on_when_it_ran():
    drawn = Image.new("RGB", (40, 30), "#0072B2")
    png = io.BytesIO()
    drawn.save(png, "PNG")
    encoded = base64.b64encode(png.getvalue()).decode()
    kept = Image.open(io.BytesIO(base64.b64decode(smaller(encoded)))).convert("RGB")
    assert kept.size == (40, 30)
    assert kept.getpixel((20, 15)) == (0, 0x72, 0xB2)
    cell = nbformat.v4.new_code_cell(
        "1", metadata={"execution": {"iopub.status.busy": "2024"}}, execution_count=1
    )
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"kernelspec": {"name": "mine", "display_name": "Mine"}}
    )
    tidy(notebook)
    assert notebook.cells[0].metadata == {}
    assert notebook.metadata.kernelspec.name == "python3"
