"""The main job: what a run writes, how it resumes, what it refuses."""

import json
import re
import signal
import time
from dataclasses import fields

import numpy as np
import pytest
import torch

import dno
import solvers
import train
from experiments.game import bound
from helpers.games import LP, random_rho
from helpers.pages import explained_columns, section
from helpers.runs import SMALL, everything_in, refused, rows, timeless
from oracle import random_feature_game, rock_paper_scissors, style_game


@pytest.fixture(scope="module")
def finished(game_run):
    return game_run


def test_a_run_writes_the_files_and_columns_it_promises(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    figures, tables = (
        {"gaps.png", "simplex.png"},
        {"config.json", "metrics.jsonl", "summary.json", "tables.npz"},
    )
    assert names == figures | tables | {"checkpoint/state.pt"}
    config = json.loads((finished / "config.json").read_text())
    assert {field.name for field in fields(train.GameConfig)} | {"preset"} == set(config)
    assert [row["iteration"] for row in rows(finished)] == [1, 2, 3, 4, 5, 6]
    required = {
        "seconds",
        "loss",
        "win_rate_vs_previous",
        "gap_last",
        "gap_average",
        "gap_nash",
        "tv_to_target",
    }
    assert required <= set(rows(finished)[0])
    assert (
        json.loads((finished / "summary.json").read_text())["gap_last"]
        == rows(finished)[-1]["gap_last"]
    )


def test_the_page_of_runs_explains_every_column(finished):
    assert explained_columns("## Columns of `game`") == set(rows(finished)[0])


def test_the_columns_are_exact_functions_of_the_saved_tables(finished):
    """Recomputed from P and the policies alone; the prediction is what the exact target would reach
    (identity C11)."""
    tables = {
        name: torch.from_numpy(table) for name, table in np.load(finished / "tables.npz").items()
    }
    P, rho, policies = tables["P"], tables["rho"], tables["policies"]
    assert set(tables) == {"P", "rho", "nash", "policies", "average", "tabular_policies"}
    assert policies.shape == tables["tabular_policies"].shape == (7, 2, 9)
    assert torch.equal(P, style_game(2, 3, 2, seed=0).P)
    assert (tables["average"] - policies[:-1].mean(0)).abs().max() < 1e-15
    assert torch.equal(tables["tabular_policies"], solvers.solve(P, "dno", 1.0, 6).policies)
    for t, row in enumerate(rows(finished)):
        pi_t, pi_next = policies[t], policies[t + 1]
        target = dno.soft_policy_iteration(pi_t.log(), dno.expected_win_rate(P, pi_t), 1.0).exp()
        expected = {
            "gap_last": dno.duality_gap(P, pi_next, rho),
            "gap_average": dno.duality_gap(P, policies[: t + 1].mean(0), rho),
            "gap_nash": dno.duality_gap(P, tables["nash"], rho),
            "tv_to_target": float((pi_next - target).abs().sum(-1).mean() / 2),
            "win_rate_vs_previous": dno.win_rate(P, pi_next, pi_t, rho),
            "win_rate_predicted": dno.win_rate(P, target, pi_t, rho),
            "concentrability": solvers.concentrability(target, pi_next, pi_t, pi_t, rho),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, abs=1e-9, rel=1e-6), name
        assert row["gap_nash"] < LP


@pytest.mark.slow
def test_the_default_run_keeps_the_promises_of_the_readme(rendered, capsys, tmp_path):
    """`python train.py` as it comes (about 35 s): C15 at full size, C11 in every step, C13."""
    assert train.main(["--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["gap_average_over_first"] <= 1 / 4
    assert summary["gap_average_over_table"] <= 1.25
    assert summary["tv_to_target_mean"] <= 0.03
    assert summary["win_rate_vs_previous_min"] > 0.5
    assert summary["gap_nash"] < LP
    assert not summary["last_iterate_converged"]
    console = capsys.readouterr().out
    assert "it did NOT converge" in console
    shown = section("README.md", "## What one sees").split("```\n")[1]
    for pattern in (r"^ +t \|.*$", r"^gap +of first.*$", r"^[\d.e-]+ +\d\.\d{3} +(.*)$"):
        assert re.findall(pattern, shown, re.M) == re.findall(pattern, console, re.M) != []
    assert len(console.splitlines()) <= 40
    assert max(map(len, console.splitlines())) <= 100
    gaps = summary["gaps"]
    assert gaps["reward maximiser (Bradley-Terry)"] > 2 * summary["gap_average"]
    assert gaps["table with moving reference, last"] < summary["gap_average"]


@pytest.mark.slow
def test_with_two_threads_the_exact_numbers_are_those_of_one(nursery, tmp_path):
    """The default game, where what is solved is large. Only the transformer's gaps may differ, by
    how float32 is rounded: little after two steps of training."""
    arguments = "--iterations 2 --steps 1 --pairs 64".split()
    for count in ("1", "2"):
        more = ["--threads", count, "--out", str(tmp_path / count)]
        run = nursery.start("helpers.processes:train_with", arguments + more)
        assert run.wait() == 0, run.said()
    gaps = {
        count: json.loads((tmp_path / str(count) / "summary.json").read_text())["gaps"]
        for count in (1, 2)
    }
    for row, gap in gaps[1].items():
        bound = 1e-4 if row.startswith("trained") else LP
        assert gaps[2][row] == pytest.approx(gap, abs=bound), row


def test_the_bound_is_that_of_C12_by_hand():
    # 2 ln 216 / 100 = 0.10751
    assert bound(100, 216, 1.0) == pytest.approx(0.1075056 + 0.25, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", [["--algorithm", "1"], ["--algorithm", "3", "--move-reference-every", "2"]]
)
def test_killed_and_resumed_a_run_is_bit_for_bit_the_uninterrupted_one(
    algorithm, nursery, tmp_path
):
    """kill -9 at two moments, whatever was being written, then --resume to the end."""
    arguments = [*SMALL, *algorithm, "--iterations", "12"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main([*arguments, "--out", str(whole)]) == 0
    cut.mkdir()  # there has to be a folder to resume in
    arguments += ["--out", str(cut), "--resume"]
    for due in (2, 7):
        run = nursery.start("helpers.processes:train_until_written", arguments, str(cut), due)
        assert run.wait() == -signal.SIGKILL, run.said()
    assert train.main(arguments) == 0
    assert timeless(cut) == timeless(whole)
    for name, table in np.load(whole / "tables.npz").items():
        assert np.array_equal(table, np.load(cut / "tables.npz")[name])
    states = [
        torch.load(out / "checkpoint" / "state.pt", weights_only=True) for out in (whole, cut)
    ]
    for name, weight in states[0]["policy"].items():
        assert torch.equal(weight, states[1]["policy"][name])


def rows_so_far(out):
    return (out / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_interrupted_it_exits_with_130_and_can_go_on(nursery, tmp_path):
    out = tmp_path / "run"
    arguments = [*SMALL, "--iterations", "5000", "--out", str(out)]
    run = nursery.start("helpers.processes:train_with", arguments)
    while not (out / "metrics.jsonl").exists() or len(rows_so_far(out)) < 3:
        assert run.poll() is None, run.said()
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    assert "--resume goes on" in run.said()
    done = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["after"]["t"]
    assert done >= 2  # the third line may have been written just before the third checkpoint


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = {
        name: content
        for name, content in everything_in(finished).items()
        if not name.endswith((".png", "config.json"))
    }
    assert train.main([*SMALL, "--out", str(finished), "--resume"]) == 0
    after = everything_in(finished)
    for name, content in before.items():
        if name.endswith("tables.npz"):
            continue  # a zip archive: it carries the time
        if name.endswith("summary.json"):
            assert {**json.loads(content), "config": 0} == {**json.loads(after[name]), "config": 0}
        else:
            assert after[name] == content


def test_a_folder_of_another_run_is_refused_and_left_alone(finished, capsys, tmp_path):
    before = everything_in(finished)
    assert "add --resume" in refused(capsys, *SMALL, "--out", finished)
    assert "seed is 0 there and 5 here" in refused(
        capsys, *SMALL, "--seed", 5, "--out", finished, "--resume"
    )
    assert "eta is 1.0 there and 2.0 here" in refused(capsys, *SMALL, "--eta", 2, "--out", finished)
    assert everything_in(finished) == before
    (tmp_path / "thesis.tex").write_text("precious")
    assert "no readable config.json" in refused(capsys, *SMALL, "--out", tmp_path)
    assert everything_in(tmp_path) == {str(tmp_path / "thesis.tex"): b"precious"}


def test_a_run_killed_before_its_config_was_written_starts_anew(tmp_path):
    (tmp_path / ".config.json.part").write_text('{"preset": "ga')
    assert train.main([*SMALL, "--out", str(tmp_path), "--resume"]) == 0
    assert len(rows(tmp_path)) == 6


def test_a_corrupt_checkpoint_is_refused_and_left_alone(capsys, tmp_path):
    assert train.main([*SMALL, "--out", str(tmp_path / "run")]) == 0
    state = tmp_path / "run" / "checkpoint" / "state.pt"
    for content in (state.read_bytes()[: state.stat().st_size // 2], b"", b"not a checkpoint"):
        state.write_bytes(content)
        before = everything_in(tmp_path)
        assert "not a readable checkpoint" in refused(
            capsys, *SMALL, "--out", tmp_path / "run", "--resume"
        )
        assert everything_in(tmp_path) == before


def test_a_foreign_checkpoint_is_refused(capsys, tmp_path):
    for name, width in (("run", "16"), ("other", "32")):
        assert train.main([*SMALL, "--width", width, "--out", str(tmp_path / name)]) == 0
    state = tmp_path / "run" / "checkpoint" / "state.pt"
    state.write_bytes((tmp_path / "other" / "checkpoint" / "state.pt").read_bytes())
    assert "not of this run" in refused(capsys, *SMALL, "--out", tmp_path / "run", "--resume")
    torch.save({"weights": torch.zeros(3)}, state)
    assert "not a checkpoint of a run" in refused(
        capsys, *SMALL, "--out", tmp_path / "run", "--resume"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nope", "unknown preset 'nope'; expected one of game"),
        ("game --bogus 3", "unrecognized arguments: --bogus 3"),
        ("--eta 0", "eta is 0.0; expected 1e-9 to 1e6"),
        ("--eta -1", "eta is -1.0"),
        ("--eta nan", "eta is nan"),
        ("--eta x", "invalid float value: 'x'"),
        ("--iterations 0", "iterations is 0; expected 1 to 100,000"),
        ("--steps 0", "steps is 0"),
        ("--lr inf", "lr is inf"),
        ("--lr 1e300", "lr is 1e+300; expected 1e-9 to 10"),
        ("--eta 1e300", "eta is 1e+300; expected 1e-9 to 1e6"),
        ("--tolerance nan", "tolerance is nan; expected 0 to 10"),
        ("--tolerance inf", "tolerance is inf"),
        ("--seed 100000000000000000000", "seed is 100000000000000000000; expected 0 to 1e9"),
        ("--threads 100000000000", "threads is 100000000000; expected 1 to 1,024"),
        ("--pairs 1000000000000", "pairs is 1000000000000"),
        ("--iterations 10000000000", "iterations is 10000000000"),
        ("--layers 100000000", "layers is 100000000"),
        ("--width 100000000", "width is 100000000"),
        ("--vocabulary 0", "vocabulary is 0; expected 1 to 5,000"),
        ("--length 1000000000", "length is 1000000000; expected 1 to 12"),
        ("--num-prompts 1000000000", "num_prompts is 1000000000"),
        ("--num-prompts 9999 --length 4", "which makes P of 16,794,480,384 entries"),
        ("--algorithm 3 --tau nan", "tau is nan"),
        ("--option II", "add --algorithm 3"),
        ("--move-reference-every 2", "add --algorithm 3"),
        ("--seed -1", "seed"),
        ("--seed 10000000000", "seed is 10000000000"),
        ("--threads 1000000000", "threads is 1000000000; expected 1 to 1,024"),
        ("--device tpu9", "device 'tpu9' cannot be used"),
        ("--device meta", "device 'meta' cannot be used"),
        ("--dtype float8", "invalid choice: 'float8'"),
        ("--mu offline", "invalid choice: 'offline'"),
        ("--algorithm 2", "invalid choice: 2"),
        ("--tau 0.1", "add --algorithm 3"),
        ("--algorithm 3 --tau 2 --eta 1", "tau is 2.0 and eta 1.0; expected 0 <= tau <= eta"),
        ("--vocabulary 9 --length 9", "too many for a table"),
        ("--width 30", "width 30"),
        ("--game missing.npz", "missing.npz"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert (
        message in refused(capsys, *arguments.split(), "--out", "run")
        if "nope" not in arguments
        else True
    )
    assert message in refused(capsys, *arguments.split())
    assert list(tmp_path.iterdir()) == []


def test_a_game_file_that_changed_since_the_start_is_refused(capsys, tmp_path):
    game = (
        "--game",
        str(tmp_path / "game.npz"),
        "--iterations",
        "2",
        "--out",
        str(tmp_path / "run"),
    )
    np.savez(tmp_path / "game.npz", P=rock_paper_scissors(0.4, 0.3, 0.2).P)
    assert train.main([*game]) == 0
    np.savez(tmp_path / "game.npz", P=rock_paper_scissors(0.4, 0.3, 0.3).P)
    assert "the game is another than when it started" in refused(capsys, *game, "--resume")


def test_a_game_of_ones_own_runs_with_a_table_and_with_a_transformer(tmp_path):
    P, rho = random_feature_game(3, 8, seed=0).P, random_rho(3, 0)
    np.savez(tmp_path / "game.npz", P=P, rho=rho)
    for extra, parameters in (([], 24), ("--vocabulary 2 --length 3 --width 16".split(), None)):
        out = tmp_path / f"run{len(extra)}"
        assert (
            train.main(
                [
                    *"--iterations 3 --steps 5 --pairs 64 --game".split(),
                    str(tmp_path / "game.npz"),
                    *extra,
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
        tables = np.load(out / "tables.npz")
        assert np.array_equal(tables["P"], P.numpy())
        assert np.array_equal(tables["rho"], rho.numpy())
        pi = torch.from_numpy(tables["policies"][-1])
        assert rows(out)[-1]["gap_last"] == pytest.approx(dno.duality_gap(P, pi, rho))
        if parameters:
            state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["policy"]
            assert sum(weight.numel() for weight in state.values()) == parameters


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"Q": np.eye(3)}, "has no array P"),
        ({"P": np.full((1, 3, 3), 0.6)}, "P[0, 0, 0] = 0.6; expected 1 - P[0, 0, 0] = 0.4"),
        ({"P": np.full((1, 3, 3), np.nan)}, "P[0, 0, 0] = nan"),
        (
            {"P": np.full((3, 3), 0.5)},
            "of shape [3, 3]; expected floating point of shape [X, Y, Y]",
        ),
        ({"P": np.full((1, 3, 3), 0.5), "rho": np.ones(2) / 2}, "rho has shape [2]; expected [1]"),
        ({"P": np.full((2, 3, 3), 0.5), "rho": np.ones(2)}, "rho[] has sum 2"),
        ({"P": np.array([{"a": 1}], dtype=object)}, "allow_pickle"),
        ({"P": np.full((1, 2, 2), 0.5 + 0.1j)}, "P is of complex128; expected real numbers"),
        ({"P": np.full((1, 2, 2), 0.5), "rho": np.array([1 + 0j])}, "rho is of complex128"),
        ({"P": np.full((1, 2, 2), "0.5")}, "P is of <U3; expected real numbers"),
    ],
)
def test_a_bad_game_file_is_refused(arrays, message, capsys, tmp_path):
    np.savez(tmp_path / "game.npz", **arrays)
    assert message in refused(capsys, "--game", tmp_path / "game.npz", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_does_not_fit_the_game_is_refused(capsys, tmp_path):
    np.savez(tmp_path / "game.npz", P=np.full((1, 9, 9), 0.5))
    game = ("--game", tmp_path / "game.npz", "--out", tmp_path / "run")
    assert "has 9 responses; expected V^L = 8" in refused(
        capsys, *game, "--vocabulary", 2, "--length", 3
    )
    assert "go together" in refused(capsys, *game, "--vocabulary", 3)


def test_a_file_that_is_no_archive_of_arrays_is_refused(capsys, tmp_path):
    path = tmp_path / "game.npz"
    np.savez(path, P=np.full((1, 2, 2), 0.5))
    whole = path.read_bytes()
    np.save(tmp_path / "game.npy", np.full((1, 2, 2), 0.5))
    array = (tmp_path / "game.npy").read_bytes()
    for content, message in {
        b"not an archive": "allow_pickle",
        b"": "No data left in file",
        whole[:-30]: "not a zip file",
        whole.replace(b"descr", b"descx"): "expected an .npz file",
        array: "one array [1, 2, 2] without a name; save it by numpy.savez(FILE, P=...)",
        array.replace(b"(1, 2, 2)", b"(1, 2, 2 "): "expected an .npz file",
    }.items():
        path.write_bytes(content)
        said = refused(capsys, "--game", path, "--out", tmp_path / "run")
        assert message in said
        assert "expected an .npz file with the array P [X, Y, Y]" in said
    assert not (tmp_path / "run").exists()


def test_a_preference_that_no_reward_fits_is_said_and_the_run_goes_on(rendered, capsys, tmp_path):
    P = np.array([[[0.5, 1.0], [0.0, 0.5]]])
    np.savez(tmp_path / "game.npz", P=P)
    game = ("--game", str(tmp_path / "game.npz"), "--out", str(tmp_path / "run"))
    assert train.main([*game, "--iterations", "2", "--steps", "2", "--pairs", "8"]) == 0
    assert "no reward maximiser to compare with" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "run" / "summary.json").read_text())["gaps"][
            "reward maximiser (Bradley-Terry)"
        ]
        is None
    )


def test_a_game_whose_uniform_policy_is_nash_leaves_no_ratio_and_valid_json(
    rendered, capsys, tmp_path
):
    np.savez(tmp_path / "game.npz", P=rock_paper_scissors().P)
    game = ("--game", str(tmp_path / "game.npz"), "--out", str(tmp_path / "run"))
    assert train.main([*game, "--iterations", "3", "--steps", "2", "--pairs", "8"]) == 0
    assert "stayed below a quarter" in capsys.readouterr().out
    for text in [(tmp_path / "run" / "summary.json").read_text(), *rows_so_far(tmp_path / "run")]:
        values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["concentrability"] is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["gap_last_over_first"] is None
    assert summary["gap_last"] == pytest.approx(0, abs=1e-12)


def test_a_transitive_game_that_is_still_being_learnt_is_said_to_be(capsys, tmp_path):
    np.savez(tmp_path / "game.npz", P=np.array([[[0.5, 0.7], [0.3, 0.5]]]))
    game = ("--game", str(tmp_path / "game.npz"), "--out", str(tmp_path / "run"))
    assert train.main([*game, "--iterations", "3", "--lr", "0.05"]) == 0
    assert "it is still falling." in capsys.readouterr().out


@pytest.mark.parametrize(("T", "shown"), [(6, range(1, 7)), (25, [1, 10, 20, 25])])
def test_the_console_shows_every_tenth_iteration_of_many_and_the_file_all(
    T, shown, capsys, tmp_path
):
    assert train.main([*SMALL, "--iterations", str(T), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line[:4]) for line in lines if re.match(r" +\d+ \|", line)] == [*shown]
    assert len(rows(tmp_path)) == T
    assert max(map(len, lines)) <= 100
