"""The tokenizer: byte pairs learnt, pieces, any text and back."""

import random
import re

from helpers.text import GOOD, RANKS, TOKENIZER
from text import ANSWER, END, learn_byte_pairs
from world import PROMPTS


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
