"""The preset `text`, killed in every phase and resumed."""

import json
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train
from experiments.settings import parse
from experiments.text_settings import TextConfig
from experiments.training import CLASSES_KEPT
from helpers.runs import rows, timeless
from helpers.text_runs import PHASES, STATE, TINY, same


def run_legs(nursery, folder, legs):
    """Run the legs (arguments, file, when, before) one after the other, each until it kills itself,
    see `train_until_kept`. Exit codes, and calls by leg."""
    codes, calls = [], []
    for number, (arguments, *death) in enumerate(legs):
        (folder / f"calls-{number}").touch()
        said = str(folder / f"calls-{number}")
        child = nursery.start("helpers.processes:train_until_kept", arguments, *death, said)
        codes.append(child.wait())
        calls.append(Path(said).read_text().split())
        shutil.copytree(arguments[arguments.index("--out") + 1], folder / f"after-{number}")
    return codes, calls


def on_disk(out):
    """In a line: what the checkpoint is of, the phases reached, rows of metrics, policies, files
    left half-written."""
    with torch.serialization.safe_globals(list(CLASSES_KEPT)):
        state, phases = (
            torch.load(path, weights_only=True)
            if (path := out / "checkpoint" / name).exists()
            else {}
            for name in ("state.pt", "phases.pt")
        )
    at = (
        f"{state['sft_steps']} steps"
        if "sft_steps" in state
        else f"{[state['stage'], state['round'].t]}"
    )
    policies = " ".join(sorted(path.stem for path in (out / "policies").iterdir()))
    parts = " ".join(path.name for path in out.rglob("*.part"))
    phase = " ".join(str(part) for part in phases if part not in ("key", "mark"))
    reached = f"{phase} of {phases.get('key')}"
    lines = len(rows(out)) if (out / "metrics.jsonl").exists() else 0
    return f"{at} | {reached} | {lines} | {policies} | {parts}"


# when: (file, content, before it is in its place?, then on disk, and what was asked for on the way
# there)
POINTS = {
    "killed in the middle of fine-tuning": (
        STATE,
        "content.get('sft_steps') == 50",
        False,
        "50 steps |  of None | 0 |  | ",
        "",
    ),
    "when Algorithm 2 had sampled for iteration 2": (
        PHASES,
        "content['key'] == [0, 2]",
        False,
        "[0, 1] | sampled of [0, 2] | 1 | 001 base | ",
        "sample judge sample",
    ),
    "when it had judged": (
        PHASES,
        "content['key'] == [0, 2] and 'judged' in content",
        False,
        "[0, 1] | sampled judged of [0, 2] | 1 | 001 base | ",
        "judge",
    ),
    "when it had trained and written the policy": (
        "policies/002.pt",
        "True",
        False,
        "[0, 1] | sampled judged of [0, 2] | 1 | 001 002 base | ",
        "",
    ),
    "when it had written the checkpoint": (
        STATE,
        "content.get('stage') == 0 and content['round'].t == 2",
        False,
        "[0, 2] | sampled judged of [0, 2] | 2 | 001 002 base | ",
        "",
    ),
    "when Algorithm 3 had sampled for iteration 1": (
        PHASES,
        "content['key'] == [1, 1]",
        False,
        "[0, 3] | sampled of [1, 1] | 3 | 001 002 003 base | ",
        "sample judge sample",
    ),
    "before it put the checkpoint of iteration 2 in its place": (
        STATE,
        "content.get('stage') == 1 and content['round'].t == 2",
        True,
        "[1, 1] | sampled judged of [1, 2] | 5 | 001 002 003 004 005 base | state.pt.part",
        "judge sample judge",
    ),
    "at the end": (
        "",
        "False",
        False,
        "[1, 3] | sampled judged of [1, 3] | 6 | 001 002 003 004 005 006 base | ",
        "sample judge",
    ),
}


def assert_same_run(whole, cut):
    """All that two runs wrote is the same, but for the seconds, the figure and what belongs to the
    folder."""
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(cut)) for path in cut.rglob("*") if path.is_file()}
    assert timeless(cut) == timeless(whole)
    for name in names - {"config.json", "metrics.jsonl", "summary.json", "text.png"}:
        if name.endswith(".pt"):
            with torch.serialization.safe_globals(list(CLASSES_KEPT)):
                mine, other = (torch.load(out / name, weights_only=True) for out in (whole, cut))
            for content in (mine, other):
                for row in content.get("metrics", []):
                    del row["seconds"]
            assert same(mine, other), name
        else:
            assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_killed_in_every_phase_and_resumed_a_run_is_the_uninterrupted_one(
    text_run, nursery, tmp_path
):
    """One run, killed seven times; what was sampled and judged before a kill is not sampled and
    judged again."""
    cut = tmp_path / "cut"
    cut.mkdir()  # there has to be a folder to resume in
    arguments = [*TINY, "--out", str(cut), "--resume"]
    legs = [(arguments, *point[:3]) for point in POINTS.values()]
    codes, calls = run_legs(nursery, tmp_path, legs)
    assert codes == [-signal.SIGKILL] * 7 + [0]
    for leg, (point, (*_, expected, asked)) in enumerate(POINTS.items()):
        found = on_disk(tmp_path / f"after-{leg}")
        print(f"\n{point}: exit code {codes[leg]}, on disk {found}, asked for: {asked}", end="")
        assert found == expected, point
        assert calls[leg] == asked.split(), point
    assert_same_run(text_run, cut)


def fine_tuned_already(finished, out, arguments):
    """A folder of a run with these arguments that got as far as policies/base.pt."""
    (out / "policies").mkdir(parents=True)
    shutil.copy(finished / "policies" / "base.pt", out / "policies")
    preset, *words = arguments
    config = parse(words, TextConfig, "train.py text")
    (out / "config.json").write_text(json.dumps({"preset": preset, **asdict(config)}))


@pytest.mark.slow
def test_algorithms_3_and_4_survive_being_killed_too(text_run, nursery, tmp_path):
    """Killed after iteration 3 of 4. The reference of iteration 4 is pi_3 then, neither pi_1 nor
    the policy that was saved."""
    legs, short = [], "--iterations 4 --move-reference-every 2 --prompts 4 --survey 1".split()
    for number, algorithm in enumerate(
        ("3 --tau 0.1 --samples 6", "4 --option I --tau 4", "4 --option II --tau 4")
    ):
        arguments = [*TINY, *short, "--resume", "--algorithm", *algorithm.split(), "--out"]
        for name in ("whole", "cut"):
            fine_tuned_already(
                text_run,
                tmp_path / f"{name}-{number}",
                [*arguments, str(tmp_path / f"{name}-{number}")],
            )
        legs.append(
            ([*arguments, str(tmp_path / f"cut-{number}")], STATE, "content['round'].t == 3", False)
        )
    codes, _ = run_legs(nursery, tmp_path, legs)
    assert codes == [-signal.SIGKILL] * 3
    for number, (arguments, *_) in enumerate(legs):
        assert (
            on_disk(tmp_path / f"after-{number}")
            == "[0, 3] | sampled judged of [0, 3] | 3 | 001 002 003 base | "
        )
        for name in ("whole", "cut"):
            assert train.main([*arguments[:-1], str(tmp_path / f"{name}-{number}")]) == 0
        assert_same_run(tmp_path / f"whole-{number}", tmp_path / f"cut-{number}")
    losses = [tuple(row["loss"] for row in rows(tmp_path / f"cut-{number}")) for number in range(3)]
    assert len(set(losses)) == 3, "the three are different algorithms"
