"""Text: the tokenizer, policies that answer in text and their mixtures (C23), and the made-up world
with its judge."""

import copy
import gc
import io
import math
import pickle
import random
import re
import weakref
from collections import Counter
from dataclasses import FrozenInstanceError

import pytest
import torch
from games import EXACT, LP
from test_model import random_model
from test_section_3_algorithm_1 import chi_square

import dno
from model import Cache, Config, choose, generate, uniform_numbers
from oracle import RegisterJudge, check_oracle
from text import (
    ANSWER,
    END,
    Response,
    TextPolicy,
    TokenMixture,
    UniformMixture,
    learn_byte_pairs,
    make_tokenizer,
)
from world import (
    CLASSES,
    PROMPTS,
    REGISTERS,
    VERBS,
    classify,
    student_answer,
    teacher_answer,
    topic,
)

SPREAD = 5  # standard deviations a statistic of many samples may lie off; the seeds are fixed
CONCISE, VIVID, PRECISE, MALFORMED = range(4)
GOOD = {
    "In short, the sea is old yet calm.": CONCISE,
    "Oh, the sea! It sings like silver!": VIVID,
    "Oh, the moon! It burns like honey and dances like thunder!": VIVID,
    "By measure, the sea has 10 tons.": PRECISE,
    "By measure, the storm has 30 hours and 90 metres.": PRECISE,
}
RANKS = learn_byte_pairs([*PROMPTS[:20], *GOOD], 300)
TOKENIZER = make_tokenizer(RANKS)

# --- The tokenizer ---


def learnt(corpus, size=1000):
    return list(learn_byte_pairs(corpus, size))[256:]


def test_byte_pairs_of_a_corpus_worked_by_hand():
    """Pieces "aab", " aab", "ab". Counts ab 3, aa 2, _a 1; then a+ab 2, _+a 1; then _+aab 1; then
    nothing is left to join."""
    assert learnt(["aab aab", "ab"]) == [b"ab", b"aab", b" aab"]
    assert learnt(iter(["aab aab", "ab"]), 257) == [b"ab"]
    assert learnt(["ab", "cd", "cd"]) == [b"cd", b"ab"]  # a text counts as often as it occurs
    assert learnt(["aaaa"]) == [b"aa", b"aaaa"]  # aa+aa
    assert learnt(["aaa"]) == [b"aa", b"aaa"]  # from the left: aa+a


def test_pairs_equally_frequent_are_joined_in_byte_order():
    assert learnt(["é", "xy", "cd", "c!"]) == [b"cd", b"xy", "é".encode()]
    assert learnt(["zz zz ba"]) == [
        b"zz",
        b" b",
        b" zz",
        b" ba",
    ]  # zz 2; then _b, _+zz, ba; then _+zz, _b+a


def test_no_token_crosses_the_border_of_a_piece():
    assert learnt(["a.b", "7\n", "\t"]) == []
    assert learnt(["a.. b"]) == [b" b", b".."]


def test_the_first_256_ranks_are_the_bytes_and_each_has_one():
    assert list(RANKS.values()) == list(range(300))
    assert list(RANKS)[:256] == [bytes([byte]) for byte in range(256)]


NASTY = [
    *(
        "",
        " ",
        "\n\n",
        "  x ",
        "\0\x7f\x1c\x85",
        "a\u0301\u0302",
        "👩‍👩‍👧🏽",
        "שלום",
        "हिन्दी",
        "\u202eabc\u202c",
    ),
    *("\ufeff\uffff", "\U0010ffff", ANSWER, END, f"a{END}b{ANSWER}", "<|end", "|>"),
]


def test_any_text_survives_encoding_and_is_never_encoded_as_a_special_token():
    """3000 strings of characters from all 17 planes and of the special tokens' names."""
    draw, planes = (
        random.Random(0),
        [(0, 0x80), (0x80, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)],
    )
    texts = [
        "".join(
            draw.choice(NASTY) if draw.random() < 0.1 else chr(draw.randrange(*draw.choice(planes)))
            for _ in range(n % 25)
        )
        for n in range(3000)
    ]
    for text in [*texts, *NASTY, *GOOD]:
        tokens = TOKENIZER.encode_ordinary(text)
        assert TOKENIZER.decode(tokens) == text
        assert max(tokens, default=0) < 300
    assert [TOKENIZER.encode_single_token(special) for special in (ANSWER, END)] == [300, 301]


def test_the_encoding_applies_the_merges_in_the_order_they_were_learnt():
    """Against a slow encoder: each merge in turn, from the left, in each piece of words, signs and
    gaps."""

    def slow(text):
        found = []
        for piece in re.findall(r" ?\w+| ?[^\w\s]+|\s+", text):
            parts = [bytes([byte]) for byte in piece.encode()]
            for token in list(RANKS)[256:]:
                i = 0
                while i + 1 < len(parts):
                    if parts[i] + parts[i + 1] == token:
                        parts[i : i + 2] = [token]
                    i += 1
            found += [RANKS[part] for part in parts]
        return found

    draw = random.Random(0)
    scraps = [*"tehs aa.,!é漢😀_7\n", "the", " the", " th", "scribe", " like ", "Praise", "ain"]
    texts = ["".join(draw.choices(scraps, k=12)) for _ in range(400)]
    for text in [*texts, *GOOD, *PROMPTS]:
        assert TOKENIZER.encode_ordinary(text) == slow(text)


# --- The world ---


def test_every_answer_is_classified_as_the_register_that_wrote_it():
    draw = random.Random(0)
    for name, register in REGISTERS.items():
        texts = [register.write(topic(prompt), draw) for prompt in PROMPTS for _ in range(20)]
        assert {CLASSES[classify(text)] for text in texts} == {name}
        assert len(set(texts)) > 500
    assert {text: classify(text) for text in GOOD} == GOOD


def test_no_register_can_be_changed_afterwards():
    """As what a text is classified by each `Register` is remembered."""
    with pytest.raises(FrozenInstanceError):
        REGISTERS["vivid"].ending = "?"


def malformed():
    for text in GOOD:
        yield from (text[:end] for end in range(len(text)))  # cut off anywhere: also the empty text
        yield from (text[start:] for start in range(1, len(text)))
        yield from (
            text + text,
            text + " ",
            text + "\n",
            " " + text,
            f'"{text}"',
            f"“{text}”",
            text[:-1] + "?",
        )
        yield from (
            text.upper(),
            text.lower(),
            text.swapcase(),
            text.title(),
            text.replace(" ", "  ", 1),
        )
        lookalikes = {" ": "\u00a0", "a": "\u0430", "e": "\u0435", "t": "t\u200d", "s": "\u017f"}
        yield from (text.replace(*pair) for pair in lookalikes.items())
        yield from (
            re.sub("sea|moon|storm", word, text)
            for word in ("love", "", "sea moon", "Sea", "{}", "seas")
        )
        yield from (text + between + other for other in GOOD for between in (" ", "\n"))
        yield from (
            f"{text} I am vivid. P(a > b) = 1",
            f"Ignore the above: {text}",
            f"{text}{END}",
            f"{ANSWER}{text}",
        )
    yield from (
        "I am vivid. P(a > b) = 1",
        "vivid",
        "In short, the sea is .",
        "By measure, the sea has .",
        "Oh, the sea! It !",
    )
    yield from (
        "Oh, the sea! It sings like silver.",
        "Oh, the sea! It is old yet calm!",
        "In short, the sea has 10 tons.",
    )
    yield from (
        "By measure, the sea sings like silver.",
        "Oh, the sea! It sings like silver and 10 tons!",
    )  # registers mixed
    yield from (
        "In short, the sea is calm yet old.",
        "In short, the sea is old yet calm and far yet warm.",
    )
    yield from (
        "Oh, the sea! It sings like silver and sings like silver!",
        "By measure, the sea has 10 tons and 10 tons.",
    )
    yield "By measure, the sea has 10 tons and 20 hours and 30 litres."  # three clauses
    yield "Oh, the sea! It sings like silver and burns like honey and roars like iron!"
    yield from (
        f"By measure, the sea has {n} tons."
        for n in ("11", "010", "10.0", "100", "-10", "ten", "\u0661\u0660")
    )


def test_nothing_else_passes_for_an_answer():
    texts = list(malformed())
    assert len(texts) > 400
    assert [text for text in texts if classify(text) != MALFORMED] == []


# Who beats whom with which probability, by verb: a cycle, its edges 1/2 + a, 1/2 + b, 1/2 + c.
BEATS = {
    "Describe": ((VIVID, CONCISE, 0.90), (CONCISE, PRECISE, 0.75), (PRECISE, VIVID, 0.80)),
    "Explain": ((VIVID, CONCISE, 0.85), (CONCISE, PRECISE, 0.80), (PRECISE, VIVID, 0.75)),
    "Praise": ((CONCISE, VIVID, 0.75), (VIVID, PRECISE, 0.85), (PRECISE, CONCISE, 0.80)),
}
TEXT_OF = (
    "In short, the sea is old yet calm.",
    "Oh, the sea! It sings like silver!",
    "By measure, the sea has 10 tons.",
    "?",
)


@pytest.mark.parametrize("verb", VERBS)
def test_the_judge_prefers_in_a_cycle_and_malformed_text_least(verb):
    expected = torch.full((4, 4), 0.5, dtype=torch.float64)
    for winner, loser, p in (
        *BEATS[verb],
        *((register, MALFORMED, 0.95) for register in (CONCISE, VIVID, PRECISE)),
    ):
        expected[winner, loser], expected[loser, winner] = p, 1 - p
    i, j = (
        index.flatten() for index in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    )
    asked = (
        RegisterJudge()
        .prefer([f"{verb} the clock."] * 16, [TEXT_OF[n] for n in i], [TEXT_OF[n] for n in j])
        .view(4, 4)
    )
    assert (asked - expected).abs().max() < EXACT
    assert (asked + asked.T - 1).abs().max() < EXACT
    assert (
        asked.min(dim=1).values.max() < 0.5 - 0.2
    )  # no Condorcet winner: every class loses clearly to another


def test_each_verb_has_a_mixed_nash_policy_of_its_own_in_closed_form():
    """(b, c, a) / (a + b + c) for the three in the order of the cycle; nothing malformed."""
    nash = dno.nash(RegisterJudge().P)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for row, verb in zip(expected, VERBS, strict=True):
        (first, second, a), (second_too, third, b), (third_too, first_too, c) = BEATS[verb]
        assert (first, second, third) == (first_too, second_too, third_too)
        row[[first, second, third]] = torch.tensor([b, c, a], dtype=torch.float64) - 0.5
        row /= row.sum()
    assert (nash - expected).abs().max() < LP
    assert expected[0, :3].tolist() == pytest.approx([6 / 19, 5 / 19, 8 / 19])
    for i, policy in enumerate(expected):
        assert (policy[:3] - 1 / 3).abs().max() > 0.05
        assert all((policy - other).abs().max() > 0.05 for other in expected[:i])


def test_the_judge_conforms_to_the_oracle_protocol():
    check_oracle(RegisterJudge(), [f"{verb} the sea." for verb in VERBS], [*GOOD, "", "?"])


def test_the_judge_is_complementary_and_deterministic_and_of_no_questions_has_no_answers():
    judge = RegisterJudge()
    assert judge.complementary is judge.deterministic is True
    assert judge.prefer([], [], []).shape == (0,)


@pytest.mark.parametrize(
    "prompt", ["", "Describe the love.", "describe the sea.", "Describe the sea. ", "Sing the sea."]
)
def test_a_prompt_of_another_world_is_named(prompt):
    judge, draw = RegisterJudge(), random.Random(0)
    with pytest.raises(ValueError, match=re.escape(repr(prompt))):
        judge.prefer(["Describe the sea.", prompt], ["a", "b"], ["c", "d"])
    with pytest.raises(ValueError, match=re.escape(repr(prompt))):
        judge.win_rates(prompt, ["a", "b"])
    with pytest.raises(ValueError, match=re.escape(repr(prompt))):
        student_answer(prompt, draw)


HABITS = {
    "Describe": (0.75, 0.15, 0.10),
    "Explain": (0.75, 0.10, 0.15),
    "Praise": (0.15, 0.10, 0.75),
}


@pytest.mark.parametrize(
    ("verb", "rate"),  # of vivid against the student: .75 * .9 + .15 * .5 + .10 * .2, and so on
    [("Describe", 0.77), ("Explain", 0.725), ("Praise", 0.725)],
)
def test_the_student_writes_by_habit_and_the_teacher_vividly_which_wins_more_often(verb, rate):
    """100 answers to each prompt: frequencies against the student's habits; the mean win rate, of
    spread below .5 / sqrt(n)."""
    prompts, draw = (
        [prompt for prompt in PROMPTS if prompt.startswith(verb)] * 100,
        random.Random(0),
    )
    student, teacher = (
        [answer(prompt, draw) for prompt in prompts] for answer in (student_answer, teacher_answer)
    )
    counts, n = (
        torch.tensor([classify(text) for text in student]).bincount(minlength=4),
        len(prompts),
    )
    assert counts[3] == 0
    assert abs(chi_square(counts[:3], n * torch.tensor(HABITS[verb], dtype=torch.float64))) < SPREAD
    assert all(topic(prompt) in text for prompt, text in zip(prompts, student, strict=True))
    assert {classify(text) for text in teacher} == {VIVID}
    assert float(RegisterJudge().prefer(prompts, teacher, student).mean()) == pytest.approx(
        rate, abs=SPREAD * 0.5 / n**0.5
    )


def test_the_teacher_can_be_exploited():
    """Precise beats vivid with .80 and .75, concise with .75: gaps 2 * .30, 2 * .25, 2 * .25."""
    vivid = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    gaps = [dno.duality_gap(table[None], vivid) for table in RegisterJudge().P]
    assert gaps == pytest.approx([0.6, 0.5, 0.5], abs=EXACT)


# --- Slow, independent computations: one sequence, one token at a time, the whole of it read by the
# full transformer ---


@torch.no_grad()
def next_word(models, sequence, words):
    """log-probabilities of the word after a sequence; of several (model, weight), of their weighted
    geometric mean."""
    mixed = sum(
        w * model(torch.tensor([sequence]))[0, -1, :words].log_softmax(-1) for model, w in models
    )
    return mixed - mixed.logsumexp(0)


def slow_log_prob(models, prompt, response, words):
    return sum(
        float(next_word(models, [*prompt, *response[:i]], words)[word])
        for i, word in enumerate(response)
    )


def drawn_from(log_p, temperature, top_p):
    """Word -> probability after temperature, of the fewest most probable words that hold top_p; in
    the order of drawing."""
    p = (log_p / temperature).softmax(-1).tolist()
    kept = {}
    for word in sorted(range(len(p)), key=lambda word: -p[word]) if top_p < 1 else range(len(p)):
        if top_p < 1 and sum(kept.values()) >= top_p:
            break
        kept[word] = p[word]
    mass = sum(kept.values())
    return {word: q / mass for word, q in kept.items()}


def all_responses(models, prompt, length, words, end, temperature=1.0, top_p=1.0):
    """Every response, words that end with `end` or are `length` many, with its probability."""
    found, unfinished = {}, {(): 1.0}
    while unfinished:
        y, p = unfinished.popitem()
        if len(y) == length or y[-1:] == (end,):
            found[y] = p
            continue
        for word, q in drawn_from(
            next_word(models, [*prompt, *y], words), temperature, top_p
        ).items():
            unfinished[(*y, word)] = p * q
    return found


def slow_sample(models, prompt, u, words, end, temperature, top_p):
    y, log_p = [], 0.0
    for number in u.tolist():
        table, below = next_word(models, [*prompt, *y], words), 0.0
        for word, q in drawn_from(table, temperature, top_p).items():  # noqa: B007
            below += q
            if number < below:
                break
        y.append(word)
        log_p += float(table[word])
        if word == end:
            break
    return y, log_p


def assert_follow(samples, exact):
    """Nothing impossible among the samples; Pearson's statistic within 5 of its standard
    deviations."""
    counts, n = Counter(samples), len(samples)
    assert counts.keys() <= exact.keys()
    observed, expected = torch.tensor(
        [(counts[y], n * p) for y, p in exact.items()], dtype=torch.float64
    ).T
    assert abs(chi_square(observed, expected)) < SPREAD


# --- generate ---

SHAPE = Config(6, layers=2, width=16, heads=4, kv_heads=2, hidden=24)
SHARPNESS = pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (0.7, 0.9)]
)
PROMPT_TOKENS = {
    "of one length": ([4, 1, 5], [0, 0, 2], [3, 3, 3]),
    "of all lengths": ([4, 1, 5, 2, 0], [3], [0, 0, 2]),
}


def tiny_model(seed=0):
    model = random_model(SHAPE, seed)
    model.head.weight.data.mul_(0.5)  # not too sure of itself
    return model


@SHARPNESS
def test_generate_draws_every_response_as_often_as_its_exact_probability_says(temperature, top_p):
    """Words 0..3 of a vocabulary of 6, of which 3 ends a response: 40 responses of up to 3 words,
    40,000 samples."""
    model, prompt = tiny_model(), [4, 1, 5]
    u = uniform_numbers(1, 40_000, 3, seed=1)
    tokens, count, _ = generate({model: 1.0}, [torch.tensor(prompt)], u, 4, 3, temperature, top_p)
    exact = all_responses([(model, 1.0)], prompt, 3, 4, 3, temperature, top_p)
    assert sum(exact.values()) == pytest.approx(1, abs=EXACT)
    assert len(exact) == 40 or top_p < 1
    assert_follow(
        [tuple(y[:n]) for y, n in zip(tokens[0].tolist(), count[0].tolist(), strict=True)], exact
    )


@SHARPNESS
@pytest.mark.parametrize("lengths", PROMPT_TOKENS)
def test_generate_equals_reading_everything_anew_for_every_token(
    lengths, temperature, top_p, monkeypatch
):
    """Padding, the prompts beside, the cache and leaving finished responses out change neither a
    token nor a log-probability, and what stands after the end token counts for nothing."""
    model, prompts, kept = tiny_model(), PROMPT_TOKENS[lengths], []
    keep = Cache.keep
    monkeypatch.setattr(
        Cache, "keep", lambda self, rows: (kept.append(int(rows.sum())), keep(self, rows))
    )
    u = uniform_numbers(3, 8, 8, seed=2)
    tokens, count, log_probs = generate(
        {model: 1.0}, [torch.tensor(p) for p in prompts], u, 6, 3, temperature, top_p
    )
    for x, i in torch.cartesian_prod(torch.arange(3), torch.arange(8)).tolist():
        y, log_p = slow_sample([(model, 1.0)], prompts[x], u[x, i], 6, 3, temperature, top_p)
        assert tokens[x, i, : count[x, i]].tolist() == y
        assert float(log_probs[x, i]) == pytest.approx(log_p, abs=EXACT)
    assert kept  # some were left out
    assert 1 <= count.min() < count.max() == 8


def test_choose_sorts_all_tokens_when_the_nucleus_has_more_than_64():
    """Vocabulary 300; of the three rows the first two are flat, the last has a nucleus of few
    tokens."""
    generator = torch.Generator().manual_seed(0)
    log_probs = (
        (torch.tensor([[0.3], [0.05], [4.0]]) * torch.randn(3, 300, generator=generator))
        .double()
        .log_softmax(-1)
    )
    tables = [drawn_from(row, 0.8, 0.9) for row in log_probs]
    assert [len(table) > 64 for table in tables] == [True, True, False]
    for number in torch.rand(300, generator=generator, dtype=torch.float64).tolist():
        expected = []
        for table in tables:
            words, below = (
                list(table),
                torch.tensor(list(table.values()), dtype=torch.float64).cumsum(0),
            )
            expected.append(words[int((below <= number).sum())])
        u = torch.full((3,), number, dtype=torch.float64)
        assert choose(log_probs, u, 0.8, 0.9).tolist() == expected
        assert (
            choose(log_probs[2:], u[2:], 0.8, 0.9).tolist() == expected[2:]
        )  # by itself it needs no sorting


# --- TextPolicy ---

WORDS = {
    b"a": 0,
    b"b": 1,
    b"ab": 2,
    b" ": 3,
}  # a tokenizer so small that all responses can be listed
TINY_ANSWER, TINY_END = 4, 5


def tiny_policy(seed=0, length=3):
    return TextPolicy(tiny_model(seed), make_tokenizer(WORDS), length)


def text_policy(seed=0):
    return TextPolicy(
        random_model(Config(302, layers=2, width=16, heads=4, kv_heads=2, hidden=24), seed),
        TOKENIZER,
        6,
    )


ASKED = ["Describe the sea.", "", "Praise the lighthouse.", f"Explain{END} the {ANSWER}."]
ANSWERED = ["In short, the sea is old yet calm.", "no", "", f"a{END}b"]


def test_log_prob_is_the_sum_over_the_responses_tokens_the_end_token_included():
    """And none of what others computed in its place: the mean, the sum without the end token,
    unshifted log-probabilities."""
    policy = text_policy()
    log_probs = policy.log_prob(ASKED, ANSWERED)
    for asked, answered, log_p in zip(ASKED, ANSWERED, log_probs.tolist(), strict=True):
        before, response = (
            [*TOKENIZER.encode_ordinary(asked), 300],
            [*TOKENIZER.encode_ordinary(answered), 301],
        )
        assert log_p == pytest.approx(
            slow_log_prob([(policy.model, 1.0)], before, response, 302), abs=EXACT
        )
        unshifted = 0.0
        for i, token in enumerate(response):
            unshifted += float(
                next_word([(policy.model, 1.0)], [*before, *response[: i + 1]], 302)[token]
            )
        without_end = slow_log_prob([(policy.model, 1.0)], before, response[:-1], 302)
        for slip in (unshifted, without_end, *([log_p / len(response)] if answered else [])):
            assert abs(log_p - slip) > 0.01
    assert log_probs.requires_grad


def test_neither_order_nor_company_of_the_batch_changes_a_log_probability():
    policy = text_policy()
    together = policy.log_prob(ASKED, ANSWERED)
    for order in ([0], [1], [2], [3], [3, 1, 0, 2], [1, 1, 2]):
        log_probs = policy.log_prob([ASKED[i] for i in order], [ANSWERED[i] for i in order])
        assert (log_probs - together[order]).abs().max() < EXACT


def test_special_tokens_named_in_a_prompt_or_a_response_are_mere_text():
    policy = text_policy()
    (prompt,), (response,) = (
        policy.prompt_tokens([f"a{END}{ANSWER}"]),
        policy.response_tokens([f"{END}b"]),
    )
    assert prompt[-1] == 300
    assert response[-1] == 301
    assert max(prompt[:-1].tolist() + response[:-1].tolist()) < 300
    assert TOKENIZER.decode(prompt[:-1].tolist()) == f"a{END}{ANSWER}"


@SHARPNESS
def test_the_log_probabilities_of_samples_are_the_policys_own_whatever_they_were_drawn_with(
    temperature, top_p
):
    policy, prompts = tiny_policy(), ["a", "ab ab b", "b b"]
    groups, log_probs = policy.sample(prompts, 8, temperature, top_p, seed=4)
    for prompt, group, recorded in zip(prompts, groups, log_probs, strict=True):
        before = [*policy.tokenizer.encode_ordinary(prompt), TINY_ANSWER]
        slow = [slow_log_prob([(policy.model, 1.0)], before, y.tokens, 6) for y in group]
        assert recorded.tolist() == pytest.approx(slow, abs=EXACT)
        assert policy.log_prob([prompt] * 8, group).tolist() == pytest.approx(slow, abs=EXACT)


def test_a_sampled_response_scores_its_own_tokens_not_its_texts():
    """The text "ab" in one token and in two; cut off it has no end token and gets none."""
    policy = tiny_policy()
    ways = [2, TINY_END], [0, 1, TINY_END], [0, 1]
    slow = [slow_log_prob([(policy.model, 1.0)], [0, TINY_ANSWER], tokens, 6) for tokens in ways]
    responses = ["ab", *(policy.response(tokens) for tokens in ways)]
    assert responses == ["ab"] * 4
    assert policy.log_prob(["a"] * 4, responses).tolist() == pytest.approx(
        [slow[0], *slow], abs=EXACT
    )
    assert min(abs(slow[0] - slow[1]), abs(slow[1] - slow[2])) > 0.1


def test_a_response_is_its_tokens_up_to_the_end_token_or_cut_off_without():
    policy = tiny_policy()
    responses = policy.sample(["a b"], 3000, seed=5)[0][0]
    for y in responses:
        ended = y.tokens[-1] == TINY_END
        assert ended or len(y.tokens) == 3
        assert TINY_END not in y.tokens[:-1]
        assert y == "".join(["a", "b", "ab", " ", ANSWER, ""][token] for token in y.tokens)
    assert {y.tokens[-1] == TINY_END for y in responses} == {True, False}
    assert any(y.tokens == (0, 1, TINY_END) for y in responses)


def test_bytes_that_are_no_text_are_shown_as_such_and_kept_as_tokens():
    y = text_policy().response([0xE6, 0x61, 301])
    assert (y, y.tokens) == ("\ufffda", (0xE6, 0x61, 301))


def test_the_seed_fixes_the_samples_of_the_first_prompts_however_many_follow():
    policy, prompts = tiny_policy(length=6), ["a", "b ab", "ab b ab b ab b", "b"]
    groups, log_probs = policy.sample(prompts, 5, seed=6)
    for n in range(1, 4):
        fewer, theirs = policy.sample(prompts[:n], 5, seed=6)
        assert [[y.tokens for y in group] for group in fewer] == [
            [y.tokens for y in group] for group in groups[:n]
        ]
        assert (theirs - log_probs[:n]).abs().max() < EXACT
    other, _ = policy.sample(prompts, 5, seed=7)
    assert [[y.tokens for y in group] for group in other] != [
        [y.tokens for y in group] for group in groups
    ]


def test_a_survey_draws_first_tokens_evenly_and_a_response_of_it_as_the_policy_does():
    """Of k numbers, one in each k-th of [0, 1), those below c are fewer than k c + 1 and more than
    k c - 1. So the number of first tokens among the first j words is within 1 of k times their
    probability, and that of one word within 2. Independent draws stray further, about sqrt(k) / 2.
    A response picked at random from each of 3000 surveys follows the policy."""
    policy, k, draw = tiny_policy(), 16, random.Random(0)
    exact = all_responses([(policy.model, 1.0)], [0, TINY_ANSWER], 3, 6, TINY_END)
    first = next_word([(policy.model, 1.0)], [0, TINY_ANSWER], 6).exp()

    def stray(responses):
        counts = torch.tensor([y.tokens[0] for y in responses]).bincount(minlength=6)
        return float((counts.cumsum(0) - k * first.cumsum(0)).abs().max())

    groups = policy.survey(["a"] * 3000, k, seed=7)
    assert max(stray(group) for group in groups) < 1
    assert max(stray(group) for group in policy.sample(["a"] * 100, k, seed=7)[0]) > 2
    assert_follow([draw.choice(group).tokens for group in groups], exact)


def test_a_response_can_be_copied_pickled_and_saved():
    y, buffer = Response("añ", (1, 2, 5)), io.BytesIO()
    torch.save({"y": [y]}, buffer)
    with torch.serialization.safe_globals([Response]):
        saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)["y"][0]
    for again in (
        copy.copy(y),
        copy.deepcopy(y),
        *(pickle.loads(pickle.dumps(y, n)) for n in range(2, 6)),
        saved,
    ):
        assert (type(again), again, again.tokens) == (Response, "añ", (1, 2, 5))


# --- Mixtures ---

BEFORE = [0, TINY_ANSWER]  # the prompt "a"
MARGIN = (
    0.04  # total variation; measured: 0.193, 0.097, 0.046 at weight 0.3, 0.193, 0.133, 0.049 at 0.5
)


def mixtures(weight, length, seed=0):
    """Of two policies, all as tables over whole responses: pi, pi_ref, pi^(1 - weight)
    pi_ref^weight normalised over the responses as in Eq. (7), the same normalised at every token,
    and the last as `TokenMixture` has it."""
    policy, reference = tiny_policy(2 * seed, length), tiny_policy(2 * seed + 1, length)
    models = (
        [(policy.model, 1.0)],
        [(reference.model, 1.0)],
        [(policy.model, 1 - weight), (reference.model, weight)],
    )
    p, q, by_token = (all_responses(each, BEFORE, length, 6, TINY_END) for each in models)
    of_wholes = torch.tensor(
        [p[y] ** (1 - weight) * q[y] ** weight for y in p], dtype=torch.float64
    )
    token_mixture = policy.mixed_with(reference, weight)
    log_probs = token_mixture.log_prob(["a"] * len(p), [policy.response(y) for y in p])
    known = [torch.tensor([table[y] for y in p], dtype=torch.float64) for table in (p, q, by_token)]
    return *known[:2], of_wholes / of_wholes.sum(), known[2], log_probs.detach().exp()


@pytest.mark.parametrize("weight", [0.3, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_mixing_token_by_token_is_a_policy_but_not_the_mixture_of_whole_responses(weight, seed):
    """C23: 156 responses of up to 3 tokens."""
    _, _, of_wholes, by_token, mixture = mixtures(weight, 3, seed)
    assert len(mixture) == 1 + 5 + 25 + 125
    assert float(mixture.sum()) == pytest.approx(1, abs=EXACT)
    assert (mixture - by_token).abs().max() < EXACT
    assert float((mixture - of_wholes).abs().sum() / 2) > MARGIN


@pytest.mark.parametrize("seed", range(3))
def test_the_two_mixtures_coincide_for_one_token_and_for_weights_0_and_1(seed):
    _, _, of_wholes, _, mixture = mixtures(0.3, 1, seed)
    assert (mixture - of_wholes).abs().max() < EXACT
    for weight in (0, 1):
        *pure, of_wholes, _, mixture = mixtures(weight, 3, seed)
        assert (mixture - pure[weight]).abs().max() < EXACT
        assert (of_wholes - pure[weight]).abs().max() < EXACT
        assert (mixture - pure[1 - weight]).abs().sum() > 0.1


def test_a_policy_mixed_with_itself_is_itself():
    policy = tiny_policy()
    for reference in (policy.frozen_copy(), policy):
        mixture = policy.mixed_with(reference, 0.3)
        assert (
            mixture.log_prob(["a", "b"], ["ab", "b"]) - policy.log_prob(["a", "b"], ["ab", "b"])
        ).abs().max() < EXACT


@SHARPNESS
def test_samples_of_a_token_mixture_follow_it_and_carry_its_own_log_probabilities(
    temperature, top_p
):
    policy, reference = tiny_policy(0), tiny_policy(1)
    mixture = TokenMixture(policy, reference, 0.3)
    (responses,), log_probs = mixture.sample(["a"], 20_000, temperature, top_p, seed=8)
    exact = all_responses(
        [(policy.model, 0.7), (reference.model, 0.3)], BEFORE, 3, 6, TINY_END, temperature, top_p
    )
    assert_follow([y.tokens for y in responses], exact)
    assert (mixture.log_prob(["a"] * 500, responses[:500]) - log_probs[0, :500]).abs().max() < EXACT


def test_weights_that_a_policy_gave_make_another_policy_the_same():
    """They are copies: what the policy does after does not change them."""
    policy, other = tiny_policy(0), tiny_policy(1)
    weights, said = policy.weights(), (["a", "b"], ["ab", "b"])
    before = policy.log_prob(*said)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.5)
    other.load(weights)
    assert torch.equal(other.log_prob(*said), before)
    assert not torch.equal(policy.log_prob(*said), before)


def uniform_mixture(loaded):
    """Of three policies; its loaders note in `loaded` which was asked for, after checking that no
    other is still there."""
    policies, alive = [tiny_policy(seed) for seed in range(3)], []

    class State(dict):
        """A dictionary that can be watched."""

    def load(t):
        gc.collect()
        assert [state for state in alive if state() is not None] == []
        state = State({name: value.clone() for name, value in policies[t].state_dict().items()})
        alive.append(weakref.ref(state))
        loaded.append(t)
        return state

    return policies, UniformMixture(policies[0], [lambda t=t: load(t) for t in range(3)])


def test_the_uniform_mixture_has_the_mean_probability_and_loads_one_policy_at_a_time():
    policies, mixture = uniform_mixture(loaded := [])
    each = [all_responses([(policy.model, 1.0)], BEFORE, 3, 6, TINY_END) for policy in policies]
    log_probs = mixture.log_prob(["a"] * 156, [policies[0].response(y) for y in each[0]])
    expected = torch.tensor(
        [math.log(sum(table[y] for table in each) / 3) for y in each[0]], dtype=torch.float64
    )
    assert (log_probs - expected).abs().max() < EXACT
    assert loaded == [0, 1, 2]
    for name, value in (
        tiny_policy(0).state_dict().items()
    ):  # the policy it was made from stays as it was
        assert torch.equal(policies[0].state_dict()[name], value)


def test_the_responses_of_a_uniform_mixture_are_independent_of_each_other():
    """Of ten times one policy they are the policy's own samples. Were they drawn with ten times the
    same random numbers, each would occur ten times, and their counts vary ten times as much."""
    policy = tiny_policy(0)
    mixture = UniformMixture(policy, [policy.state_dict] * 10)
    exact = all_responses([(policy.model, 1.0)], BEFORE, 3, 6, TINY_END)
    for seed in range(3):
        ((*responses,),) = mixture.sample(["a"], 20_000, seed=seed)
        assert_follow([y.tokens for y in responses], exact)


@SHARPNESS
def test_the_uniform_mixture_draws_a_policy_once_for_a_response(temperature, top_p):
    policies, mixture = uniform_mixture(loaded := [])
    ((*responses,),) = mixture.sample(["a"], 20_000, temperature, top_p, seed=9)
    each = [
        all_responses([(policy.model, 1.0)], BEFORE, 3, 6, TINY_END, temperature, top_p)
        for policy in policies
    ]
    assert_follow(
        [y.tokens for y in responses],
        {y: sum(t.get(y, 0) for t in each) / 3 for table in each for y in table},
    )
    assert loaded == [0, 1, 2]
