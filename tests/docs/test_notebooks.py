"""The notebooks run from top to bottom, their exercises' solutions too, and what is committed
comes from such a run."""

import ast
import base64
import io
import re

import nbformat
import pytest
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


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_so_do_the_solutions_of_its_exercises(path):
    """In a new kernel; the notebook's own assert cells and those of the solutions decide."""
    notebook = read(path)
    solutions = solutions_of(notebook)
    assert solutions
    assert all("assert" in code for _, code in solutions)
    committed = kinds_of_output(read(path))
    added = [nbformat.v4.new_code_cell(code) for _, code in solutions]
    for (place, _), cell in reversed(list(zip(solutions, added, strict=True))):
        notebook.cells.insert(place + 1, cell)
    print(f"{path.stem}: {run(notebook):.1f} s")
    tidy(notebook)
    of_committed = [
        i for i, cell in enumerate(notebook.cells) if not any(cell is one for one in added)
    ]
    outputs = kinds_of_output(notebook)
    again = [outputs[i] for i in of_committed]
    assert again == committed, (
        "the committed outputs are of another version; python notebooks/run.py makes them anew"
    )


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
