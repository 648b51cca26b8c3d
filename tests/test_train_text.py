"""The presets "text" and "ablations": what a run writes, that its numbers are those of its files,
how it survives being killed, what it refuses, and that each method of the ablations is the one its
name says."""

import csv
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, fields, is_dataclass, replace

import pytest
import torch
from games import EXACT, LP
from pages import explained_columns
from test_train import ROOT, everything_in, refused, rows, timeless

import dno
import regularized
import train
from experiments.ablation_methods import (
    METHODS,
    Start,
    dno_lookahead,
    dno_practical,
    dno_restrictive,
    dno_without_margin,
    offline_dpo,
    regularized_dno,
    sft_on_positives,
    soft_targets_moving_reference,
    spin,
)
from experiments.ablations import run_method
from experiments.ablations_settings import AblationsConfig, settings_to_try
from experiments.ablations_summary import summarise_ablations
from experiments.judging import Judging, demonstrations
from experiments.rounds import METRICS, RULES, Round, Stage, columns
from experiments.settings import parse
from experiments.text_settings import TextConfig
from experiments.training import CLASSES_KEPT
from experiments.validation import KINDS, TableValidation
from oracle import RegisterJudge
from pairs import SamplingSettings
from text import Response, make_tokenizer
from world import CLASSES, HELD_OUT, TRAINING, classify, prompt_class, topic

# A transformer this small still writes a quarter of its answers malformed after 100 steps: all four
# classes are there to count.
SHAPE = {"layers": 1, "width": 32}
TINY = (
    "text --iterations 3 --sft-steps 100 --sft-lr 0.01 --prompts 14 --survey 4 --width 32 "
    "--layers 1 --threads 1"
).split()
JUDGE, K, MARGIN = RegisterJudge(), 5, 0.4
CONCISE, VIVID, PRECISE, MALFORMED = range(4)
STAGES = {
    2: ("base", "001", "002", "003"),
    3: ("base", "004", "005", "006"),
}  # pi_1..pi_4 of each algorithm, by their files
ROUNDING = 1e-9  # .6 - .2 is below .4 in floating point, by far less than this
# float64 log-probabilities of the same response, read alone, in a batch, or while it was sampled
DOUBLE = 1e-9
SINGLE = 1e-4  # relative to numbers of up to 100: sums of float32 log-probabilities
T_23 = 2.0686576  # the 97.5% quantile of Student's t with 23 degrees of freedom, from tables
SPREAD = 5  # standard deviations a mean of many draws may lie off; the seeds are fixed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted small run, of Algorithm 2 and then of 3."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*TINY, "--out", str(out)]) == 0
    return out


def test_the_page_of_runs_explains_every_column_of_a_text_run(finished):
    """And no other but those of a judge that must be asked."""
    judged = (
        "win_rate_vs_first win_rate_vs_first_interval win_rate_vs_first_length_controlled "
        "win_rate_vs_teacher_interval win_rate_vs_teacher_length_controlled n n_parsed flip_rate "
        "student_score teacher_score prompts_dropped requests dollars"
    )
    found = {name for row in rows(finished) for name in row}
    assert explained_columns() == found | set(judged.split())
    assert not found & set(judged.split())


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def policy_of(out, name, **changes):
    """A policy of the run, rebuilt from its files."""
    ranks = json.loads((out / "tokenizer.json").read_text())["ranks"]
    policy = TextConfig(**SHAPE, **changes).policy(
        make_tokenizer({bytes.fromhex(y): i for i, y in enumerate(ranks)})
    )
    policy.load_state_dict(torch.load(out / "policies" / f"{name}.pt", weights_only=True))
    return policy


# --- What a run writes ---


def test_a_run_writes_the_files_and_columns_it_promises(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    always = {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "text.png",
        "tokenizer.json",
        "policies/base.pt",
    }
    each = {
        name.format(t)
        for t in range(1, 7)
        for name in ("responses-{:03}.jsonl", "pairs-{:03}.jsonl", "policies/{:03}.pt")
    }
    held_out = {f"validation-{t:03}.jsonl" for t in range(1, 8)}
    assert names == always | each | held_out | {"checkpoint/state.pt", "checkpoint/phases.pt"}
    config = json.loads((finished / "config.json").read_text())
    assert set(config) == {field.name for field in fields(TextConfig)} | {"preset"}
    assert [(row["iteration"], row["algorithm"], row["t"]) for row in rows(finished)] == [
        (1, 2, 1),
        (2, 2, 2),
        (3, 2, 3),
        (4, 3, 1),
        (5, 3, 2),
        (6, 3, 3),
    ]
    required = (
        "seconds loss win_rate_vs_previous gap_last gap_average gap_nash win_rate_vs_teacher "
        "mean_length"
    ).split()
    hard = {"pairs_teacher_student", "pairs_student_teacher", "pairs_student_student"}
    for row in rows(finished):
        assert set(required) <= set(row)
        assert hard <= set(row)
        assert ("student_wins" in row) == ("chosen_log_ratio" in row) == (row["algorithm"] == 2)
        assert row["gap_nash"] < LP


def shares_by_hand(out, name):
    """How often each class occurs among 4 answers to each held-out prompt, counted one by one,
    [prompt][class]."""
    answers = policy_of(out, name).survey(HELD_OUT, 4, 0)
    return [[sum(classify(y) == kind for y in ys) / 4 for kind in range(4)] for ys in answers]


def rate_by_hand(shares, others):
    """P(a > b), a and b being classes drawn by these shares: the mean over the held-out prompts."""
    total = 0.0
    for x, f, g in zip(HELD_OUT, shares, others, strict=True):
        total += sum(
            f[i] * g[j] * JUDGE.P[prompt_class(x), i, j].item() for i in range(4) for j in range(4)
        )
    return total / len(HELD_OUT)


def gap_by_hand(shares):
    """The mean over the held-out prompts of twice the best class's win rate, less 1."""
    total = 0.0
    for x, f in zip(HELD_OUT, shares, strict=True):
        total += (
            2
            * max(
                sum(f[j] * JUDGE.P[prompt_class(x), i, j].item() for j in range(4))
                for i in range(4)
            )
            - 1
        )
    return total / len(HELD_OUT)


@pytest.mark.parametrize("algorithm", STAGES)
def test_gaps_and_win_rates_are_those_of_the_saved_policies(finished, algorithm):
    """Each policy is loaded, surveyed with the run's k and seed, and its classes counted anew."""
    shares = [shares_by_hand(finished, name) for name in STAGES[algorithm]]
    teacher = [[0, 1, 0, 0] for _ in HELD_OUT]
    scores = [rate_by_hand(f, teacher) for f in shares]
    assert len({round(score, 6) for score in scores}) >= 3, (
        "the policies differ, and so can their numbers"
    )
    for t, row in enumerate((row for row in rows(finished) if row["algorithm"] == algorithm), 1):
        mixture = [
            [sum(f[x][kind] for f in shares[:t]) / t for kind in range(4)]
            for x in range(len(HELD_OUT))
        ]
        expected = {
            "gap_last": gap_by_hand(shares[t]),
            "gap_average": gap_by_hand(mixture),
            "win_rate_vs_previous": rate_by_hand(shares[t], shares[t - 1]),
            "win_rate_vs_teacher": scores[t],
        }
        assert scores[row["best_iteration"] - 1] == pytest.approx(max(scores[: t + 1]), abs=EXACT)
        expected |= {
            f"share_{name}": sum(f[kind] for f in shares[t]) / 24
            for kind, name in enumerate(CLASSES)
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, abs=EXACT), name


def groups_of(out, iteration):
    """The responses of an iteration by prompt."""
    lines = jsonl(out / f"responses-{iteration:03}.jsonl")
    return [list(group) for _, group in itertools.groupby(lines, lambda line: line["prompt"])]


def repeats(text):
    """Does a run of three words occur twice?"""
    words = text.split()
    return any(
        words[i : i + 3] == words[j : j + 3]
        for i in range(len(words) - 2)
        for j in range(i + 1, len(words) - 2)
    )


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_of_algorithm_2_pairs_and_counts_are_those_of_its_responses(finished, iteration):
    groups, row = groups_of(finished, iteration), rows(finished)[iteration - 1]
    assert [len(group) for group in groups] == [K + 1] * 14
    pairs, kinds, wins = [], Counter(), []
    for group in groups:
        assert [line["by"] for line in group] == ["student"] * K + ["teacher"]
        assert all(CLASSES[classify(line["response"])] == line["class"] for line in group)
        assert group[-1]["class"] == "vivid"
        assert topic(group[0]["prompt"]) in group[-1]["response"]
        if not any(
            repeats(line["response"]) for line in group
        ):  # each two share one point, and there are K others
            assert sum(line["win_rate"] for line in group) == pytest.approx((K + 1) / 2)
        for first, second in itertools.permutations(group, 2):
            if first["win_rate"] - second["win_rate"] >= MARGIN - ROUNDING and not repeats(
                first["response"]
            ):
                pairs.append([first["prompt"], first["response"], second["response"], 1.0])
                kinds[f"pairs_{first['by']}_{second['by']}"] += 1
        prompts, students = [group[0]["prompt"]] * K, [line["response"] for line in group[:K]]
        wins.append(
            (JUDGE.prefer(prompts, students, [group[-1]["response"]] * K) > 0.5).sum().item()
        )
    assert [
        list(pair.values()) for pair in jsonl(finished / f"pairs-{iteration:03}.jsonl")
    ] == pairs
    words = [len(line["response"].split()) for group in groups for line in group[:K]]
    expected = {
        "sampled_words": sum(words) / len(words),
        "student_wins": sum(wins) / 14,
        "best_of_n": sum(map(bool, wins)) / 14,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=EXACT), name
    for name in ("pairs_teacher_student", "pairs_student_teacher", "pairs_student_student"):
        assert row[name] == kinds[name], name
    assert 0 < expected["best_of_n"] < 1


@pytest.mark.parametrize("algorithm", STAGES)
def test_what_users_watch_is_that_of_the_saved_samples_and_policies(finished, algorithm):
    """By the texts of validation-TTT.jsonl, and the log-probabilities of the saved policies."""
    pi_1, policies = policy_of(finished, "base"), STAGES[algorithm][1:]
    of_algorithm = [row for row in rows(finished) if row["algorithm"] == algorithm]
    for name, row in zip(policies, of_algorithm, strict=True):
        policy = policy_of(finished, name)
        written = jsonl(finished / f"validation-{int(name) + 1:03}.jsonl")
        prompts, samples = [line["prompt"] for line in written], []
        for ys in policy.survey(HELD_OUT, 4, 0):
            samples += ys
        assert [str(y) for y in samples] == [line["response"] for line in written]
        with torch.no_grad():
            own, first = (each.log_prob(prompts, samples).double() for each in (policy, pi_1))
        tokens = sum(len(y.tokens) for y in samples)
        cut_off = [len(y.tokens) == 24 and y.tokens[-1] != policy.end for y in samples]
        expected = {
            "mean_length": sum(len(y.split()) for y in samples) / 96,
            "truncated": sum(cut_off) / 96,
            "repeated": sum(map(repeats, samples)) / 96,
            "empty": sum(not y.split() for y in samples) / 96,
            "kl_to_first": (own - first).sum().item() / 96,
            "perplexity_under_first": math.exp(-first.sum().item() / tokens),
        }
        for column, value in expected.items():
            assert row[column] == pytest.approx(value, abs=SINGLE), column
        assert row["kl_to_first"] > 0.01


@pytest.mark.parametrize("iteration", [4, 6])
def test_of_algorithm_3_win_rates_and_labels_are_the_judges_of_its_samples(finished, iteration):
    pairs = iter(jsonl(finished / f"pairs-{iteration:03}.jsonl"))
    groups = groups_of(finished, iteration)
    assert [len(group) for group in groups] == [24] * 14
    for group in groups:
        assert {line["by"] for line in group} == {"student"}
        x, kinds = prompt_class(group[0]["prompt"]), [classify(line["response"]) for line in group]
        for i, line in enumerate(group):
            mean = sum(JUDGE.P[x, kinds[i], kinds[j]].item() for j in range(24) if j != i) / 23
            assert line["win_rate"] == pytest.approx(mean, abs=EXACT)
        for one, two in itertools.combinations(
            group[:8], 2
        ):  # eight of a prompt's samples are trained on
            label = 1 / (1 + math.exp(two["win_rate"] - one["win_rate"]))
            expected = {
                "prompt": one["prompt"],
                "first": one["response"],
                "second": two["response"],
                "label": label,
            }
            assert next(pairs) == pytest.approx(expected, abs=EXACT)
    assert next(pairs, None) is None
    words = [len(line["response"].split()) for group in groups for line in group]
    assert rows(finished)[iteration - 1]["sampled_words"] == pytest.approx(sum(words) / len(words))


# --- Killed and resumed ---

DRIVER = """
import json, os, shutil, signal, sys
root, folder, legs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, root)
import train
from experiments.folder import Run
from oracle import RegisterJudge
from text import TextPolicy
import torch._dynamo  # making an optimizer does that

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def run(number, arguments, name, when, before):
    calls = {"sample": (TextPolicy, "sample"), "judge": (RegisterJudge, "prefer")}
    for said, (asked, method) in calls.items():
        def counted(*given, said=said, original=getattr(asked, method)):
            with open(folder + "/calls", "a") as file:
                print(number, said, file=file)
            return original(*given)
        setattr(asked, method, counted)
    keep = Run.keep

    def deadly(self, written, content):
        due = written == name and eval(when, {"content": content})
        if due and before:
            os.replace = kill
        keep(self, written, content)
        if due:
            kill()

    Run.keep = deadly
    sys.exit(train.main(arguments))

for number, leg in enumerate(legs):  # each in a process of its own, all imported and nothing run
    child = os.fork()
    if child == 0:
        run(number, *leg)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(folder + "/codes", "a") as file:
        print(code, file=file)
    shutil.copytree(leg[0][leg[0].index("--out") + 1], folder + f"/after-{number}")
"""


def kill(folder, legs):
    """Run the legs (arguments, file, when, before) one after the other; each kills itself when it
    has written the file with a content for which `when` holds, or, if `before`, when it is about to
    put it in its place. Exit codes, and calls by leg."""
    command = [sys.executable, "-c", DRIVER, str(ROOT), str(folder), json.dumps(legs)]
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    calls = (
        [line.split() for line in (folder / "calls").read_text().splitlines()]
        if (folder / "calls").exists()
        else []
    )
    by_leg = [[name for number, name in calls if int(number) == leg] for leg in range(len(legs))]
    return [int(code) for code in (folder / "codes").read_text().split()], by_leg


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


STATE, PHASES = "checkpoint/state.pt", "checkpoint/phases.pt"
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


def same(a, b):
    """Equal bit for bit, NaN being equal to NaN."""
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


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
def test_killed_in_every_phase_and_resumed_a_run_is_bit_for_bit_the_uninterrupted_one(
    finished, tmp_path
):
    """One run, killed seven times; what was sampled and judged before a kill is not sampled and
    judged again."""
    cut = tmp_path / "cut"
    cut.mkdir()  # there has to be a folder to resume in
    arguments = [*TINY, "--out", str(cut), "--resume"]
    codes, calls = kill(tmp_path, [(arguments, *point[:3]) for point in POINTS.values()])
    assert codes == [-signal.SIGKILL] * 7 + [0]
    for leg, (point, (*_, expected, asked)) in enumerate(POINTS.items()):
        found = on_disk(tmp_path / f"after-{leg}")
        print(f"\n{point}: exit code {codes[leg]}, on disk {found}, asked for: {asked}", end="")
        assert found == expected, point
        assert calls[leg] == asked.split(), point
    assert_same_run(finished, cut)


def fine_tuned_already(finished, out, arguments):
    """A folder of a run with these arguments that got as far as policies/base.pt."""
    (out / "policies").mkdir(parents=True)
    shutil.copy(finished / "policies" / "base.pt", out / "policies")
    preset, *words = arguments
    config = parse(words, TextConfig, "train.py text")
    (out / "config.json").write_text(json.dumps({"preset": preset, **asdict(config)}))


@pytest.mark.slow
def test_algorithms_3_and_4_survive_being_killed_too(finished, tmp_path):
    """Killed after iteration 3 of 4. The reference of iteration 4 is pi_3 then, neither pi_1 nor
    the policy that was saved."""
    legs, short = [], "--iterations 4 --move-reference-every 2 --resume".split()
    for number, algorithm in enumerate(
        ("3 --tau 0.1", "4 --option I --tau 4", "4 --option II --tau 4")
    ):
        arguments = [*TINY, *short, "--algorithm", *algorithm.split(), "--out"]
        for name in ("whole", "cut"):
            fine_tuned_already(
                finished,
                tmp_path / f"{name}-{number}",
                [*arguments, str(tmp_path / f"{name}-{number}")],
            )
        legs.append(
            ([*arguments, str(tmp_path / f"cut-{number}")], STATE, "content['round'].t == 3", False)
        )
    codes, _ = kill(tmp_path, legs)
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


# --- What is refused ---


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


def test_a_folder_of_another_run_is_refused_and_left_alone(finished, capsys):
    before = everything_in(finished)
    assert "add --resume" in refused(capsys, *TINY, "--out", finished)
    assert "margin is 0.4 there and 0.5 here" in refused(
        capsys, *TINY, "--margin", 0.5, "--out", finished, "--resume"
    )
    assert "algorithm is None there and 2 here" in refused(
        capsys, *TINY, "--algorithm", 2, "--out", finished, "--resume"
    )
    assert "there and" in refused(capsys, "ablations", "--out", finished, "--resume")
    assert everything_in(finished) == before


@pytest.mark.parametrize("name", [STATE, PHASES])
def test_a_corrupt_checkpoint_is_refused_and_left_alone(finished, name, capsys, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
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


@pytest.mark.parametrize("name", [STATE, PHASES])
def test_a_checkpoint_of_a_run_with_other_settings_is_refused(finished, name, capsys, tmp_path):
    """It fits in every shape; only the mark of the settings tells it apart."""
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, out)
    assert (
        train.main(
            [*TINY, "--seed", "1", "--sft-steps", "1", "--iterations", "1", "--out", str(other)]
        )
        == 0
    )
    shutil.copy(other / name, out / name)
    before = everything_in(out)
    assert f"{name} is not of this run" in refused(capsys, *TINY, "--out", out, "--resume")
    assert everything_in(out) == before


def test_an_error_of_ours_in_taking_up_a_run_is_not_blamed_on_its_checkpoint(
    finished, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
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


def test_a_foreign_checkpoint_is_refused(finished, capsys, tmp_path):
    out = with_foreign_checkpoint(finished, tmp_path / "run")
    assert "is not of this run" in refused(capsys, *TINY, "--out", out, "--resume")
    torch.save({"weights": torch.zeros(3)}, out / STATE)
    before = everything_in(out)
    assert "state.pt is not a checkpoint of a run" in refused(
        capsys, *TINY, "--out", out, "--resume"
    )
    assert everything_in(out) == before


def test_a_run_with_a_foreign_checkpoint_is_left_alone(finished, capsys, tmp_path):
    out = with_foreign_checkpoint(finished, tmp_path / "run")
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
def test_a_checkpoint_cannot_run_code(finished, name, capsys, tmp_path):
    out, exploded = tmp_path / "run", tmp_path / "exploded"
    shutil.copytree(finished, out)
    torch.save({"metrics": [], "key": [0, 1], "sampled": Bomb(exploded)}, tmp_path / "archive")
    for content in (pickle.dumps(Bomb(exploded), protocol=2), (tmp_path / "archive").read_bytes()):
        (out / name).write_bytes(content)
        pickle.loads(content) if content[:2] != b"PK" else torch.load(
            out / name, weights_only=False
        )
        exploded.rmdir()  # so it was a bomb
        assert "not a readable checkpoint" in refused(capsys, *TINY, "--out", out, "--resume")
        assert not exploded.exists()


# --- How a policy is measured ---


class Reciter:
    """Answers with given texts, whatever the prompt. It has no weights, and every text is as
    probable as any other."""

    def __init__(self, *texts):
        self.texts = [Response(text, (1,)) for text in texts]

    def survey(self, prompts, k, seed):
        return [self.texts[:k] for _ in prompts]

    def log_prob(self, prompts, responses):
        return torch.zeros(len(responses))

    def parameters(self):
        return []

    def load(self, weights):
        assert weights == []

    def finished(self, response):
        return True


TEXTS = (
    "In short, the sea is old yet calm.",
    "Oh, the sea! It sings like silver!",
    "By measure, the sea has 10 tons.",
    "Moo.",
)
EDGES = (
    (-0.40, 0.25, -0.30),
    (-0.35, 0.30, -0.25),
    (0.25, -0.30, 0.35),
)  # by how much concise leads vivid, concise precise,
NASH = [
    (c / s, -b / s, a / s)
    for a, b, c in [(-e[0], -e[1], -e[2]) for e in EDGES]
    for s in [a - b + c]
]  # vivid precise


def measured(*texts, k=4, seed=0):
    validation = TableValidation(Reciter(*texts), list(HELD_OUT), k, seed, [TEXTS[VIVID]] * 24)
    validation()
    return validation


def test_always_concise_has_by_hand_a_gap_of_seven_tenths_and_beats_the_teacher_in_a_third():
    """Whoever knows it answers vividly (to praise: precisely) and leads by .40, .35 and .30. Held
    out are 8 prompts a verb."""
    validation = measured(*[TEXTS[CONCISE]] * 4)
    assert Counter(map(prompt_class, HELD_OUT)) == {0: 8, 1: 8, 2: 8}
    assert not set(HELD_OUT) & set(TRAINING)
    gap, half = validation.gap(validation.shares[0])
    assert gap == pytest.approx((0.8 + 0.7 + 0.6) / 3)
    assert half == pytest.approx(T_23 * (8 * (0.1**2 + 0 + 0.1**2) / 23) ** 0.5 / 24**0.5)
    assert dno.win_rate(validation.P, validation.shares[0], validation.teacher) == pytest.approx(
        (0.1 + 0.15 + 0.75) / 3
    )


def test_the_row_of_a_policy_by_hand():
    """First all concise, then half concise, a quarter vivid and a quarter malformed."""
    validation = measured(*[TEXTS[CONCISE]] * 4)
    validation.policy = Reciter(TEXTS[CONCISE], TEXTS[VIVID], TEXTS[MALFORMED], TEXTS[CONCISE])
    # P(concise > teacher) is .1, .15, .75, P(vivid > teacher) 1/2, P(malformed > teacher) .05
    assert validation() == pytest.approx((0.1 + 0.15 + 0.75) / 3 / 2 + 0.5 / 4 + 0.05 / 4)
    row = validation.numbers[-1]
    assert [row[f"share_{name}"] for name in CLASSES] == [0.5, 0.25, 0.0, 0.25]
    assert row["gap_average"] == pytest.approx(0.7)
    # P(concise > concise) 1/2, P(vivid > concise) .9, .85, .25, P(malformed > concise) .05
    assert row["win_rate_vs_previous"] == pytest.approx(
        0.5 / 2 + (0.9 + 0.85 + 0.25) / 3 / 4 + 0.05 / 4
    )
    # best replies: vivid by .4/2 + .45/4 and .35/2 + .45/4; to praise, precise .3/2 - .35/4 + .45/4
    # or concise .25/4 + .45/4
    assert row["gap_last"] == pytest.approx(
        2 * ((0.2 + 0.175) + 3 * 0.45 / 4 + max(0.15 - 0.0875, 0.0625)) / 3
    )
    assert row["gap_last"] < row["gap_average"]


def test_the_noise_floor_by_hand_for_one_sample_and_below_a_bound_that_goes_down_with_k():
    """For k = 1 a prompt's gap is that of one register drawn from Nash. For any k, counts of a
    class are within 2 of k times its probability, registers lead by at most .4, so a gap is at most
    2 * .4 * 3 * 2 / k."""
    nash = torch.tensor([[*NASH[prompt_class(x)], 0.0] for x in HELD_OUT], dtype=torch.float64)
    gold, floors = [TEXTS[VIVID]] * 24, {}
    for k in (1, 4, 16, 64):
        validation = TableValidation(Reciter(), list(HELD_OUT), k, 0, gold)
        assert validation.gap(nash)[0] == pytest.approx(0, abs=EXACT)
        floors[k] = validation.floor
        assert 0 <= floors[k] <= 4.8 / k
    mean = variance = 0.0
    for (cv, cp, vp), pi in zip(EDGES, NASH, strict=True):
        gaps = [2 * max(-cv, -cp), 2 * max(cv, -vp), 2 * max(cp, vp)]
        mean += sum(p * gap for p, gap in zip(pi, gaps, strict=True)) / 3
        variance += (
            sum(p * gap**2 for p, gap in zip(pi, gaps, strict=True)) / 3
        )  # an upper bound: the mean is not subtracted
    assert floors[1] == pytest.approx(mean, abs=SPREAD * (variance / (200 * 24)) ** 0.5)
    assert (
        floors[1] > 3 * floors[4] > 9 * floors[16] > 27 * floors[64] > 0
    )  # like 1/k; independent samples: like 1/sqrt(k)


# --- The run as it comes, with fewer iterations ---


@pytest.mark.slow
def test_after_24_iterations_2_is_level_with_its_teacher_and_3_has_halved_the_gap(tmp_path):
    """`python train.py text` with fewer iterations (about 60 s). Measured with seeds 0 to 6, lest
    this be luck: well-formed .986 to .997, first gap .467 to .494, P(> teacher) at first .25 to
    .27, at its most .50 to .69 in Algorithm 2; gap of the last third .31 to .52 in Algorithm 2, in
    Algorithm 3 .10 to .20, which is .21 to .43 of the first."""
    out = tmp_path / "run"
    assert train.main(["text", "--iterations", "24", "--threads", "1", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    (second, third), last = summary["stages"], rows(out)[-8:]
    first = summary["first"]
    assert first["share_malformed"] <= 0.03
    assert first["gap_last"] >= 0.4
    assert first["win_rate_vs_teacher"] <= 0.3
    assert second["win_rate_vs_teacher_most"] >= 0.45
    assert third["gap_last"] == pytest.approx(sum(row["gap_last"] for row in last) / 8, abs=EXACT)
    assert third["gap_last"] <= first["gap_last"] / 2
    assert third["gap_last"] < second["gap_last"]


# --- Ablations ---


@pytest.fixture
def begin(finished):
    """Makes what a method is given: the small run's fine-tuned policy in float64, 8 prompts an
    iteration, 2 iterations."""

    def make(iterations=2, margin=MARGIN, prompts=8, **practice):
        settings = SamplingSettings(
            **{
                "temperature": 1.0,
                "top_p": 1.0,
                "learning_rate": 0.01,
                "prompts_per_step": 3,
                "seed": 5,
                **practice,
            }
        )
        policy = policy_of(finished, "base", dtype="float64")
        validation = TableValidation(policy, list(HELD_OUT), 2, 0, [TEXTS[VIVID]] * 24)
        data, rule = demonstrations(5, prompts), RULES["large-margin"](margin)
        stage = Stage(2, iterations, 8.0, 0.0, "I", 0, rule, 0.0, settings)
        return Start(policy, data, validation, stage, margin, None, JUDGE)

    return make


@pytest.fixture
def fitted(monkeypatch):
    """The (policy, pairs) of every call of fit_pairs."""
    calls, fit_pairs = [], dno.fit_pairs

    def spy(policy, D, *arguments):
        calls.append((policy, D))
        return fit_pairs(policy, D, *arguments)

    monkeypatch.setattr(dno, "fit_pairs", spy)
    monkeypatch.setattr(regularized, "fit_pairs", spy)
    return calls


def triples(D):
    """How often each (prompt, first, second) is among the pairs."""
    pairs = zip(D.first.tolist(), D.second.tolist(), strict=True)
    return Counter((D.prompts[i], D.responses[i], D.responses[j]) for i, j in pairs)


def chosen(it):
    """The same of an iteration's new pairs."""
    responses = it.groups.responses
    return Counter(
        (it.groups.prompts[x], responses[x][i], responses[x][j]) for x, i, j in it.pairs.tolist()
    )


def off(log_probs, policy, D):
    """By how much log-probabilities of the responses differ from the policy's at most."""
    with torch.no_grad():
        return (log_probs - policy.log_prob(D.prompts, D.responses)).abs().max().item()


@pytest.mark.parametrize("label", METHODS)
def test_every_method_trains_pi_1_and_has_it_validated_first_and_after_each_iteration(label, begin):
    start = begin()
    before = [parameter.clone() for parameter in start.policy.parameters()]
    its = list(METHODS[label][1](start))
    assert [it.t for it in its] == [1, 2]
    assert all(it.steps > 0 for it in its)
    assert len(start.validation.shares) == 3
    assert not same(before, list(start.policy.parameters()))
    hard = label != "soft targets, moving reference"
    played = replace(start.stage, algorithm=METHODS[label].algorithm)
    row = columns(Round(its[-1], played, Judging(JUDGE)), METRICS)
    assert ("student_wins" in row) == hard


def test_of_spin_the_pairs_are_gold_over_each_student_and_nothing_else(begin):
    for it in spin(begin()):
        assert it.pairs.tolist() == [[x, K, student] for x in range(8) for student in range(K)]
        gold = demonstrations(5, 8)(it.t)[1]
        assert [ys[K] for ys in it.groups.responses] == gold


def test_of_restrictive_the_pairs_are_those_of_dno_in_which_the_teacher_is_first(begin):
    its, dno_1 = list(dno_restrictive(begin())), next(dno_practical(begin()))
    assert its[0].pairs.tolist() == [pair for pair in dno_1.pairs.tolist() if pair[1] == K]
    for it in its:
        assert len(it.pairs) > 0
        assert all(first == K and second < K for _, first, second in it.pairs.tolist())
    assert len(its[0].pairs) < len(dno_1.pairs)


def test_without_a_margin_all_of_dnos_pairs_are_there_and_others_below_the_margin(begin):
    without, practical = (next(method(begin())) for method in (dno_without_margin, dno_practical))
    assert without.groups.responses == practical.groups.responses
    assert same(without.r_t, practical.r_t)
    lead = {
        (x, i, j): (without.r_t[x, i] - without.r_t[x, j]).item()
        for x, i, j in without.pairs.tolist()
    }
    assert {pair for pair, margin in lead.items() if margin >= MARGIN - ROUNDING} == set(
        map(tuple, practical.pairs.tolist())
    )
    assert 0 < min(lead.values()) < MARGIN - 0.1  # win rates of five games lie .2 apart


@pytest.mark.parametrize("method", [offline_dpo, sft_on_positives])
def test_offline_samples_and_reference_are_those_of_pi_1_in_every_iteration(method, begin, fitted):
    start, untouched = begin(), begin().policy
    for t, it in enumerate(method(start), 1):
        sampled, _ = untouched.sample(
            start.data(t)[0], K, seed=dno.random_numbers(start.stage.settings.seed, t)[0]
        )
        assert [ys[:K] for ys in it.groups.responses] == sampled
        D = fitted[-1][1]
        assert triples(D) == chosen(it)  # nothing is replayed
        assert off(D.log_reference, untouched, D) < DOUBLE
    assert off(D.log_reference, start.policy, D) > 0.1  # it has moved away from its reference


def test_on_policy_samples_and_reference_are_those_of_pi_t(begin, fitted):
    start, untouched, pi_2 = begin(), begin().policy, begin().policy
    its = dno_practical(start)
    next(its)
    pi_2.load_state_dict(start.policy.state_dict())
    it, D = next(its), fitted[-1][1]
    sampled, _ = pi_2.sample(
        start.data(2)[0], K, seed=dno.random_numbers(start.stage.settings.seed, 2)[0]
    )
    assert [ys[:K] for ys in it.groups.responses] == sampled
    assert off(D.log_reference, pi_2, D) < DOUBLE
    assert off(D.log_reference, untouched, D) > 0.1


def test_the_step_of_sft_on_positives_is_along_the_likelihood_of_each_pairs_better_response(
    begin, monkeypatch
):
    """One step of plain gradient descent at rate 1, so the difference of the weights is the
    gradient of the mean over pairs."""
    monkeypatch.setattr(
        dno, "adam", lambda policy, momentum: torch.optim.SGD(policy.parameters(), lr=math.nan)
    )
    start, pi_1 = (
        begin(1, learning_rate=1.0, max_grad_norm=1e9, prompts_per_step=100),
        begin().policy,
    )
    (it,) = sft_on_positives(start)
    times = Counter((x, i) for x, i, _ in it.pairs.tolist())
    assert len(set(times.values())) > 1, "some are the better one of more pairs than others"
    for (x, i), n in times.items():
        log_prob = pi_1.log_prob([it.groups.prompts[x]], [it.groups.responses[x][i]]).sum()
        (-n / len(it.pairs) * log_prob).backward()
    largest = max(parameter.grad.abs().max().item() for parameter in pi_1.parameters())
    for before, after in zip(pi_1.parameters(), start.policy.parameters(), strict=True):
        assert (before - after - before.grad).abs().max() < DOUBLE * largest


def test_lookahead_trains_pi_1_on_each_pair_that_dno_comes_to_see_once_and_in_another_order(
    begin, fitted
):
    seen = [chosen(it) for it in dno_practical(begin())]
    fitted.clear()
    start, pi_1 = begin(), begin().policy
    assert len(list(dno_lookahead(start))) == 2
    parts = [D for policy, D in fitted if policy is start.policy]
    assert sum((triples(D) for D in parts), Counter()) == seen[0] + seen[1]
    for D in parts:
        assert off(D.log_reference, pi_1, D) < DOUBLE
        assert triples(D) & seen[0]
        assert triples(D) & seen[1]


def test_lookahead_has_as_many_iterations_as_the_others_however_few_its_pairs(begin):
    start = begin(4, prompts=2, margin=0.9)
    assert len(list(dno_lookahead(start))) == 4


def test_soft_targets_look_at_no_teacher_and_at_as_many_responses_as_the_others(begin):
    gold = {y for t in (1, 2) for y in demonstrations(5, 8)(t)[1]}
    start = begin()
    for it in soft_targets_moving_reference(start):
        assert [len(ys) for ys in it.groups.responses] == [K + 1] * 8
        assert not gold & {y for ys in it.groups.responses for y in ys}
        assert it.pairs.tolist() == [
            [x, i, j] for x in range(8) for i in range(6) for j in range(i + 1, 6)
        ]


def test_regularised_dno_is_dno_in_iteration_1_and_then_mixes_pi_1_into_the_reference(
    begin, fitted
):
    """tau = eta / 20 by default. In iteration 1 both references are pi_1."""
    first = next(dno_practical(begin()))
    start, pi_1, pi_2 = begin(), begin().policy, begin().policy
    its = regularized_dno(start)
    assert chosen(next(its)) == chosen(first)
    pi_2.load_state_dict(start.policy.state_dict())
    next(its)
    (_, D_dno), (_, D_1), (_, D_2) = fitted
    assert (D_dno.log_reference - D_1.log_reference).abs().max() < DOUBLE
    with torch.no_grad():
        mixed = 0.95 * pi_2.log_prob(D_2.prompts, D_2.responses) + 0.05 * pi_1.log_prob(
            D_2.prompts, D_2.responses
        )
    assert (D_2.log_reference - mixed).abs().max() < DOUBLE
    assert off(D_2.log_reference, pi_2, D_2) > 0.01


def test_each_method_may_try_equally_many_settings():
    tried = settings_to_try(AblationsConfig())
    assert set(tried) == set(METHODS)
    assert {len(set(settings)) for settings in tried.values()} == {4}
    assert set(settings_to_try(AblationsConfig(algorithm=4))) == {"regularised DNO"}


@pytest.mark.slow
def test_the_ablations_write_what_they_promise_and_do_not_repeat_finished_runs(capsys, tmp_path):
    out = tmp_path / "run"
    sizes = (
        "--iterations 2 --seeds 2 --tuning-iterations 1 --tuning-seeds 1 --prompts 3 --survey 2 "
        "--sft-steps 1"
    )
    arguments = ["ablations", "--algorithm", "4", *sizes.split(), "--out", str(out)]
    assert train.main(arguments) == 0
    names = {
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and path.parent.name != "jobs"
    }
    files = {"config.json", "tokenizer.json", "ablations.csv", "ablations.png", "summary.json"}
    assert names == files | {"policies/base.pt", "checkpoint/state.pt"}
    summary = json.loads((out / "summary.json").read_text())["methods"]["regularised DNO"]
    assert len(summary["tuning"]) == 4
    table = list(csv.DictReader((out / "ablations.csv").open()))
    assert [(row["method"], row["seed"], row["iteration"]) for row in table] == [
        ("regularised DNO", seed, t) for seed in "01" for t in "12"
    ]
    assert {(float(row["lr"]), float(row["eta"])) for row in table} == {
        (summary["lr"], summary["eta"])
    }
    config = parse(arguments[1:], AblationsConfig, "train.py ablations")
    here = run_method(config, "regularised DNO", summary["lr"], summary["eta"], 1, 2)
    assert [{name: str(value) for name, value in row.items()} for row in here] == table[2:]

    jobs = sorted((out / "jobs").iterdir())
    assert len(jobs) == 4 + 2
    before, csv_before = (
        {job: (job.stat().st_mtime_ns, job.read_text()) for job in jobs},
        (out / "ablations.csv").read_bytes(),
    )
    assert "add --resume" in refused(capsys, *arguments)
    jobs[0].unlink()
    assert train.main([*arguments, "--resume"]) == 0
    assert jobs[0].read_text() == before[jobs[0]][1]
    assert [job for job in jobs if job.stat().st_mtime_ns != before[job][0]] == [jobs[0]]
    assert (out / "ablations.csv").read_bytes() == csv_before


def test_the_summary_of_the_ablations_by_hand():
    """Three iterations, so the last counts; two seeds, so the half width is tan(.475 pi) half the
    distance of the two."""

    def curve(*late):
        names = (
            "gap_last",
            "gap_average",
            "share_malformed",
            "sampled_words",
            "best_of_n",
            "student_wins",
        )
        kinds = dict.fromkeys(f"pairs_{kind}" for kind in KINDS)
        return [
            [
                {**dict.fromkeys([*names, *kinds], t), "win_rate_vs_teacher": 0 if t < 3 else value}
                for t in (1, 2, 3)
            ]
            for value in late
        ]

    curves = {
        "DNO": curve(0.60, 0.64),
        "DNO-Restrictive": curve(0.50, 0.54),
        "SPIN": curve(0.55, 0.59),
        "offline DPO": curve(0.50, 0.70),
        "DNO without margin": curve(0.60, 0.64),
    }
    scores = {label: {(1e-3, 2.0): 0.5, (1e-3, 8.0): 0.6} for label in curves}
    config = replace(AblationsConfig(), iterations=3, seeds=2)
    summary = summarise_ablations(config, curves, scores, dict.fromkeys(curves, (1e-3, 8.0)))
    row = summary["methods"]["DNO"]
    assert row["win_rate_vs_teacher"] == pytest.approx((0.62, 0.02 * math.tan(0.475 * math.pi)))
    assert row["gap_last"] == pytest.approx((3, 0))
    assert (row["lr"], row["eta"], list(row["tuning"].values())) == (1e-3, 8.0, [0.5, 0.6])
    verdicts = {
        (o["better"], o["worse"]): (o["difference"], o["verdict"]) for o in summary["orderings"]
    }
    assert verdicts == {
        ("DNO", "DNO-Restrictive"): (pytest.approx(0.1), "holds"),
        ("DNO-Restrictive", "SPIN"): (pytest.approx(-0.05), "the other way round"),
        ("DNO", "offline DPO"): (pytest.approx(0.02), "not decided"),
        ("DNO", "DNO without margin"): (pytest.approx(0.0), "not decided"),
    }
    assert [
        (line["method"], line["iteration"], line["sampled_words"]) for line in summary["table_2"]
    ] == [(label, t, t) for label in ("DNO-Restrictive", "DNO") for t in (1, 3)]
