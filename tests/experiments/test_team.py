"""torchrun's processes do what one does; one of them dies; a model in shards."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from chat.checkpoints import read_transformer
from chat.team import SharedJudge, Team
from helpers import ROOT
from helpers.chat_models import PROMPTS, SHORT, lines, run, state
from helpers.runs import refused
from judge.ledger import Stopped, TooDear
from judge.synthetic import TasteJudge

LONG = (
    *SHORT.split(),
    "--dtype",
    "float32",
    "--iterations",
    "4",
    "--prompts-at-once",
    "1",
    "--sample-batch",
    "7",
    "--batch-size",
    "9",
)

# a weight after four iterations at learning rates up to 0.003: gradients of 1e-4 with sums in
# another order
ADAM = 1e-5


def options(directory, prompts_file, out, *more):
    paths = ["--model", directory, "--prompts", prompts_file, "--out", out]
    return [str(word) for word in ("llm", *paths, *LONG, "--threads", 2, *more)]


@pytest.fixture(scope="module")
def alone(tiny_qwen, prompts_file, tmp_path_factory):
    """A run by one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run(tiny_qwen, prompts_file, out, *LONG) == 0
    return out


@pytest.fixture(scope="module")
def killed(nursery, tiny_qwen, prompts_file, tmp_path_factory):
    """A run by two processes of which the second was killed after the first iteration; what they
    printed."""
    out = tmp_path_factory.mktemp("killed") / "run"
    arguments = options(tiny_qwen, prompts_file, out)
    first, second = nursery.team("helpers.processes:train_with", arguments)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint/state.pt").exists():
        assert first.poll() is None, first.said()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    assert first.wait() == 1
    assert len(lines(out / "metrics.jsonl")) < 4
    return out, first.said(), second.said()


def same(out, alone):
    """Is every sample and every pair the same, and every weight and moment up to rounding?"""
    for name in sorted(path.name for path in alone.glob("*-00?.jsonl")):
        mine, theirs = lines(out / name), lines(alone / name)
        ratings = [[line.pop("win_rate", None) or 0.0 for line in part] for part in (mine, theirs)]
        assert mine == theirs, name
        assert ratings[0] == pytest.approx(ratings[1], abs=1e-12)
    mine, theirs = state(out), state(alone)
    moments = [
        [of["state"][i][name] for i in of["state"] for name in ("exp_avg", "exp_avg_sq")]
        for of in (mine["optimizer"], theirs["optimizer"])
    ]
    for a, b in zip(
        mine["policy"] + mine["round"].best.parameters + moments[0],
        theirs["policy"] + theirs["round"].best.parameters + moments[1],
        strict=True,
    ):
        assert a.shape == b.shape
        assert (a - b).abs().max() < ADAM
    return True


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_ends_and_says_how_to_go_on(killed):
    out, first, second = killed
    assert "Traceback" not in first + second
    assert "another process of the run is gone" in first
    assert (first.count("Writing to"), second) == (1, "")  # only one process talks
    assert state(out)["round"].t == len(lines(out / "metrics.jsonl"))


@pytest.mark.slow
def test_torchrun_itself_starts_two_processes_that_do_a_run(tiny_qwen, prompts_file, tmp_path):
    """The other tests start them as torchrun does."""
    out = tmp_path / "run"
    arguments = options(tiny_qwen, prompts_file, out, "--iterations", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "train.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Writing to") == 1  # only one process talks
    assert len(lines(out / "metrics.jsonl")) == 1


@pytest.mark.slow
def test_two_processes_draw_the_samples_of_one_and_one_goes_on_from_two(
    killed, alone, tiny_qwen, prompts_file, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(killed[0], out)
    for name in ("responses-001.jsonl", "pairs-001.jsonl", "validation-002.jsonl"):
        assert [{**line, "win_rate": 0} for line in lines(out / name)] == [
            {**line, "win_rate": 0} for line in lines(alone / name)
        ]
    assert run(tiny_qwen, prompts_file, out, *LONG, "--resume") == 0
    assert same(out, alone)


@pytest.mark.slow
def test_two_processes_with_a_sharded_model_go_on_and_end_as_one_does(
    killed, alone, nursery, tiny_qwen, prompts_file, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(killed[0], out)
    more = options(tiny_qwen, prompts_file, out, "--resume", "--fsdp", "--checkpointing")
    team = nursery.team("helpers.processes:train_and_leave_nothing", more)
    for process in team:
        assert process.wait() == 0, process.said()
    assert same(out, alone)
    mine, theirs = (read_transformer(path / "best").state_dict() for path in (out, alone))
    assert all((mine[name] - theirs[name]).abs().max() < ADAM for name in theirs)


class Member(Team):
    """One of two threads that play processes."""

    def __init__(self, rank, meeting, table):
        self.rank, self.size, self.meeting, self.table = rank, 2, meeting, table

    def together(self, mine):
        self.table[self.rank] = mine
        self.meeting.wait(10)
        shares = list(self.table)
        self.meeting.wait(10)
        return [shares[i % 2][i // 2] for i in range(sum(map(len, shares)))]


def by_two(work):
    """work(team) by two members: their results, or the errors they met."""
    meeting, table, found = threading.Barrier(2), [None, None], [None, None]

    def play(rank):
        try:
            found[rank] = work(Member(rank, meeting, table))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_shares_put_together_are_in_the_order_of_the_whole(n):
    items = list(range(n))
    assert by_two(lambda team: team.together(list(team.mine(items)))) == [items, items]
    assert Team().together(Team().mine(items)) == items


@pytest.mark.parametrize("prompts", [PROMPTS[:1] * 3, [*PROMPTS[:3], *PROMPTS[:3]], PROMPTS[:5]])
def test_a_shared_judge_gives_everybody_the_judges_answers(prompts):
    a, b = [f"One. {x}" for x in prompts], [f"Two words, {i}." for i in range(len(prompts))]
    expected = TasteJudge().prefer(prompts, a, b)
    asked = []

    class Noted(TasteJudge):
        def prefer(self, prompts, a, b):
            asked.append(set(prompts))
            return super().prefer(prompts, a, b)

        def scores(self, prompts, responses):
            return torch.tensor(
                [[float(len(y)) for y in ys] for ys in responses], dtype=torch.float64
            )

    for found in by_two(lambda team: SharedJudge(Noted(), team).prefer(prompts, a, b)):
        assert (found - expected).abs().max() < 1e-12
    assert not set.intersection(*asked) or len(asked) == 1  # nobody asks what another does
    groups = [[y, z] for y, z in zip(a, b, strict=True)]
    for found in by_two(lambda team: SharedJudge(Noted(), team).scores(prompts, groups)):
        assert found.tolist() == [[len(y), len(z)] for y, z in groups]


def test_an_error_that_one_process_meets_when_judging_ends_all_of_them():
    class Dear(TasteJudge):
        def prefer(self, prompts, a, b):
            if PROMPTS[1] in prompts:
                raise TooDear("the limit")
            return super().prefer(prompts, a, b)

    errors = by_two(
        lambda team: SharedJudge(Dear(), team).prefer(PROMPTS[:2], ["a", "b"], ["c", "d"])
    )
    assert all(isinstance(error, TooDear) and isinstance(error, Stopped) for error in errors)


@pytest.mark.parametrize("preset", ["game", "text", "ablations"])
def test_other_presets_refuse_torchrun(preset, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert "runs in one process" in refused(capsys, preset)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--fsdp", "torchrun"),
        ("--compile", "--device cuda"),
        ("--low-rank=-1", "expected 0 to 1e9"),
    ],
)
def test_options_for_many_processes_or_a_gpu_are_refused_without(option, said, capsys):
    assert said in refused(capsys, "llm", "--model", "x", option)
