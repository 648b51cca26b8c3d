"""Policies that answer in text: what a response scores, and what is recorded of it."""

import copy
import io
import pickle
import random

import pytest
import torch

from helpers.games import EXACT
from helpers.text import (
    SHARPNESS,
    TINY_ANSWER,
    TINY_END,
    TOKENIZER,
    all_responses,
    assert_follow,
    next_word,
    random_model,
    tiny_policy,
)
from model import Config
from text import ANSWER, END, Response, TextPolicy

# --- The world ---


def slow_log_prob(models, prompt, response, words):
    return sum(
        float(next_word(models, [*prompt, *response[:i]], words)[word])
        for i, word in enumerate(response)
    )


# --- TextPolicy ---


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
def test_log_probabilities_of_samples_are_the_policys_own_however_drawn(temperature, top_p):
    """The log probabilities of samples are the policys own whatever they were drawn with."""
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
    A response picked at random from each of 1,000 surveys follows the policy."""
    policy, k, draw = tiny_policy(), 16, random.Random(0)
    exact = all_responses([(policy.model, 1.0)], [0, TINY_ANSWER], 3, 6, TINY_END)
    first = next_word([(policy.model, 1.0)], [0, TINY_ANSWER], 6).exp()

    def stray(responses):
        counts = torch.tensor([y.tokens[0] for y in responses]).bincount(minlength=6)
        return float((counts.cumsum(0) - k * first.cumsum(0)).abs().max())

    groups = policy.survey(["a"] * 1000, k, seed=7)
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
