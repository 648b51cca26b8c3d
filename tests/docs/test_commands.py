"""Every command that README.md and docs/ name is run, with small numbers in place of the large
ones and a server on this machine in place of others; what CI runs itself is only looked for
there."""

import os
import re
import runpy
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from run import run as run_notebook

import train
from benchmarks import game, llm, memory, text, theorem_1
from benchmarks.game import seconds as measured
from experiments.agreement import main
from experiments.llm_settings import LlmConfig
from experiments.settings import parse
from experiments.text_settings import TextConfig
from helpers.chat_models import SHORT, make_model
from helpers.pages import ALL, README, ROOT
from helpers.server import serving
from model import Config

SMALL_GAME = (
    "--iterations 2 --steps 2 --pairs 64 --num-prompts 2 --vocabulary 3 --length 2 --width 16"
)

SMALL_TEXT = (
    "--sft-steps 3 --iterations 1 --prompts 4 --survey 2 --width 32 --layers 1 --threads 1 "
    "--vocabulary 300 --max-new-tokens 8"
)


def commands():
    """Every command in the README and in docs/, in a fenced block or within a line, without its
    comment; what is quoted as Python aside."""
    prose = re.sub(r"```(python|bibtex)\n.*?```", "", ALL, flags=re.S)
    assert not re.search(r"(?<!`)`(python3?|pip|torchrun)\b[^`\n]*\n", prose), "in two lines"
    found = re.findall(
        r"(?:\.venv/bin/)?(?:(?:python3?|pytest|torchrun) [^`\n]+|pip install [^`\n]+)", prose
    )
    return sorted(
        {
            command.split("  #")[0].strip()
            for command in found
            if not command.startswith("python and")
        }
    )


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.fixture
def do(server, monkeypatch, tmp_path):
    """do(command, *more): run a command of ours with more options, in a folder that has the
    recordings."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(
        ROOT / "recordings",
        tmp_path / "recordings",
        ignore=shutil.ignore_patterns("*.py", "__pycache__"),
    )
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key")
    server.control()

    def run(command, *more):
        words = [*command.replace("$s", "0").split(), *" ".join(more).split()]
        if "experiments.agreement" in words:
            return main(words[words.index("experiments.agreement") + 1 :])
        return train.main(words[words.index("train.py") + 1 :])

    return run


def module(name, monkeypatch, *arguments):
    """`python -m name arguments`."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_module(name, run_name="__main__")


def play_game(do, command, server, monkeypatch):
    assert do(command, SMALL_GAME) == 0


def plan_text(do, command, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert do(command, SMALL_TEXT) == 0


def write_text(do, command, server, monkeypatch):
    asked = (
        "--judge-prices 10,30 --judged 1"
        if "--oracle" in command or "--judge-url" in command
        else ""
    )
    command = re.sub(r"--judge-url \S+", "", command.replace("--seed s", "--seed 0"))
    assert do(command, SMALL_TEXT, asked, f"--judge-url {server.url}" if asked else "") == 0


def train_chat_model(do, command, server, monkeypatch):
    shutil.copytree(ROOT / "prompts", "prompts")
    assert (
        do(
            re.sub(r"--model \S+", f"--model {make_model('tiny')}", command),
            SHORT,
            "--train-prompts 8 --prompts-at-once 8",
        )
        == 0
    )


def ablate(do, command, server, monkeypatch):
    """Half a minute even when it is small, and run by this test already."""
    assert '"ablations"' in (ROOT / "tests/experiments/test_ablations.py").read_text()


def compare(do, command, server, monkeypatch):
    command = command.replace("FILE.jsonl", "recordings/comparisons.jsonl")
    live = "--judge-url ..." in command
    command = command.replace("--judge-url ...", f"--judge-url {server.url} --judge-prices 10,30")
    assert do(command) == 0
    assert live == (server.stats()["requests"] > 0)


def record(do, command, server, monkeypatch):
    module(
        "recordings.record", monkeypatch, "--judge-url", server.url, "--judge-model", "local-judge"
    )
    assert server.stats()["requests"] > 72
    assert Path("recordings/local-judge.sqlite").stat().st_size > 10_000


def draw(do, command, server, monkeypatch):
    import figures.animation as animation

    animate = animation.FuncAnimation

    monkeypatch.setattr(animation, "FRAMES", 2)  # of which the last is shown for a while
    monkeypatch.setattr(
        animation, "FuncAnimation", lambda figure, show, frames: animate(figure, show, frames[:2])
    )
    monkeypatch.setattr(animation, "FILE", Path("nash.gif").resolve())
    animation.main()
    assert Path("nash.gif").read_bytes()[:3] == b"GIF"


def measure_theorem_1(do, command, server, monkeypatch):
    monkeypatch.setattr(theorem_1, "SIZES", (1_000, 2_000))
    monkeypatch.setattr(theorem_1, "ROOT", Path.cwd())
    theorem_1.main()
    assert Path("figures/theorem_1.png").exists()


def measure_game(do, command, server, monkeypatch):
    tabular, neural = game.tabular, game.neural
    monkeypatch.setattr(sys, "argv", ["game"])
    monkeypatch.setattr(game, "tabular", lambda X, Y, iterations: tabular(1, 5, 2))
    monkeypatch.setattr(
        game, "neural", lambda X, V, L, config, steps: neural(1, 2, 2, game.Config(3, 1, 16), 1)
    )
    game.main()


def measure_text(do, command, server, monkeypatch):
    """Every point of its figure is the same small iteration, measured once."""
    rates, iteration = cache(text.rates), cache(text.iteration)
    monkeypatch.setattr(sys, "argv", ["text", "--figure", "cost.png"])
    monkeypatch.setattr(text, "TextConfig", lambda **given: train_text_config(given["out"]))
    monkeypatch.setattr(text, "rates", lambda policy, prompts, k, batch: rates(policy, 2, 2, 4))
    monkeypatch.setattr(text, "iteration", lambda policy, prompts, k: iteration(policy, 4, 2))
    text.main()
    assert Path("cost.png").exists()


def train_text_config(out):
    return TextConfig(sft_steps=2, width=32, layers=1, out=out)


def measure_judging(do, command, server, monkeypatch):
    monkeypatch.chdir(ROOT)
    module("benchmarks.judge", monkeypatch, "--latency", "0.01", "--pairs", "20")


def measure_llm(do, command, server, monkeypatch):
    shutil.copytree(ROOT / "prompts", "prompts")
    small = "--prompts 8 --max-new-tokens 4 --repeats 1".split()
    more = re.sub(r".*benchmarks\.llm|--model \S+", "", command).split()
    monkeypatch.setattr(sys, "argv", ["llm", "--model", str(make_model("tiny")), *small, *more])
    monkeypatch.setattr(
        llm, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    )
    monkeypatch.setattr(llm, "seconds", lambda work, repetitions: measured(work, 1))
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else ()
    llm.main()
    if cores:  # a measurement keeps to one, and this process is to go on
        os.sched_setaffinity(0, cores)


def measure_memory(do, command, server, monkeypatch):
    """With a small model in place of every shape."""
    more = re.sub(r".*benchmarks\.memory", "", command).split()
    small = "--prompts 2 --samples 2 --prompt 8 --response 4 --steps 1".split()
    shape = Config(2000, layers=2, width=32, heads=4, kv_heads=2, hidden=64, tied=True)
    monkeypatch.setattr(memory, "SHAPES", dict.fromkeys(memory.SHAPES, shape))
    monkeypatch.setattr(sys, "argv", ["memory", *more, *small])
    memory.main()


def by_torchrun(do, command, server, monkeypatch):
    """Two processes are run by experiments/test_team.py; here, that the options are right."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    preset, *words = shlex.split(command.split("train.py ")[1])
    assert preset == "llm"
    config = parse(words, LlmConfig, "train.py llm")
    assert config.fsdp == ("--fsdp" in command)


def run_a_notebook(do, command, server, monkeypatch):
    """test_notebooks.py runs all, by the function that the command uses."""
    assert callable(run_notebook)
    assert (ROOT / "notebooks/run.py").exists()


def in_ci(do, command, server, monkeypatch):
    """The gate takes the test command from the README; test_game.py runs the main job."""
    assert "README.md" in (ROOT / ".ci/run").read_text()
    assert "requirements-dev.txt" in README


def install_torch(do, command, server, monkeypatch):
    """From another index; test_pages.py compares the version with requirements.txt."""
    assert command.endswith(" --index-url https://download.pytorch.org/whl/cpu")


def explain(do, command, server, monkeypatch):
    with pytest.raises(SystemExit) as left:
        do(command)
    assert left.value.code == 0


def no_command_of_ours(do, command, server, monkeypatch):
    assert command == "pip install jupyterlab"


RUNS = {  # what a command looks like -> how it is run here; the first that fits
    r"pip install jupyterlab": no_command_of_ours,
    r"python3 -m venv \.venv && .venv/bin/pip install torch.*": install_torch,
    r"python3 -m venv \.venv && .*": in_ci,
    r"(\.venv/bin/)?python notebooks/run\.py": run_a_notebook,
    r"(\.venv/bin/)?python train\.py( \w+)? --help": explain,
    r"(\.venv/bin/)?python train\.py( --.*)?": play_game,
    r"(\.venv/bin/)?python train\.py text .*--dry-run": plan_text,
    r"(\.venv/bin/)?python train\.py text( --.*)?": write_text,
    r"(\.venv/bin/)?python train\.py ablations": ablate,
    r"(\.venv/bin/)?python train\.py llm --.*": train_chat_model,
    r"(\.venv/bin/)?python -m experiments\.agreement .*": compare,
    r"(\.venv/bin/)?python -m recordings\.record .*": record,
    r"(\.venv/bin/)?python -m figures\.animation": draw,
    r"(\.venv/bin/)?python -m benchmarks\.theorem_1": measure_theorem_1,
    r"(\.venv/bin/)?python -m benchmarks\.game": measure_game,
    r"(\.venv/bin/)?python -m benchmarks\.text( --.*)?": measure_text,
    r"(\.venv/bin/)?python -m benchmarks\.llm( --.*)?": measure_llm,
    r"(\.venv/bin/)?python -m benchmarks\.judge( --.*)?": measure_judging,
    r"(\.venv/bin/)?python -m benchmarks\.memory( --.*)?": measure_memory,
    r"(\.venv/bin/)?torchrun .*train\.py llm .*": by_torchrun,
}


SLOW = {write_text, measure_game, measure_text, measure_judging, measure_llm}  # 2 to 5 s each


def how_to_run(command):
    """The function of RUNS for it, None if there is none."""
    return next((how for pattern, how in RUNS.items() if re.fullmatch(pattern, command)), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] * (how_to_run(command) in SLOW))
        for command in commands()
    ],
)
def test_the_command_runs(command, do, server, monkeypatch):
    how = how_to_run(command)
    assert how, f"{command!r} is in README.md or docs/ and nothing here runs it"
    how(do, command, server, monkeypatch)


def test_there_are_commands_to_find():
    found = commands()
    assert len(found) > 15
    for pattern in RUNS:
        assert any(re.fullmatch(pattern, command) for command in found), (
            f"no command in README.md or docs/ like {pattern}"
        )
