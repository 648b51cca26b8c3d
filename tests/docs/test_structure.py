"""Where things live: imports go one way, and only what a module needs is loaded with it."""

import ast
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from helpers import ROOT

LAYERS = (  # each may import from those above it, and from what stands before it in its own line
    "checks pairs world model judge.prices judge.ledger judge.replies judge.questions judge.client "
    "judge.models judge.endpoint judge.statistics judge.synthetic",
    "dno text",
    "regularized fits relatives solvers oracle",
    "chat.formats chat.gguf chat.hugging_face chat.template chat.scoring chat.low_rank chat.team "
    "chat.processes chat.policy chat.checkpoints",
    "experiments.settings experiments.figures experiments.folder experiments.judging "
    "experiments.validation experiments.rounds experiments.recalling experiments.training "
    "experiments.sampled_summary experiments.sampled_figures experiments.costs "
    "experiments.game experiments.game_figures "
    "experiments.sampled_settings experiments.text_settings experiments.fine_tuning "
    "experiments.text experiments.ablation_methods "
    "experiments.ablations_settings experiments.ablations_summary "
    "experiments.ablations_figures experiments.ablations "
    "experiments.llm_settings experiments.prompts experiments.llm experiments.agreement",
    "train",
)

ORDER = {
    name: (layer, place)
    for layer, line in enumerate(LAYERS)
    for place, name in enumerate(line.split())
}

PACKAGES = ("judge", "chat", "experiments")


def modules(root=ROOT):
    """Every module of ours, packages' __init__ aside, with its source."""
    files = [
        *root.glob("*.py"),
        *(file for package in PACKAGES for file in (root / package).glob("*.py")),
    ]
    named = {
        ".".join(file.relative_to(root).with_suffix("").parts): file.read_text() for file in files
    }
    return {name: text for name, text in named.items() if not name.endswith("__init__")}


def imported(text):
    """(module, name) of each import of ours, inside functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in ORDER else (node.module, alias.name)


def faults(name, text):
    """What an import of this module breaks: the direction, or the privacy of an underscore."""
    for other, what in imported(text):
        if other in ORDER and ORDER[other] >= ORDER[name]:
            yield f"{name} imports {other}, which is not above it"
        if other in ORDER and what.startswith("_"):
            yield f"{name} imports {what} of {other}, which is private"


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_what_is_above_it(name):
    assert name in ORDER, f"give {name} a place in LAYERS"
    assert list(faults(name, modules()[name])) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pairs", "from dno import win_rate"),
        ("dno", "def f():\n    import oracle"),
        ("model", "from chat.formats import NAMES"),
        ("judge.ledger", "from judge import endpoint"),
        ("oracle", "from chat.policy import ChatPolicy"),
        ("experiments.rounds", "from experiments.llm import run_llm"),
        ("solvers", "from dno import _maximin"),
    ],
)
def test_a_line_in_the_wrong_room_is_noticed(name, line):
    assert len(list(faults(name, line))) == 1


FORKS = """
import importlib, os, sys

def show(module):
    sys.stdout.flush()
    if not os.fork():
        importlib.import_module(module)
        print(module, *sys.modules, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0

show("chat")
import dno
print("dno", *sys.modules)
for module in ["train", *("experiments." + p for p in "game text ablations llm".split())]:
    show(module)
"""


def loaded():
    """Module -> the names of all modules after its import, each in a process of its own. These are
    forked, all but "chat" from one that has imported dno, and so torch, which takes longest."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {line.split()[0]: set(line.split()) for line in done.stdout.splitlines()}


SLOW = {"matplotlib", "openai", "scipy.stats", "torch.distributed.fsdp", "transformers"}
HEAVY = {"matplotlib", "openai", "tiktoken", "safetensors", "transformers", "gguf"}


PRESETS = ("game", "text", "ablations", "llm")
WITHOUT = {  # module -> what is not loaded with it
    "chat": HEAVY | {"torch"},  # it imports what is heavy when it is used
    "dno": HEAVY | SLOW | {"oracle", "model", "judge", "chat"},  # those below come after it
    "train": HEAVY | {f"experiments.{preset}" for preset in PRESETS[1:]},  # when it is chosen
    **{f"experiments.{preset}": SLOW for preset in PRESETS},
}


@pytest.mark.slow
def test_a_module_loads_only_what_it_needs():
    """The paper not what practice needs, the command line a preset when it is chosen, a preset what
    takes a second when it is used."""
    found = loaded()
    too_many = {name: found[name] & without for name, without in WITHOUT.items()}
    assert not any(too_many.values()), too_many


def test_no_test_module_imports_another_and_helpers_import_no_tests():
    for path in (ROOT / "tests").glob("*/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if "test_" in name or "conftest" in name], path


def test_every_pinned_version_is_in_the_range_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {item.name: item.specifier for item in map(Requirement, project["dependencies"])}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert {pin.name for pin in pins} == set(ranges)
    for pin in pins:
        (version,) = pin.specifier
        assert version.operator == "=="
        assert version.version in ranges[pin.name]
