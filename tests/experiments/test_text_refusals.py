"""What the preset `text` refuses: bad input, folders and checkpoints of others."""

import os
import pickle
import shutil

import pytest
import torch

import train
from experiments.text_settings import TextConfig
from experiments.training import CLASSES_KEPT
from experiments.validation import TableValidation
from helpers.runs import everything_in, refused
from helpers.text_runs import PHASES, STATE, TINY, policy_of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("text --eta 2", "eta differs between algorithms; add --algorithm"),
        ("text --temperature 0.7", "temperature differs between algorithms"),
        ("text --algorithm 2 --temperature 0", "temperature is 0.0; expected 0.01 to 100"),
        ("text --algorithm 2 --top-p 2", "top_p is 2.0"),
        ("text --algorithm 5", "invalid choice: 5"),
        ("text --algorithm 3 --eta 1 --tau 2", "tau is 2.0 and eta 1.0; expected 0 <= tau <= eta"),
        ("text --algorithm 4 --option III", "invalid choice: 'III'"),
        ("text --iterations 0", "iterations is 0"),
        ("text --margin 2", "margin is 2.0; expected 0 to 1"),
        ("text --prompts 100", "prompts is 100; expected 1 to 72"),
        ("text --prompts 0", "prompts is 0"),
        ("text --replay 1.5", "replay is 1.5"),
        ("text --rule worst", "invalid choice: 'worst'"),
        ("text --width 30", "width 30"),
        ("text --vocabulary 255", "vocabulary is 255; expected 256 to 100,000"),
        ("text --sft-lr inf", "sft_lr is inf"),
        ("text --sft-lr 1e300", "sft_lr is 1e+300; expected 1e-9 to 10"),
        ("text --algorithm 2 --lr 1e300", "lr is 1e+300"),
        ("text --algorithm 2 --eta 1e300", "eta is 1e+300"),
        ("text --algorithm 2 --temperature 1e-300", "temperature is 1e-300"),
        ("text --algorithm 2 --top-p nan", "top_p is nan"),
        (
            "text --algorithm 2 --samples 100000000000",
            "samples is 100000000000; expected 1 to 10,000",
        ),
        ("text --replay nan", "replay is nan"),
        ("text --margin nan", "margin is nan"),
        ("text --survey 100000000000", "survey is 100000000000"),
        ("text --max-new-tokens 100000000", "max_new_tokens is 100000000"),
        ("text --layers 100000000", "layers is 100000000"),
        ("text --width 1000000000", "width is 1000000000"),
        ("text --threads 100000000000", "threads is 100000000000"),
        ("text --algorithm 2 --option II", "option II belongs to Algorithm 4"),
        ("text --algorithm 3 --option II", "option II belongs to Algorithm 4"),
        (
            "text --algorithm 2 --tau 0.1",
            "tau and move-reference-every belong to Algorithms 3 and 4",
        ),
        (
            "text --algorithm 1 --tau 0.1",
            "tau and move-reference-every belong to Algorithms 3 and 4",
        ),
        (
            "text --algorithm 1 --samples 1",
            "samples is 1; expected at least 2, each other's opponents",
        ),
        ("text --momentum 1", "momentum is 1.0; expected 0 to 0.9999"),
        ("text --momentum=-0.1", "momentum is -0.1"),
        ("text --judge-timeout nan", "judge_timeout is nan; expected 0.001 to 100,000"),
        (
            "text --teacher-url http://localhost:1",
            "teacher-url belongs to a language model, and teacher is synthetic",
        ),
        ("text --teacher-prices 1", "prices are '1'; expected dollars per million tokens"),
        ("text --algorithm 2 --temperature nan", "temperature is nan"),
        ("text --algorithm 2 --lr nan", "lr is nan"),
        ("text --algorithm 4 --tau nan", "tau is nan"),
        ("text --seed -1", "seed is -1"),
        ("text --device tpu9", "device 'tpu9' cannot be used"),
        ("text --game x.npz", "unrecognized arguments: --game x.npz"),
        ("ablations --seeds 1", "seeds is 1; expected 2 to 1,000"),
        ("ablations --tau 1 --eta 0.5", "tau is 1.0 and eta 0.5"),
        ("ablations --algorithm 1", "invalid choice: 1"),
        ("ablations --jobs 0", "jobs is 0"),
        ("ablations --jobs 100000000000", "jobs is 100000000000; expected 1 to 1,024"),
        ("ablations --threads 100000000000", "threads is 100000000000"),
        ("ablations --eta nan", "eta is nan"),
        ("ablations --eta 1e300", "eta is 1e+300"),
        ("ablations --margin nan", "margin is nan"),
        ("ablations --tau nan", "tau is nan"),
        ("ablations --tau -1", "tau is -1.0"),
        ("ablations --tau 1", "tau is 1.0 and eta 0.25; expected 0 <= tau <= eta"),
        ("ablations --tau 0.1 --algorithm 2", "tau belongs to the regularised methods"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments.split())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_run_is_refused_and_left_alone(text_run, capsys):
    before = everything_in(text_run)
    assert "add --resume" in refused(capsys, *TINY, "--out", text_run)
    assert "margin is 0.4 there and 0.5 here" in refused(
        capsys, *TINY, "--margin", 0.5, "--out", text_run, "--resume"
    )
    assert "algorithm is None there and 2 here" in refused(
        capsys, *TINY, "--algorithm", 2, "--out", text_run, "--resume"
    )
    assert "there and" in refused(capsys, "ablations", "--out", text_run, "--resume")
    assert everything_in(text_run) == before


@pytest.mark.parametrize("name", [STATE, PHASES])
def test_a_corrupt_checkpoint_is_refused_and_left_alone(text_run, name, capsys, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(text_run, out)
    whole = (out / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        (out / name).write_bytes(content)
        before = everything_in(out)
        assert f"{name} is not a readable checkpoint" in refused(
            capsys, *TINY, "--out", out, "--resume"
        )
        assert everything_in(out) == before
    torch.save([torch.zeros(3)], out / name)
    assert f"{name} is not a checkpoint of a run" in refused(
        capsys, *TINY, "--out", out, "--resume"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [STATE, PHASES])
def test_a_checkpoint_of_a_run_with_other_settings_is_refused(text_run, name, capsys, tmp_path):
    """It fits in every shape; only the mark of the settings tells it apart."""
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(text_run, out)
    short = "--seed 1 --sft-steps 1 --iterations 1 --prompts 1 --survey 1".split()
    assert train.main([*TINY, *short, "--out", str(other)]) == 0
    shutil.copy(other / name, out / name)
    before = everything_in(out)
    assert f"{name} is not of this run" in refused(capsys, *TINY, "--out", out, "--resume")
    assert everything_in(out) == before


def test_an_error_of_ours_in_taking_up_a_run_is_not_blamed_on_its_checkpoint(
    text_run, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(text_run, out)
    monkeypatch.setattr(TableValidation, "restore", lambda self, state: state and self.shapes)
    with pytest.raises(AttributeError, match="shapes"):
        train.main([*TINY, "--out", str(out), "--resume"])


def with_foreign_checkpoint(finished, out):
    """A copy of the run with the checkpoint of one whose transformer is half as wide, after its
    first iteration."""
    shutil.copytree(finished, out)
    with torch.serialization.safe_globals(list(CLASSES_KEPT)):
        state = torch.load(out / STATE, weights_only=True)
    narrow = TextConfig(layers=1, width=16).policy(policy_of(out, "base").tokenizer)
    torch.save(
        {**state, "policy": narrow.state_dict(), "metrics": state["metrics"][:1]}, out / STATE
    )
    return out


def test_a_foreign_checkpoint_is_refused(text_run, capsys, tmp_path):
    out = with_foreign_checkpoint(text_run, tmp_path / "run")
    assert "is not of this run" in refused(capsys, *TINY, "--out", out, "--resume")
    torch.save({"weights": torch.zeros(3)}, out / STATE)
    before = everything_in(out)
    assert "state.pt is not a checkpoint of a run" in refused(
        capsys, *TINY, "--out", out, "--resume"
    )
    assert everything_in(out) == before


def test_a_run_with_a_foreign_checkpoint_is_left_alone(text_run, capsys, tmp_path):
    out = with_foreign_checkpoint(text_run, tmp_path / "run")
    before = everything_in(out)
    refused(capsys, *TINY, "--out", out, "--resume")
    assert everything_in(out) == before


class Bomb:
    """Whoever unpickles it without looking makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", [STATE, PHASES, "policies/base.pt"])
def test_a_checkpoint_cannot_run_code(text_run, name, capsys, tmp_path):
    out, exploded = tmp_path / "run", tmp_path / "exploded"
    shutil.copytree(text_run, out)
    torch.save({"metrics": [], "key": [0, 1], "sampled": Bomb(exploded)}, tmp_path / "archive")
    for content in (pickle.dumps(Bomb(exploded), protocol=2), (tmp_path / "archive").read_bytes()):
        (out / name).write_bytes(content)
        pickle.loads(content) if content[:2] != b"PK" else torch.load(
            out / name, weights_only=False
        )
        exploded.rmdir()  # so it was a bomb
        assert "not a readable checkpoint" in refused(capsys, *TINY, "--out", out, "--resume")
        assert not exploded.exists()
