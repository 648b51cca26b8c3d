"""Byte pairs, and a transformer as a policy over text, for Algorithms 2 and 4.

Axes: B prompts or responses, K samples of a prompt.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import tiktoken
import torch
from torch import Tensor, nn

from model import Transformer, generate, token_log_prob, uniform_numbers

# --- Byte pairs -----------------------------------------------------------------------------------


# words, signs and gaps, a word with the space before it: tokens never cross these borders
SPLIT = r" ?\w+| ?[^\w\s]+|\s+"
ANSWER, END = "<|answer|>", "<|end|>"  # special tokens: before a response and after it


def learn_byte_pairs(corpus: Iterable[str], size: int) -> dict[bytes, int]:
    """Byte-pair encoding (Sennrich et al. 2016): the 256 bytes, then, until there are `size` tokens
    or nothing to join, the adjacent pair that is most frequent in the corpus (of equals, the first
    in byte order). Token -> rank, in that order."""
    pieces = Counter(piece for text in corpus for piece in re.findall(SPLIT, text))
    words = {
        tuple(bytes([byte]) for byte in piece.encode()): count for piece, count in pieces.items()
    }
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        words = {tuple(joined(word, best)): count for word, count in words.items()}
    return ranks


def joined(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> Iterator[bytes]:
    """The word's tokens with every occurrence of the pair, from the left, made one."""
    i = 0
    while i < len(word):
        width = 2 if word[i : i + 2] == pair else 1
        yield b"".join(word[i : i + width])
        i += width


def make_tokenizer(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """The encoding of these byte pairs, with the special tokens `ANSWER` and `END` after them."""
    special = {ANSWER: len(ranks), END: len(ranks) + 1}
    return tiktoken.Encoding(
        "byte pairs of the corpus", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special
    )


# --- Policies -------------------------------------------------------------------------------------


class Response(str):
    """A text that remembers the tokens it was sampled as.

    They need not be those that it would be encoded as. The last is the end token, unless the
    response was cut off."""

    tokens: tuple[int, ...]

    def __new__(cls, text: str, tokens: Iterable[int]) -> Response:
        response = super().__new__(cls, text)
        response.tokens = tuple(tokens)
        return response

    def __reduce__(self) -> tuple[type[Response], tuple[str, tuple[int, ...]]]:
        """How it is copied and pickled."""
        return Response, (str(self), self.tokens)


class TextPolicy(nn.Module):
    """A transformer that answers prompts, as text: the prompt's tokens, `ANSWER`, the response's
    tokens, `END`."""

    def __init__(self, model: Transformer, tokenizer: tiktoken.Encoding, max_new_tokens: int):
        super().__init__()
        if model.config.vocab_size != tokenizer.n_vocab:
            found, expected = model.config.vocab_size, tokenizer.n_vocab
            raise ValueError(f"the model has {found} tokens; expected the tokenizer's {expected}")
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.answer, self.end = (
            tokenizer.encode_single_token(special) for special in (ANSWER, END)
        )

    def weights(self) -> list[Tensor]:
        """Copies of the parameters, whole, on the CPU, for `load`."""
        return [weight.detach().to("cpu", copy=True) for weight in self.parameters()]

    @torch.no_grad()
    def load(self, weights: Sequence[Tensor]) -> None:
        """Take the parameters from what `weights` gave."""
        for mine, given in zip(self.parameters(), weights, strict=True):
            mine.copy_(given)

    def frozen_copy(self) -> TextPolicy:
        """The policy as it is, to be a reference: nothing of the copy is trained."""
        return copy.deepcopy(self).requires_grad_(False)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, none of them special, whatever it spells."""
        return self.tokenizer.encode_ordinary(text)

    def prompt_tokens(self, prompts: Iterable[str]) -> list[Tensor]:
        """What the transformer reads before it answers."""
        device = self.model.head.weight.device
        return [torch.tensor([*self.encode(x), self.answer], device=device) for x in prompts]

    def response(self, tokens: Sequence[int]) -> Response:
        """The response of these tokens; the end token is not part of the text.

        Bytes that are no UTF-8 become U+FFFD."""
        words = [token for token in tokens if token != self.end]
        return Response(self.tokenizer.decode(words), tokens)

    def finished(self, response: Response) -> bool:
        """Did the model end it itself, or was it cut off?"""
        return bool(response.tokens) and response.tokens[-1] == self.end

    def response_tokens(self, responses: Iterable[str]) -> list[Tensor]:
        """A response's own tokens if it was sampled, else its encoding and the end token."""
        rows = (
            y.tokens if isinstance(y, Response) else [*self.encode(y), self.end] for y in responses
        )
        return [torch.tensor(row, device=self.model.head.weight.device) for row in rows]

    def log_prob(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """log pi(y|x) [B]: the sum over the response's tokens, the end token included, never their
        mean. Differentiable."""
        return self._score({self.model: 1.0}, prompts, responses)

    def sample(
        self,
        prompts: Sequence[str],
        k: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> tuple[list[list[Response]], Tensor]:
        """k responses to each of B prompts, and their log-probabilities [B, k] under the policy
        itself, whatever temperature and top_p they were drawn with."""
        u = uniform_numbers(len(prompts), k, self.max_new_tokens, seed)
        return self._answer({self.model: 1.0}, prompts, u, temperature, top_p)

    @torch.no_grad()
    def survey(self, prompts: Sequence[str], k: int, seed: int) -> list[list[Response]]:
        """As `sample`, for measuring: the first tokens of a prompt's k responses are drawn from the
        k equal parts of their distribution in turn, so that how often one occurs is right to 2/k.
        Only all k together follow the policy."""
        u = uniform_numbers(len(prompts), k, self.max_new_tokens, seed)
        u[:, :, 0] = (torch.arange(k) + u[:, :, 0]) / k
        return self._answer({self.model: 1.0}, prompts, u)[0]

    def mixed_with(self, reference: TextPolicy, weight: float) -> TokenMixture:
        """This policy and a reference of the given weight, mixed token by token."""
        return TokenMixture(self, reference, weight)

    def _score(
        self, models: dict[Transformer, float], prompts: Sequence[str], responses: Sequence[str]
    ) -> Tensor:
        words = self.model.config.vocab_size
        return token_log_prob(
            models, self.prompt_tokens(prompts), self.response_tokens(responses), words
        )

    def _answer(
        self,
        models: dict[Transformer, float],
        prompts: Sequence[str],
        u: Tensor,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> tuple[list[list[Response]], Tensor]:
        words = self.model.config.vocab_size
        tokens, count, log_probs = generate(
            models, self.prompt_tokens(prompts), u, words, self.end, temperature, top_p
        )
        groups = zip(tokens.tolist(), count.tolist(), strict=True)
        return [
            [self.response(y[:n]) for y, n in zip(*group, strict=True)] for group in groups
        ], log_probs


class TokenMixture:
    """pi^(1 - weight) pi_ref^weight of two text policies, normalised at every token, as section 4
    suggests for Algorithm 4's option II. It is not the mixture pi^tau of Eq. (7), which is
    normalised over whole responses."""

    def __init__(self, policy: TextPolicy, reference: TextPolicy, weight: float):
        self.policy, self.models = policy, {policy.model: 1 - weight}
        self.models[reference.model] = self.models.get(reference.model, 0.0) + weight

    def log_prob(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Log-probability [B] of whole responses under the mixture."""
        return self.policy._score(self.models, prompts, responses)

    def sample(
        self,
        prompts: Sequence[str],
        k: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> tuple[list[list[Response]], Tensor]:
        """As of `TextPolicy`; the log-probabilities are the mixture's."""
        u = uniform_numbers(len(prompts), k, self.policy.max_new_tokens, seed)
        return self.policy._answer(self.models, prompts, u, temperature, top_p)


class UniformMixture:
    """unif(pi_1..pi_T), what Algorithm 1 returns, as a policy: draw t once for a response, then
    answer with pi_t.

    states: functions that load the parameters of each pi_t, from disk for example; one is in memory
    at a time."""

    def __init__(self, policy: TextPolicy, states: Sequence[Callable[[], dict[str, Tensor]]]):
        self.policy, self.states = policy.frozen_copy(), states

    @torch.no_grad()
    def log_prob(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """log of the mean over t of pi_t(y|x), [B]."""
        members = []
        for load in self.states:
            self.policy.load_state_dict(load())
            members.append(self.policy.log_prob(prompts, responses))
        return torch.stack(members).logsumexp(0) - math.log(len(members))

    def sample(
        self,
        prompts: Sequence[str],
        k: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[Response]]:
        """k responses to each of B prompts."""
        which = torch.randint(
            len(self.states), (len(prompts), k), generator=torch.Generator().manual_seed(seed)
        )
        responses: list[list[Response]] = [[Response("", ())] * k for _ in prompts]
        for t in which.unique().tolist():
            self.policy.load_state_dict(self.states[t]())
            places = (which == t).nonzero().tolist()
            answers, _ = self.policy.sample(
                [prompts[x] for x, _ in places], 1, temperature, top_p, seed * len(self.states) + t
            )
            for (x, i), (y,) in zip(places, answers, strict=True):
                responses[x][i] = y
        return responses
