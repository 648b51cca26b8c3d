"""`python -m experiments.agreement`: a judge compared with people."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from scipy.stats import binomtest

from experiments.agreement import AgreementOptions, main, read_labels
from helpers import ROOT
from helpers.agreement import NAN, SPREAD, comparisons, joined, table
from helpers.games import EXACT
from helpers.pages import PAGES, section
from helpers.pages import table as rows_of
from helpers.server import quality, serving
from judge.statistics import agreement, verdicts
from oracle import RegisterJudge
from world import PROMPTS, REGISTERS, topic

PRINTED = 5e-4  # three digits after the point
FIRST_BIAS = 0.1  # by which the server prefers the first response, a change of 1.6 in quality


# --- Agreement with people ---


def test_verdicts_by_hand():
    assert verdicts([1.0, 0.51, 0.5, 0.49, 0.0, NAN]) == ["a", "a", "tie", "b", "b", "none"]


def item(prompt, a, b, label, **more):
    return {"prompt": prompt, "a": a, "b": b, "label": label, **more}


ITEMS = [  # and P(a > b) of a judge
    (item("x", "rock", "scissors", "a"), 1.0),
    (item("x", "scissors", "paper", "b"), 0.75),
    (item("x", "paper", "rock", "a"), 0.6),
    (item("z", "one", "fourteen", "tie"), 0.5),
    (item("z", "one", "two", "a"), 0.25),
    (item("z", "one", "eleven", "b"), NAN),
    (item("z", "seven", "six", "a"), 1.0),
]

BY_HAND = {
    "n": 7,
    "n_parsed": 6,
    "agreement": 2 / 3,
    "interval": 0,
    "kappa": (2 / 3 - 1 / 2) / (1 - 1 / 2),
    "flip_rate": None,
    "longer_wins": 3 / 4,
    "longer_wins_people": 2 / 4,
    "triples": 1,
    "cyclic": 1.0,
    "cyclic_p_value": 0.25,
}


def test_agreement_of_a_small_file_by_hand():
    """Same verdict in items 1, 3, 4 and 7 of the six judged. Deviations from 2/3 sum to 0 over each
    prompt's three, so the interval is 0. Judge: a 4, b 1, tie 1; people: a 4, b 1, tie 1: p_e = (16
    + 1 + 1)/36 = 1/2. Of different length and decided by the judge: items 1 (longer lost), 2 (won),
    3 (won), 7 (won); by people: 1 (lost), 2 (lost), 3 (won), 7 (won)."""
    items, P = map(list, zip(*ITEMS, strict=True))
    found = agreement(items, P, 0.125)
    assert found == pytest.approx({**BY_HAND, "flip_rate": 0.125}, abs=EXACT)


def test_a_failed_judgment_is_no_label_and_changes_nothing_but_n():
    items, P = map(list, zip(*ITEMS, strict=True))
    with_it, without = agreement(items, P), agreement(items[:5] + items[6:], P[:5] + P[6:])
    assert (with_it.pop("n"), without.pop("n")) == (7, 6)
    assert with_it == pytest.approx(without, abs=EXACT)


def test_of_no_judgment_at_all_nothing_is_claimed():
    found = agreement([items for items, _ in ITEMS], [NAN] * 7)
    assert (found["n"], found["n_parsed"], found["triples"]) == (7, 0, 0)
    assert all(math.isnan(found[name]) for name in ("agreement", "interval", "kappa"))
    assert (
        found["longer_wins"]
        is found["longer_wins_people"]
        is found["cyclic"]
        is found["cyclic_p_value"]
        is None
    )


@pytest.mark.parametrize(("cyclic", "total"), [(0, 3), (1, 4), (5, 8), (6, 6)])
def test_the_p_value_is_the_chance_of_what_is_as_unlikely_for_a_coin(cyclic, total):
    """By adding up the binomial terms that are not larger than the one found, and by scipy."""
    parts = [
        comparisons({"rs": 1.0, "sp": 1.0, "pr": float(i < cyclic)}, f"{i}") for i in range(total)
    ]
    prompts, a, b, P = joined(parts)
    found = agreement([item(x, y, z, "a") for x, y, z in zip(prompts, a, b, strict=True)], P)
    chances = [math.comb(total, k) * 0.25**k * 0.75 ** (total - k) for k in range(total + 1)]
    by_hand = sum(chance for chance in chances if chance <= chances[cyclic] * (1 + 1e-7))
    assert (found["cyclic"], found["triples"]) == (cyclic / total, total)
    assert found["cyclic_p_value"] == pytest.approx(by_hand, abs=EXACT)
    assert found["cyclic_p_value"] == pytest.approx(
        binomtest(cyclic, total, 0.25).pvalue, abs=EXACT
    )


# --- Files of labels ---

GOOD = item("x", "yes", "no", "a")


def written(path, *lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def test_labels_are_read_with_what_the_judge_said_if_it_is_there(tmp_path):
    lines = [
        GOOD,
        {**GOOD, "label": "tie", "judge": 0.25},
        {**GOOD, "label": "b", "judge": 1, "by": "someone"},
    ]
    lines.append({**GOOD, "judge": 0})
    assert read_labels(written(tmp_path / "labels.jsonl", *lines)) == lines


def test_blank_lines_and_a_mark_of_the_byte_order_do_not_count(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf\r\n" + json.dumps(GOOD).encode() + b"\r\n \n\n" + json.dumps(GOOD).encode()
    )
    assert read_labels(path) == [GOOD, GOOD]
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(GOOD).encode() + b"\n\n{")
    with pytest.raises(ValueError, match="line 4 is"):
        read_labels(path)


def test_a_text_may_hold_any_character_that_json_allows_in_a_line(tmp_path):
    """Among them U+2028, which is a line break to Unicode and none to JSON."""
    line = {**GOOD, "a": "one\u2028two\x85three"}
    assert read_labels(
        written(tmp_path / "labels.jsonl", GOOD, json.dumps(line, ensure_ascii=False))
    ) == [GOOD, line]


BAD_LINES = {
    "no JSON": "{",
    "deep lists": "[" * 100_000,
    "a list": "[]",
    "a number": "1",
    "another label": {**GOOD, "label": "A"},
    "labels in a list": {**GOOD, "label": ["a"]},
    "a number as text": {**GOOD, "a": 3},
    "a judge of 2": {**GOOD, "judge": 2},
    "a judge that is a text": {**GOOD, "judge": "a"},
    "a judge that is NaN": {**GOOD, "judge": NAN},
    **{f"no {name}": {key: value for key, value in GOOD.items() if key != name} for name in GOOD},
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_the_first_bad_line_of_a_file_is_named(line, tmp_path):
    path = written(tmp_path / "labels.jsonl", GOOD, GOOD, line, "{{")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3 is")):
        read_labels(path)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        read_labels(written(tmp_path / "labels.jsonl"))


# --- The command line ---


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """A folder of one's own to run in, and a key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-these-tests")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def command(*arguments):
    return main([*map(str, arguments)])


def is_figure(path):
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and len(content) > 5000


def test_recorded_answers_are_compared_without_asking_anybody(
    rendered, capsys, tmp_path, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY")
    lines = [line if math.isnan(p) else {**line, "judge": p} for line, p in ITEMS]
    assert command(written(tmp_path / "labels.jsonl", *lines)) == 0
    assert table(capsys) == pytest.approx(BY_HAND, abs=PRINTED)
    assert is_figure(tmp_path / "runs" / "agreement" / "agreement.png")
    assert {path.name for path in tmp_path.iterdir()} == {"labels.jsonl", "runs"}


def two(number):
    return f"{number:.2f}".replace("-", "\N{MINUS SIGN}")


def test_the_table_in_docs_is_what_its_commands_print(capsys, monkeypatch, tmp_path):
    """They stand above it, in the order of its rows."""
    (tmp_path / "recordings").symlink_to(ROOT / "recordings")
    page = "docs/judges.md"
    block = section(page, "## Is the judge any good?").split("```\n")[1]
    rows = rows_of(PAGES[page], "| | agreement |")
    assert len(rows) == 3
    for (name, *cells), line in zip(rows, block.splitlines(), strict=True):
        assert name.strip("`") in line
        assert command(*line.split()[3:]) == 0
        found = table(capsys)
        share, p = found["cyclic"], found["cyclic_p_value"]
        cyclic = f"{two(share) if share else 0} of {found['triples']:.0f}"
        assert cells == [
            f"{found['agreement']:.3f} ± {found['interval']:.3f}",
            two(found["kappa"]),
            "" if found["flip_rate"] is None else two(found["flip_rate"]),
            f"{two(found['longer_wins'])}; {two(found['longer_wins_people'])}",
            cyclic if p > 0.5 else f"{cyclic} (p = {two(p)})",
            f"{found['n_parsed']:.0f} of {found['n']:.0f}",
        ]


def test_the_figure_is_drawn_in_the_folder_or_file_that_was_named(rendered, tmp_path):
    labels = written(tmp_path / "labels.jsonl", {**GOOD, "judge": 1.0})
    assert command(labels, "--out", "there") == command(labels, "--figure", "here.PNG") == 0
    assert is_figure(tmp_path / "there" / "agreement.png")
    assert is_figure(tmp_path / "here.PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"labels.jsonl", "there", "here.PNG"}


@pytest.mark.parametrize(
    "options", [("--figure", "folder.png"), ("--out", "labels.jsonl"), ("--out", "/proc/none")]
)
def test_where_no_figure_can_be_nobody_is_asked(options, server, capsys, tmp_path):
    server.control()
    (tmp_path / "folder.png").mkdir()
    labels = written(tmp_path / "labels.jsonl", {**GOOD, "judge": 1.0})
    assert "cannot be written" in refused(capsys, labels, *options)
    said = refused(capsys, labels, *options, *asking(server))
    assert re.search("cannot be written|is no folder that can be written to", said)
    assert server.stats()["requests"] == 0


def test_where_the_price_is_not_known_no_dollars_are_told(server, capsys, tmp_path):
    server.control()
    assert command(written(tmp_path / "labels.jsonl", *LABELS), "--judge-url", server.url) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("asked: "))
    assert line.endswith("failed 0, price not known")
    assert "dollars" not in line
    assert "None" not in line


def test_agreement_with_the_judges_own_labels_is_the_mean_larger_probability(capsys, tmp_path):
    """E max(p, 1 - p); it is 1 for people who always take the likelier response."""
    draw, judge = random.Random(0), RegisterJudge()
    prompts = draw.choices(PROMPTS, k=1500)
    texts = [
        [register.write(topic(x), draw) for register in draw.sample(list(REGISTERS.values()), 2)]
        for x in prompts
    ]
    P = judge.prefer(prompts, *zip(*texts, strict=True)).tolist()
    drawn = [
        item(x, a, b, "a" if draw.random() < p else "b")
        for x, (a, b), p in zip(prompts, texts, P, strict=True)
    ]
    likelier = [
        {**line, "label": "a" if p > 0.5 else "b"} for line, p in zip(drawn, P, strict=True)
    ]
    for lines, expected in ((drawn, sum(max(p, 1 - p) for p in P) / 1500), (likelier, 1)):
        assert command(written(tmp_path / "labels.jsonl", *lines), "--oracle", "synthetic") == 0
        found = table(capsys)
        assert found["agreement"] == pytest.approx(
            expected, abs=SPREAD * math.sqrt(expected * (1 - expected) / 1500) + PRINTED
        )
        assert found["n"] == found["n_parsed"] == 1500


TEXTS = ["worth 6", "worth 5", "worth 2", "worth 2, as it is", "worth 0"]

LABELS = [
    item("Describe the sea.", a, b, "a" if quality(a) > quality(b) else "b")
    for a, b in itertools.permutations(TEXTS, 2)
]


def asking(server, *arguments):
    return "--judge-url", server.url, "--judge-prices", "10,30", *arguments


def test_a_judge_that_gives_scores_is_asked_once_for_all_responses_to_a_prompt(
    server, capsys, tmp_path
):
    """Two of the 20 comparisons are ties to it; to people, who had no such label, b was better."""
    server.control()
    assert command(written(tmp_path / "labels.jsonl", *LABELS), *asking(server)) == 0
    said = table(capsys)
    assert (said["n"], said["n_parsed"], said["flip_rate"]) == (20, 20, None)
    assert said["agreement"] == pytest.approx(18 / 20, abs=PRINTED)
    assert (said["triples"], said["cyclic"]) == (math.comb(5, 3) - 3, 0)  # three contain the tie
    assert server.stats()["requests"] == 1


def test_a_judge_of_pairs_is_asked_in_both_orders_and_the_flip_rate_told(
    rendered, server, capsys, tmp_path
):
    """First place is worth 1.6 in quality: of the ten pairs the tie and the one that differs by 1
    flip. The mean of both orders has no such bias, and decides the others by quality."""
    server.control(first_bias=FIRST_BIAS)
    assert (
        command(
            written(tmp_path / "labels.jsonl", *LABELS), *asking(server, "--judge-form", "pairwise")
        )
        == 0
    )
    said = table(capsys)
    assert said["flip_rate"] == pytest.approx(2 / 10, abs=PRINTED)
    assert said["agreement"] == pytest.approx(18 / 20, abs=PRINTED)
    assert server.stats()["requests"] == 20
    assert set(server.stats()["paid"].values()) == {1}
    assert is_figure(tmp_path / "runs" / "agreement" / "agreement.png")


def test_asked_again_it_answers_from_its_cache_and_also_without_server_and_key(
    server, capsys, tmp_path, monkeypatch
):
    server.control()
    labels = written(tmp_path / "labels.jsonl", *LABELS)
    found, live = [], asking(server, "--out", "judged")
    for more in (live, live, ("--oracle", "replay:judged/judgments.sqlite")):
        assert command(labels, *more) == 0
        assert server.stats()["requests"] == 1
        found.append(table(capsys))
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert found[1:] == [pytest.approx(found[0], abs=0, nan_ok=True)] * 2


APART = [
    item("Describe the sea.", f"worth {i}", f"worth {j}", "a") for i, j in ((6, 1), (5, 2), (4, 3))
]  # no text twice

MODES = [("scored", LABELS), ("pairwise", LABELS), ("scored", APART), ("pairwise", APART)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "lines"), MODES, ids=["scored", "pairwise", "scored, apart", "pairwise, apart"]
)
def test_a_dry_run_says_how_many_requests_will_be_sent_and_sends_and_writes_nothing(
    server, form, lines, capsys, tmp_path
):
    server.control()
    labels = written(tmp_path / "labels.jsonl", *lines)
    assert command(labels, *asking(server, "--judge-form", form, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert f"judge: local-judge at {server.url} ($10 and $30 a million tokens)" in said
    requests, dollars = re.search(r"to be asked: (\d+) requests.*\$([\d.]+) at most", said).groups()
    assert server.stats()["requests"] == 0
    assert list(tmp_path.iterdir()) == [labels]
    assert command(labels, *asking(server, "--judge-form", form)) == 0
    sent = server.stats()
    assert sent["requests"] == int(requests)
    cost = sent["tokens"][0] * 10e-6 + sent["tokens"][1] * 30e-6
    assert cost <= float(dollars) + 0.005  # the plan tells dollars in cents


def test_a_dry_run_says_what_is_left_to_ask(server, capsys, tmp_path):
    server.control()
    labels = written(tmp_path / "labels.jsonl", *LABELS)
    assert command(labels, *asking(server, "--out", "judged")) == 0
    assert command(labels, *asking(server, "--out", "judged", "--dry-run")) == 0
    assert "to be asked: 0 requests" in capsys.readouterr().out


@pytest.mark.parametrize("options", [(), ("--oracle", "synthetic")], ids=["recorded", "synthetic"])
def test_a_dry_run_writes_nothing_also_where_nobody_is_to_be_asked(options, tmp_path):
    line = item("Describe the sea.", "In short, the sea is old yet calm.", "no", "a", judge=1.0)
    labels = written(tmp_path / "labels.jsonl", line)
    assert command(labels, *options, "--dry-run") == 0
    assert list(tmp_path.iterdir()) == [labels]


def test_judgments_that_failed_are_told_and_are_no_labels(server, capsys, tmp_path):
    """The questions on the text "worth 0" are filtered: 12 of 20 comparisons are left, of which two
    are ties."""
    server.control(filters="worth 0")
    options = asking(server, "--judge-form", "pairwise", "--max-failed", "1")
    assert command(written(tmp_path / "labels.jsonl", *LABELS), *options) == 0
    said = table(capsys)
    assert (said["n"], said["n_parsed"], said["triples"]) == (20, 12, math.comb(4, 3) - 2)
    assert said["agreement"] == pytest.approx(10 / 12, abs=PRINTED)


def test_too_many_failures_are_exit_code_1_and_the_limit_of_dollars_130(server, capsys, tmp_path):
    """Too many failures are exit code 1 and the limit of dollars 130 with one line and no
    figure."""
    labels = written(tmp_path / "labels.jsonl", *LABELS)
    for behaviour, more, code, message in (
        ({"filters": "worth 0"}, (), 1, "have no full answer"),
        ({}, ("--max-usd", 0.03), 130, "stopped below the limit of $0.03"),
    ):
        server.control(**behaviour)
        assert (
            command(
                labels, *asking(server, "--judge-form", "pairwise", "--out", f"exits-{code}", *more)
            )
            == code
        )
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
        assert not list(tmp_path.rglob("*.png"))
    tokens = server.stats()["tokens"]
    assert 0 < tokens[0] * 10e-6 + tokens[1] * 30e-6 <= 0.03


def refused(capsys, *arguments):
    """The one line on stderr with which the command refuses the arguments."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "expected FILE.jsonl"),
        ("--dry-run", "expected FILE.jsonl"),
        ("agreement labels.jsonl", "unrecognized arguments: labels.jsonl"),
        ("labels.jsonl --margin 1", "unrecognized arguments: --margin"),
        ("labels.jsonl --oracle gpt-4", "oracle is 'gpt-4'"),
        ("labels.jsonl --oracle openai:", "oracle is 'openai:'; the model's name is missing"),
        ("labels.jsonl --oracle openai", "the model's name is missing, and OpenAI has many"),
        ("labels.jsonl --max-usd 3", "max-usd belongs to a language model"),
        (
            "labels.jsonl --oracle openai:local-judge --max-usd 3",
            "the price of 'local-judge' is not known",
        ),
        ("labels.jsonl --oracle replay:nothing.sqlite", "nothing.sqlite cannot be used as a cache"),
        ("labels.jsonl --oracle synthetic", "prompt 'x' is not of this world"),
        ("missing.jsonl", "missing.jsonl"),
        ("broken.jsonl", "broken.jsonl, line 2 is '{'"),
        ("labels.jsonl --figure missing/agreement.png", "missing/agreement.png"),
        (
            "labels.jsonl --figure agreement.xyz",
            "agreement.xyz; expected a name that ends with one of",
        ),
        ("labels.jsonl --figure agreement", "expected a name that ends with one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    written(tmp_path / "labels.jsonl", {**GOOD, "judge": 1.0})
    written(tmp_path / "broken.jsonl", GOOD, "{")
    before = sorted(tmp_path.iterdir())
    assert message in refused(capsys, *arguments.split())
    assert sorted(tmp_path.iterdir()) == before


def test_a_recorded_judge_of_null_is_no_judgment(capsys, tmp_path):
    labels = written(tmp_path / "labels.jsonl", {**GOOD, "judge": 1.0}, {**GOOD, "judge": None})
    assert command(labels) == 0
    said = table(capsys)
    assert (said["n"], said["n_parsed"]) == (2, 1)


def test_a_file_without_recorded_answers_needs_a_judge(capsys, tmp_path):
    written(tmp_path / "labels.jsonl", GOOD)
    assert "judge" in refused(capsys, "labels.jsonl")


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert "usage: python -m experiments.agreement FILE.jsonl" in said
    assert {"--" + field.name.replace("_", "-") for field in fields(AgreementOptions)} <= set(
        re.findall(r"--[\w-]+", said)
    )


def as_a_command(*arguments):
    program = [sys.executable, "-m", "experiments.agreement"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*program, *map(str, arguments)], env=environment, capture_output=True)


@pytest.mark.slow
def test_as_a_command_it_exits_with_its_code(tmp_path):
    done = as_a_command(written(tmp_path / "labels.jsonl", {**GOOD, "judge": 1.0}), "--sceptical")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"experiments.agreement: unrecognized arguments: --sceptical")


@pytest.mark.slow
def test_a_replay_leaves_the_folder_of_the_cache_as_it_was(server, tmp_path):
    """A cache may lie where nothing can be written."""
    server.control()
    labels, cache = (
        written(tmp_path / "labels.jsonl", *LABELS),
        tmp_path / "recorded" / "cache.sqlite",
    )
    assert as_a_command(labels, *asking(server, "--judge-cache", cache)).returncode == 0
    before = {path.name: path.read_bytes() for path in cache.parent.iterdir()}
    assert before.keys() == {cache.name}
    assert as_a_command(labels, "--oracle", f"replay:{cache}").returncode == 0
    assert {path.name: path.read_bytes() for path in cache.parent.iterdir()} == before
