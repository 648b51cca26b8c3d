"""A chat model as a policy, by one process or many."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from chat.processes import MasterWeights, Scorer, Scores, full, local, part_of, sharded
from chat.scoring import shared_log_prob
from chat.team import Team
from chat.template import Chat
from model import Transformer, uniform_numbers
from text import Response, TextPolicy


class ChatPolicy(TextPolicy):
    """A chat model that answers prompts in its own template.

    `model`, in its own dtype, samples and scores; `parameters()` are what is trained: those of the
    model that require a gradient, if they are float32; else float32 copies of its weights, which it
    is given anew whenever they may have changed. batch: how many responses are sampled, or scored
    without a gradient, at a time. Sampling and scoring raise ValueError on a prompt and response
    that together are longer than the model's context, where its reading would be wrong.

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
        self.model, self.chat, self.max_new_tokens, self.batch, self.end = (
            model,
            chat,
            max_new_tokens,
            batch,
            chat.end,
        )
        self.team, self.fsdp, device = Team(), fsdp, model.head.weight.device
        trained = [weight.dtype for weight in model.parameters() if weight.requires_grad]
        self.scorer: nn.Module = Scorer(model)
        if fsdp:
            self.scorer = sharded(
                Scorer(copy.deepcopy(model).cpu().float()), model.head.weight.dtype, device
            )
        elif any(dtype != torch.float32 for dtype in trained):
            self.scorer = MasterWeights(self.scorer)
        self.apart = fsdp or isinstance(self.scorer, MasterWeights)
        self.stale = False  # may what is trained differ from the model's weights?
        if self.team.size > 1 and trained and not fsdp:
            self.scorer = DistributedDataParallel(self.scorer, gradient_as_bucket_view=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> ChatPolicy:
        """The policy as it is, to be a reference: nothing of the copy is trained, so that it is the
        model alone."""
        self.refresh()
        model = copy.deepcopy(self.model, memo).requires_grad_(False)
        return ChatPolicy(model, self.chat, self.max_new_tokens, self.batch)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What is trained; of a reference, the model's weights."""
        trained = [weight for weight in self.scorer.parameters(recurse) if weight.requires_grad]
        return iter(trained or self.model.parameters(recurse))

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the model what is trained, if they are not the same tensors and may differ: after a
        gradient, or `load`."""
        if self.stale:
            for weight, master in zip(
                self.model.parameters(), self.scorer.parameters(), strict=True
            ):
                weight.copy_(full(master))
            self.stale = False

    def weights(self) -> list[Tensor]:
        """Copies of the parameters, whole, on the CPU, for `load`. All processes gather them."""
        return [full(weight).detach().to("cpu", copy=True) for weight in self.parameters()]

    @torch.no_grad()
    def load(self, weights: Sequence[Tensor]) -> None:
        """Take the parameters from what `weights` gave, or from parts such as `dno.Best` has."""
        for mine, given in zip(self.parameters(), weights, strict=True):
            local(mine).copy_(local(part_of(given, mine)))
        self.stale = self.apart

    def prompt_tokens(self, prompts: Iterable[str]) -> list[Tensor]:
        """What the transformer reads before it answers: the prompt in the chat template."""
        return [
            torch.tensor(self.chat.prompt(prompt), device=self.model.head.weight.device)
            for prompt in prompts
        ]

    def response(self, tokens: Sequence[int]) -> Response:
        """The response of these tokens; special tokens are not part of the text."""
        return Response(self.chat.decode(list(tokens)), tokens)

    def response_tokens(self, responses: Iterable[str]) -> list[Tensor]:
        """A response's own tokens if it was sampled, else its encoding and the end token."""
        rows = (
            y.tokens if isinstance(y, Response) else [*self.chat.encode(y), self.end]
            for y in responses
        )
        return [torch.tensor(row, device=self.model.head.weight.device) for row in rows]

    def _check_context(self, lengths: Iterable[int]) -> None:
        longest, context = max(lengths, default=0), self.model.config.context
        if context and longest > context:
            expected = f"expected at most the model's context, {context}"
            raise ValueError(f"prompt and response have {longest} tokens; {expected}")

    def log_prob(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """As of `TextPolicy`, float32. With a gradient all at once; else in batches of about equal
        lengths."""
        xs, ys = self.prompt_tokens(prompts), self.response_tokens(responses)
        self._check_context(len(x) + len(y) for x, y in zip(xs, ys, strict=True))
        if torch.is_grad_enabled():
            return self._score_to_train(prompts, xs, ys)
        self.refresh()
        order = sorted(range(len(xs)), key=lambda b: (len(xs[b]), prompts[b], len(ys[b])))
        parts = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]

        def score(part: list[int]) -> Tensor:
            return shared_log_prob(self.model, [xs[b] for b in part], [ys[b] for b in part]).cpu()

        mine, scores = [score(part) for part in self.team.mine(parts)], torch.empty(len(xs))
        for part, found in zip(parts, self.team.together(mine), strict=True):
            scores[part] = found
        return scores.to(self.model.head.weight.device)

    def _score_to_train(self, prompts: Sequence[str], xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        """Differentiable scores; of several processes, each differentiates those of its share of
        the prompts."""
        if not self.fsdp:  # which gathers what it needs by itself
            self.refresh()
        if self.team.size == 1:
            return self._watched(self.scorer(xs, ys))
        numbers = {x: number for number, x in enumerate(dict.fromkeys(prompts))}
        mine = [b for b, x in enumerate(prompts) if numbers[x] % self.team.size == self.team.rank]
        # A process without any takes part as well, with a response that does not count.
        scored = mine or [0]
        own = self._watched(self.scorer([xs[b] for b in scored], [ys[b] for b in scored]))
        place = torch.tensor(mine, dtype=torch.int64, device=own.device)
        return Scores.apply(own[: len(place)], place, len(xs), self.team.size)

    def _watched(self, scores: Tensor) -> Tensor:
        """The scores; once they have been given a gradient, a step may follow."""

        def note(gradient: Tensor) -> None:
            self.stale = self.apart

        scores.register_hook(note)
        return scores

    def sample(
        self,
        prompts: Sequence[str],
        k: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> tuple[list[list[Response]], Tensor]:
        """As of `TextPolicy`, in batches of prompts of about equal lengths; what is drawn does not
        depend on the batches, but for rounding. The log-probabilities are as precise as the
        transformer's dtype."""
        u = uniform_numbers(len(prompts), k, self.max_new_tokens, seed)
        return self._in_batches(prompts, u, temperature, top_p)

    @torch.no_grad()
    def survey(self, prompts: Sequence[str], k: int, seed: int) -> list[list[Response]]:
        """k samples of each prompt, at temperature 1."""
        return self._in_batches(
            prompts, uniform_numbers(len(prompts), k, self.max_new_tokens, seed)
        )[0]

    def _in_batches(
        self, prompts: Sequence[str], u: Tensor, temperature: float = 1.0, top_p: float = 1.0
    ) -> tuple[list[list[Response]], Tensor]:
        self.refresh()
        lengths = [len(self.chat.prompt(x)) for x in prompts]
        self._check_context(length + u.shape[-1] for length in lengths)
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        several = max(1, self.batch // u.shape[1])
        parts = [order[start : start + several] for start in range(0, len(order), several)]
        mine = []
        quiet = True if self.team.rank else None
        for part in tqdm(
            self.team.mine(parts), "sampling", unit="batch", disable=quiet, leave=False
        ):
            answers, scores = self._answer(
                {self.model: 1.0}, [prompts[x] for x in part], u[part], temperature, top_p
            )
            mine.append((answers, scores.float().cpu()))
        responses: list[list[Response]] = [[]] * len(prompts)
        log_probs = torch.empty(u.shape[:2])
        for part, (answers, scores) in zip(parts, self.team.together(mine), strict=True):
            log_probs[part] = scores
            for x, ys in zip(part, answers, strict=True):
                responses[x] = ys
        return responses, log_probs
