"""What judging will cost, and the limit on it."""

import re

import pytest

import train
from helpers.judged_runs import (
    CENT,
    PROMPTS,
    RUNS,
    SHORT,
    TINY,
    assert_same_result,
    cost,
    dry,
    judged,
)
from helpers.runs import rows

# --- What it will cost ---


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("judges_key")]


def planned(text):
    """(requests, dollars) of a plan."""
    requests, dollars = re.search(
        r"the whole run: ([\d,]+) requests.*\$([\d.]+) at most", text
    ).groups()
    return int(requests.replace(",", "")), float(dollars)


def test_a_dry_run_says_whom_it_would_ask_at_what_price_and_does_nothing(server, capsys, tmp_path):
    """A dry run says whom it would ask at what price and sends and writes nothing."""
    server.control()
    said = dry(
        capsys,
        *judged(
            server,
            "--teacher",
            "openai:other",
            "--max-usd",
            7,
            "--teacher-prices",
            "1,2",
            "--out",
            tmp_path / "run",
        ),
    )
    for part in (
        f"judge: local-judge at {server.url} ($10 and $30 a million tokens)",
        f"teacher: other at {server.url} ($1 and $2 a million tokens)",
        "stops below $7",
    ):
        assert part in said
    assert re.findall(
        r"the whole run: [\d,]+ requests, about [\d,]+ tokens of prompts "
        r"and at most [\d,]+ of completions",
        said,
    )
    assert server.stats()["requests"] == 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_for_openai_needs_neither_network_nor_key(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    named = ("--oracle", "openai:gpt-4-turbo", "--judge-prices", "10,30")
    said = dry(capsys, *TINY, *named, "--out", tmp_path / "run")
    assert "gpt-4-turbo at https://api.openai.com/v1 ($10 and $30 a million tokens)" in said
    requests, dollars = planned(said)
    assert requests == 24 + 3 * (
        PROMPTS + 24
    )  # a sheet a prompt: pi_1's validation, then three iterations
    assert 3 * (PROMPTS * 6 + 24 * 5) * 200 * 30e-6 < dollars < 10  # at least the completions
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["scored", "pairwise", "points", "algorithm 3"])
def test_the_plan_is_an_upper_bound_of_what_a_clean_run_sends_and_pays(
    judged_run, server, name, capsys, tmp_path
):
    _, stats = judged_run(name)
    requests, dollars = planned(
        dry(capsys, *judged(server, *RUNS[name][1].split(), "--out", tmp_path / "run"))
    )
    assert stats["requests"] <= requests
    assert cost(stats) <= dollars


def test_the_plan_is_an_upper_bound_however_rarely_the_policy_repeats_itself(
    server, capsys, tmp_path
):
    """12 answers of the student to a prompt are not 12 different ones; of a badly trained policy
    they are."""
    options = [
        "--algorithm",
        3,
        "--judge-form",
        "pairwise",
        "--samples",
        12,
        "--prompts",
        2,
        "--judged",
        1,
        "--temperature",
        5,
    ]
    server.control()
    arguments = judged(server, *options, "--out", tmp_path / "run", preset=SHORT)
    requests, _ = planned(dry(capsys, *arguments))
    assert train.main(arguments) == 0
    assert server.stats()["requests"] <= requests


def test_a_dry_run_of_a_run_that_has_begun_says_what_is_spent(server, capsys, tmp_path):
    server.control()
    arguments = judged(server, "--out", tmp_path / "run", preset=SHORT)
    assert train.main(arguments) == 0
    assert (spent := cost(server.stats())) > 0.1
    assert f"spent so far: ${spent:.4f}" in dry(capsys, *arguments, "--resume")


def test_where_the_price_is_not_known_no_dollars_are_told(server, tmp_path, capsys):
    server.control()
    assert train.main([*SHORT, "--judge-url", server.url, "--out", str(tmp_path / "run")]) == 0
    assert "dollars not known" in (said := capsys.readouterr().out)
    assert "$0.0000" not in said
    assert rows(tmp_path / "run")[0]["dollars"] is None


# --- A limit on dollars ---


def test_at_the_limit_it_stops_and_goes_on_under_a_higher_one(judged_run, server, capsys, tmp_path):
    """Three limits; the limit holds for what the server charges, which charges nothing twice."""
    whole, stats = judged_run("scored")
    server.control()
    arguments = judged(
        server, "--judgments", "probabilities", "--out", tmp_path / "cut", "--max-usd"
    )
    for limit, resume in ((0.25, ()), (0.5, ("--resume",))):
        assert train.main([*arguments, str(limit), *resume]) == 130
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"stopped below the limit of ${limit:g}" in line
        assert "--resume" in line
        assert limit / 2 < cost(server.stats()) <= limit
    assert train.main([*arguments, "5", "--resume"]) == 0
    assert_same_result(whole, tmp_path / "cut")
    assert set(server.stats()["paid"].values()) == {1}
    assert server.stats()["requests"] == stats["requests"]
    assert rows(tmp_path / "cut")[-1]["dollars"] == pytest.approx(cost(stats), abs=CENT)


def test_the_limit_holds_for_the_folder_however_its_path_is_written(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.control()
    (tmp_path / "run").mkdir()  # there has to be a folder to resume in
    for out in ("run", "./run", str(tmp_path / "run")):
        assert train.main(judged(server, "--max-usd", 0.25, "--out", out, "--resume")) == 130
        assert cost(server.stats()) <= 0.25


def test_the_limit_is_on_judge_and_teacher_together(server, capsys, tmp_path):
    server.control()
    options = ["--teacher", "openai:local-judge", "--max-usd", 0.25, "--out", tmp_path / "run"]
    assert train.main(judged(server, *options)) == 130
    assert 0.1 < cost(server.stats()) <= 0.25
