"""A chat model as a policy, by one process or many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from chat.processes import MasterWeights, Scorer, all_scores, full, part_of, sharded
from chat.scoring import shared_log_prob
from chat.team import Team
from chat.template import Chat
from model import Transformer
from text import Response, TextPolicy


class ChatPolicy(TextPolicy):
    """A chat model that answers prompts in its own template.

    `model`, in its own dtype, samples and scores; `parameters()` are what is trained: those of the
    model that require a gradient, if they are float32; else float32 copies of its weights, which it
    is given anew by `refresh` before it samples or scores. batch: how many responses are sampled,
    or scored without a gradient, at a time; prompts of about equal lengths go together, and what is
    drawn does not depend on it, but for rounding. Recorded log-probabilities are as precise as the
    model's dtype. Sampling and scoring raise ValueError on a prompt and response that together are
    longer than the model's context, where its reading would be wrong.

    Of several processes each does its share of the batches and all get the same results, up to
    rounding those of one process. fsdp: each keeps the whole model for sampling, but only its part
    of the parameters and their gradients."""

    def __init__(
        self,
        model: Transformer,
        chat: Chat,
        max_new_tokens: int,
        batch: int = 64,
        fsdp: bool = False,
    ):
        nn.Module.__init__(self)
        self.model, self.chat, self.end = model, chat, chat.end
        self.max_new_tokens, self.batch = max_new_tokens, batch
        self.team, self.fsdp, head = Team(), fsdp, model.head.weight
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.scorer: nn.Module = Scorer(model)
        if fsdp:
            float32 = Scorer(copy.deepcopy(model).cpu().float())
            self.scorer = sharded(float32, head.dtype, head.device)
        elif any(weight.dtype != torch.float32 for weight in trained):
            self.scorer = MasterWeights(self.scorer)
        if self.team.size > 1 and trained and not fsdp:
            self.scorer = DistributedDataParallel(self.scorer, gradient_as_bucket_view=True)

    def frozen_copy(self) -> ChatPolicy:
        """The policy as it is, to be a reference: the model alone, of which nothing is trained."""
        self.refresh()
        model = copy.deepcopy(self.model).requires_grad_(False)
        return ChatPolicy(model, self.chat, self.max_new_tokens, self.batch)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What is trained; of a reference, the model's weights."""
        trained = [weight for weight in self.scorer.parameters(recurse) if weight.requires_grad]
        return iter(trained or self.model.parameters(recurse))

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the model what is trained in place of its weights, where that has changed."""
        for weight, trained in zip(self.model.parameters(), self.scorer.parameters(), strict=True):
            if trained is not weight:
                new = full(trained).to(weight.dtype)
                if not torch.equal(new, weight):  # what a gradient is yet to be taken of stays
                    weight.copy_(new)

    def weights(self) -> list[Tensor]:
        """As of `TextPolicy`; all processes gather them."""
        return [full(weight).detach().to("cpu", copy=True) for weight in self.parameters()]

    @torch.no_grad()
    def load(self, weights: Sequence[Tensor]) -> None:
        """As of `TextPolicy`, or from this process's parts, such as `dno.Best` has."""
        for mine, given in zip(self.parameters(), weights, strict=True):
            mine.copy_(part_of(given, mine))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, none of them special."""
        return self.chat.encode(text)

    def prompt_tokens(self, prompts: Iterable[str]) -> list[Tensor]:
        """What the transformer reads before it answers: the prompt in the chat template."""
        device = self.model.head.weight.device
        return [torch.tensor(self.chat.prompt(prompt), device=device) for prompt in prompts]

    def response(self, tokens: Sequence[int]) -> Response:
        """The response of these tokens; special tokens are not part of the text."""
        return Response(self.chat.decode(list(tokens)), tokens)

    def survey(self, prompts: Sequence[str], k: int, seed: int) -> list[list[Response]]:
        """k samples of each prompt, at temperature 1."""
        return self.sample(prompts, k, seed=seed)[0]

    def log_prob(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """As of `TextPolicy`, float32. With a gradient all at once; else in batches."""
        xs, ys = self.prompt_tokens(prompts), self.response_tokens(responses)
        self._check_context(len(x) + len(y) for x, y in zip(xs, ys, strict=True))
        if torch.is_grad_enabled():
            return self._score_to_train(prompts, xs, ys)
        self.refresh()
        scores = torch.empty(len(xs))

        def score(part: list[int]) -> Tensor:
            return shared_log_prob(self.model, [xs[b] for b in part], [ys[b] for b in part]).cpu()

        order = sorted(range(len(xs)), key=lambda b: (len(xs[b]), prompts[b], len(ys[b])))
        for part, found in self._in_batches(order, self.batch, score):
            scores[part] = found
        return scores.to(self.model.head.weight.device)

    def _score_to_train(self, prompts: Sequence[str], xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        """Differentiable scores; of several processes, each differentiates those of its share of
        the prompts."""
        if not self.fsdp:  # which gathers what it needs by itself
            self.refresh()
        if self.team.size == 1:
            return self.scorer(xs, ys)
        mine = self.team.share_of(prompts)
        scored = mine or [0]  # a process without any takes part as well, with one that is dropped
        own = self.scorer([xs[b] for b in scored], [ys[b] for b in scored])
        place = torch.tensor(mine, dtype=torch.int64, device=own.device)
        return all_scores(own[: len(place)], place, len(xs), self.team.size)

    def _score(
        self, models: dict[Transformer, float], prompts: Sequence[str], responses: Sequence[str]
    ) -> Tensor:
        self.refresh()
        return super()._score(models, prompts, responses)

    def _answer(
        self,
        models: dict[Transformer, float],
        prompts: Sequence[str],
        u: Tensor,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> tuple[list[list[Response]], Tensor]:
        self.refresh()
        lengths = [len(self.chat.prompt(x)) for x in prompts]
        self._check_context(length + u.shape[-1] for length in lengths)
        responses: list[list[Response]] = [[]] * len(prompts)
        log_probs, answer = torch.empty(u.shape[:2]), super()._answer

        def answers(part: list[int]) -> tuple[list[list[Response]], Tensor]:
            asked = [prompts[x] for x in part]
            texts, scores = answer(models, asked, u[part], temperature, top_p)
            return texts, scores.float().cpu()

        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        size = max(1, self.batch // u.shape[1])
        for part, (texts, scores) in self._in_batches(order, size, answers, "sampling"):
            log_probs[part] = scores
            for x, ys in zip(part, texts, strict=True):
                responses[x] = ys
        return responses, log_probs

    def _check_context(self, lengths: Iterable[int]) -> None:
        longest, context = max(lengths, default=0), self.model.config.context
        if context and longest > context:
            raise ValueError(
                f"prompt and response have {longest} tokens; expected at most the model's context, "
                f"{context}"
            )

    def _in_batches(
        self, order: list[int], size: int, work: Callable[[list[int]], Any], doing: str = ""
    ) -> Iterator[tuple[list[int], Any]]:
        """Parts of so many places, in order, and what work makes of each: this process or another.
        doing: says the first one's progress bar, if any."""
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        quiet = True if self.team.rank or not doing else None  # None: only without a terminal
        bar = tqdm(self.team.mine(parts), doing, unit="batch", disable=quiet, leave=False)
        return zip(parts, self.team.together([work(part) for part in bar]), strict=True)
