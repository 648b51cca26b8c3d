"""The command line's help, and what is said of settings without effect."""

import os
import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

import train
from experiments.settings import GROUPS, declarations, parse, span, spelt
from helpers import ROOT
from oracle import rock_paper_scissors

# --- Help ---


@pytest.mark.parametrize("name", train.PRESETS)
def test_help_on_a_preset_has_each_field_in_its_group_with_range_and_default(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main([name, "-h"])
    said = capsys.readouterr().out
    assert f"usage: python train.py {name} " in said
    assert max(map(len, said.splitlines())) <= 100
    groups = re.findall(r"^(\w+):\n((?:  .*\n)+)", said, re.M)
    assert [title for title, _ in groups] == [title for title in GROUPS if f"\n{title}:\n" in said]
    config, found = train.preset(name)[0], set()
    declared = {"--" + spelt(name): said for name, said in declarations(config).items()}
    defaults = {"--" + spelt(field.name): field.default for field in fields(config)}
    for title, text in groups:
        options = re.findall(r"^  (--[\w-]+)((?:.*\n)(?:   .*\n)*)", text, re.M)
        found |= {option for option, _ in options}
        common = [bool(declared[option].get("common")) for option, _ in options]
        assert common == sorted(common, reverse=True), "common ones first"
        for option, help in options:
            words, said = re.sub(r"(-?)\s+", r"\1 ", help).replace("- ", "-"), declared[option]
            assert said["group"] == title
            assert "within" not in said or span(said["within"]) in words
            assert defaults[option] in (None, "", False) or f"default {defaults[option]}" in words
    assert found == set(declared)


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_help_lists_the_presets_on_a_screen_each_with_an_example_that_is_one(asked, capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main([asked])
    said = capsys.readouterr().out
    assert re.findall(r"^  (\w+) ", said, re.M) == ["game", "text", "ablations", "llm"]
    assert len(said.splitlines()) <= 40
    assert max(map(len, said.splitlines())) <= 100
    examples = re.findall(r"^ +python train.py (\w+) (--.*)", said, re.M)
    assert [name for name, _ in examples] == [*train.PRESETS]
    for name, words in examples:
        parse(words.split(), train.preset(name)[0], f"train.py {name}")


# --- What has no effect ---


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("game --game x.npz --num-prompts 3", "num-prompts has no effect: the game in the file"),
        ("game --game x.npz --width 32", "width has no effect: without vocabulary the policy is"),
        ("game --algorithm 3 --tau 0 --option II", "option has no effect: tau is 0"),
        ("text --algorithm 3 --margin 0.1", "margin has no effect: Algorithms 1 and 3 train on"),
        ("text --algorithm 1 --replay 0.1", "replay has no effect: Algorithms 1 and 3 train on"),
        ("text --algorithm 3 --judgments probabilities", "judgments has no effect: Algorithms 1"),
        ("text --rule spin --margin 0.1", "margin has no effect: rule is spin"),
        ("text --judged 5", "judged has no effect: oracle is synthetic"),
        ("text --judge-concurrency 4", "judge-concurrency has no effect: oracle is synthetic and"),
        ("text --judge-timeout 9", "judge-timeout has no effect: oracle is synthetic and teacher"),
        ("text --max-failed 0.5", "max-failed has no effect: oracle is synthetic and teacher is"),
        ("text --judge-form pairwise", "judge-form has no effect: oracle is synthetic"),
        ("text --judge-prices 1,2", "judge-prices has no effect: oracle is synthetic and"),
        ("text --judge-cache x.sqlite", "judge-cache has no effect: oracle is synthetic"),
        ("text --oracle replay:x --judge-cache y", "judge-cache has no effect: oracle is replay:x"),
        ("text --teacher-prices 1,2", "teacher-prices has no effect: teacher is synthetic"),
        ("ablations --algorithm 3 --margin 0.1", "margin has no effect: Algorithm 3 trains on all"),
        ("llm --model x --algorithm 4 --option II", "option has no effect: tau is 0"),
        ("llm --model x --algorithm 3 --margin 0.1", "margin has no effect: Algorithms 1 and 3"),
        ("llm --model x --algorithm 3 --move-reference-every 2", "move-reference-every has no"),
        ("llm --model x --judge-form pairwise", "judge-form has no effect: oracle is synthetic"),
        ("game --algorithm 3 --option II", ""),
        ("text --algorithm 4 --option II --rule teacher --margin 0.1", ""),
        ("text --oracle openai:x --judge-timeout 9 --judged 5 --judge-form pairwise", ""),
        ("text --teacher openai:x --judge-timeout 9 --judge-prices 1,2 --max-failed 0.1", ""),
        ("text --oracle replay:x --max-failed 0.1 --judge-form pairwise", ""),
        ("llm --model x --algorithm 4 --tau 0.05 --option II --move-reference-every 2", ""),
    ],
)
def test_what_is_given_and_has_no_effect_is_said_with_the_reason(words, idle, capsys):
    name, *words = words.split()
    parse(words, train.preset(name)[0], f"train.py {name}").note()
    said = capsys.readouterr().out
    assert said.startswith(f"note: {idle}") if idle else not said


def test_all_that_has_no_effect_is_said_in_one_line_at_the_start(capsys, tmp_path):
    np.savez(tmp_path / "game.npz", P=rock_paper_scissors(0.4, 0.3, 0.2).P)
    idle = "--num-prompts 3 --width 32 --iterations 1 --steps 1 --pairs 4 --game".split()
    assert train.main([*idle, str(tmp_path / "game.npz"), "--out", str(tmp_path / "run")]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == (
        "note: num-prompts has no effect: the game in the file has its own; "
        "width has no effect: without vocabulary the policy is a table"
    )
    assert not [line for line in others if "no effect" in line]


@pytest.mark.slow
def test_importing_the_modules_runs_nothing(tmp_path):
    code = "import dno, model, oracle, pairs, regularized, solvers, text, train, world"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []
