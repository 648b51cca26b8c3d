"""The README agrees with the project: its snippets run and print what it says, its names exist, its
columns are all."""

import doctest
import re
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import solvers
import train
from experiments.agreement import AgreementOptions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_snippets_print_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    examples = doctest.DocTestParser().get_doctest(blocks, {}, "README.md", "README.md", 0)
    runner = doctest.DocTestRunner()
    assert runner.run(examples).failed == 0
    assert runner.tries >= 15


def test_its_two_commands_need_nothing_but_python_and_pip():
    setup = "python3 -m venv .venv && .venv/bin/pip install -r "
    assert f"```\n{setup}requirements.txt && .venv/bin/python train.py\n```" in README
    assert f"```\n{setup}requirements-dev.txt && .venv/bin/pytest -n auto\n```" in README


def test_every_file_it_names_exists():
    named = re.findall(
        r"^\| `([\w./-]+)` \|", README.split("## The files")[1].split("## ")[0], re.M
    )
    assert {"dno.py", "model.py", "oracle.py", "train.py"} <= set(named)
    for name in [*named, *re.findall(r"\]\((figures/[\w.]+)\)", README)]:
        assert (ROOT / name).exists(), name


def test_every_test_it_names_exists():
    sources = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    tests = [name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.M)]
    named = re.findall(r"`(test_\w+\*?|test_\w+\.py)`", README)
    assert len(named) > 20
    for name in named:
        assert (
            (ROOT / "tests" / name).exists()
            if name.endswith(".py")
            else any(fnmatch(test, name) for test in tests)
        ), name


def test_errata_are_one_list_E1_to_E8_and_cited_by_these_numbers_alone():
    """ "7.4" would be the paper's section 7.4, and whoever reads "E4" must have what is cited."""
    listed = README.split("## Where the paper cannot be taken as printed")[1].split("\n## ")[0]
    assert re.findall(r"^\| (E\d) \|", listed, re.M) == [f"E{k}" for k in range(1, 9)]
    kinds = ("*.py", "*/*.py", "*.md", "notebooks/*.ipynb")
    sources = [path for kind in kinds for path in ROOT.glob(kind)]
    assert len(sources) > 40
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?i)errat(um|a)[ _]\d|paper[.]md", text), path
        assert set(re.findall(r"\bE(\d+)\b(?=[ :;,.)_](?!\d))", text)) <= set("12345678"), path


def test_every_method_is_named_and_every_option_named_exists():
    for method in solvers.METHODS:
        assert f'`"{method}"`' in README
    configs = [AgreementOptions, *(train.preset(name)[0] for name in train.PRESETS)]
    options = {
        "--" + field.name.replace("_", "-") for config in configs for field in fields(config)
    }
    ours = re.sub(r"pip download [^&\n]*|benchmarks\.\w+ [^`]*", "", README)
    torchruns = {"--nproc-per-node", "--nnodes", "--rdzv-endpoint"}
    assert set(re.findall(r"(--[a-z][a-z-]+)", ours)) <= options | torchruns
