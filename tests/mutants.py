"""Does every formula have a test that fails when it is broken? One-line mutants of the modules, one
test run each.

    python tests/mutants.py [--jobs 2] [--files dno.py judge/ledger.py ...]          (about 40 minutes)

Prints which test caught each mutant, exits 1 if one survives. Not part of the test suite: for after
a change of formula."""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SLOW = [
    "--deselect",
    "tests/test_train.py",
    "--deselect",
    "tests/test_readme.py",
    "--deselect",
    "tests/test_train_text.py",
    "--deselect",
    "tests/test_train_judged.py",
]  # and not about formulas
MUTANTS = [  # (file, text that occurs in it once, what it becomes)
    ("dno.py", "return torch.bmm(pi.unsqueeze(1), P.mT)", "return torch.bmm(pi.unsqueeze(1), P)"),
    (
        "dno.py",
        "return prompt_mean((2 * r.amax(-1) - 1).clamp(min=0), rho)",
        "return prompt_mean(r.amax(-1) - 0.5, rho)",
    ),
    (
        "dno.py",
        "return prompt_mean((2 * r.amax(-1) - 1).clamp(min=0), rho)",
        "return prompt_mean(1 - 2 * r.amin(-1), rho)",
    ),
    (
        "dno.py",
        "return prompt_mean((2 * r.amax(-1) - 1).clamp(min=0), rho)",
        "return prompt_mean(2 * r.amax(-1) - 1)",
    ),
    ("dno.py", "return values.mean(-1)", "return values.sum(-1)"),
    (
        "dno.py",
        "(check_policy(pi, r.shape) * r).sum(-1), rho)",
        "(check_policy(pi, r.shape) * r).mean(-1), rho)",
    ),
    ("dno.py", "if not residual.max() <= SOLVE_TOLERANCE:", "if not residual.max() < 1:"),
    ("dno.py", "if tau == eta:", "if tau > eta:"),
    ("dno.py", "isinstance(value, Integral) and value >= least", "value >= least"),
    ("dno.py", "FLOAT32.tiny <= value <= 1 / FLOAT32.tiny", "0 < value < 1e300"),
    ("dno.py", "A_ub=np.hstack([-table.T,", "A_ub=np.hstack([-table,"),
    (
        "dno.py",
        "return -z * F.logsigmoid(margin) - (1 - z) * F.logsigmoid(-margin)",
        "return -z * F.logsigmoid(margin)",
    ),
    ("dno.py", "(1 - z) * F.logsigmoid(-margin)", "(1 - z) * F.logsigmoid(margin)"),
    ("dno.py", "weight = (weight + weight.mT) /", "weight = weight /"),
    ("dno.py", "curvature = weight * z_hat * (1 - z_hat)", "curvature = weight * z_hat"),
    (
        "dno.py",
        "return mu1.unsqueeze(-1) * mu2.unsqueeze(-2)",
        "return mu1.unsqueeze(-1) * mu1.unsqueeze(-2)",
    ),
    (
        "dno.py",
        "return (log_pi + r / eta).log_softmax(-1)",
        "return (log_pi + r * eta).log_softmax(-1)",
    ),
    (
        "dno.py",
        "return (log_pi + r / eta).log_softmax(-1)",
        "return (log_pi - r / eta).log_softmax(-1)",
    ),
    ("dno.py", "return (log_pi + r / eta).log_softmax(-1)", "return (r / eta).log_softmax(-1)"),
    ("dno.py", "return (log_pi + r / eta).log_softmax(-1)", "return log_pi + r / eta"),
    ("dno.py", "return eta * (log_pi - log_pi_t)", "return (log_pi - log_pi_t) / eta"),
    ("dno.py", "return eta * (log_pi - log_pi_t)", "return eta * log_pi"),
    ("dno.py", "z = torch.sigmoid(r1 - r2).detach()", "z = torch.sigmoid(r1 - r2)"),
    ("dno.py", "z = torch.sigmoid(r1 - r2).detach()", "z = torch.sigmoid(r2 - r1).detach()"),
    ("dno.py", "z = torch.sigmoid(r1 - r2).detach()", "z = (r1 > r2).to(r1)"),
    (
        "dno.py",
        "return cross_entropy(z, eta * (log_ratio1 - log_ratio2))",
        "return cross_entropy(z, (log_ratio1 - log_ratio2) / eta)",
    ),
    (
        "dno.py",
        "return cross_entropy(z, eta * (log_ratio1 - log_ratio2))",
        "return cross_entropy(z, eta * (log_ratio1 + log_ratio2))",
    ),
    (
        "dno.py",
        "return -F.logsigmoid(eta * (log_ratio_pos - log_ratio_neg))",
        "return -F.logsigmoid(log_ratio_pos - log_ratio_neg)",
    ),
    (
        "dno.py",
        "return -F.logsigmoid(eta * (log_ratio_pos - log_ratio_neg))",
        "return F.logsigmoid(eta * (log_ratio_neg - log_ratio_pos))",
    ),
    (
        "dno.py",
        "torch.where(p > 0, p * (log_p - log_q), 0.0)",
        "torch.where(p > 0, p * (log_q - log_p), 0.0)",
    ),
    ("dno.py", "return (p - q).abs().sum(-1) / 2", "return (p - q).abs().sum(-1)"),
    (
        "dno.py",
        "return prompt_mean(variances + (mean_p - mean_q).squeeze(-1) ** 2, rho)",
        "return prompt_mean(variances, rho)",
    ),
    (
        "dno.py",
        "_mean_square_difference(d, pi_star, pi, rho) /",
        "_mean_square_difference(d, pi_star, pi_star, rho) /",
    ),
    ("dno.py", '"target": lambda pi_t, pi_star: pi_star', '"target": lambda pi_t, pi_star: pi_t'),
    (
        "dno.py",
        '"uniform": lambda pi_t, pi_star: torch.full_like(pi_t, 1 / pi_t.shape[-1])',
        '"uniform": lambda pi_t, pi_star: pi_t',
    ),
    ("dno.py", "(x, draw(mu1), draw(mu2))", "(x, draw(mu1), draw(mu1))"),
    (
        "dno.py",
        'torch.ones(X) if rho is None else check_policy(rho, mu1.shape[:1], "rho").cpu()',
        "torch.ones(X)",
    ),
    ("dno.py", "x + u, right=True) - x * Y", "x + u) - x * Y + 1"),
    (
        "dno.py",
        "log_ratio = policy.log_probs() - log_reference",
        "log_ratio = policy.log_probs() - policy.log_probs().detach()",
    ),
    ("dno.py", "log_ratio = policy.log_probs() - log_reference", "log_ratio = policy.log_probs()"),
    ("dno.py", "r1, r2 = r_t[x, y1], r_t[x, y2]", "r1, r2 = r_t[x, y2], r_t[x, y1]"),
    ("dno.py", "if settings.tolerance and excess < settings.tolerance:", "if excess < 0:"),
    ("dno.py", "settings.learning_rate * (1 - step / settings.steps)", "settings.learning_rate"),
    ("dno.py", "settings.steps)\n        optimizer.zero_grad()", "settings.steps)"),
    (
        "dno.py",
        "r_t = expected_win_rate(P, pi_t)  # Alg. 1, line 3",
        "r_t = 1 - expected_win_rate(P, pi_t)  # Alg. 1, line 3",
    ),
    (
        "dno.py",
        "fit = regress(policy, log_pi_t, r_t, D_t, eta, optimizer, settings)  # Alg. 1",
        "fit = regress(policy, log_pi_ref, r_t, D_t, eta, optimizer, settings)  # Alg. 1",
    ),
    ("dno.py", "fit = regress(policy, log_mixture, r_t,", "fit = regress(policy, log_pi_t, r_t,"),
    (
        "dno.py",
        "(1 - tau / eta) * log_pi + (tau / eta) * log_pi_ref",
        "(1 - tau) * log_pi + tau * log_pi_ref",
    ),
    (
        "dno.py",
        "(1 - tau / eta) * log_pi + (tau / eta) * log_pi_ref",
        "(tau / eta) * log_pi + (1 - tau / eta) * log_pi_ref",
    ),
    (
        "dno.py",
        "costs = kl_divergence(pi_prime.log(), log_ref) - kl_divergence(pi.log(), log_ref)",
        "costs = -kl_divergence(pi.log(), log_ref)",
    ),
    ("dno.py", "(2 * tau * (best + kl_divergence(pi.log(), log_ref)) - 1)", "(2 * tau * best - 1)"),
    (
        "dno.py",
        "best = (log_ref + expected_win_rate(P, pi) / tau)",
        "best = (log_ref + expected_win_rate(P, pi))",
    ),
    (
        "dno.py",
        "return u - log_ref - _against(A, u.softmax(-1)) / tau",
        "return u - log_ref + _against(A, u.softmax(-1)) / tau",
    ),
    ("dno.py", 'pi_t if option == "I" else log_mixture.softmax(-1)', "pi_t"),
    (
        "dno.py",
        "t % move_reference_every == 0:\n            log_pi_ref",
        "t % move_reference_every == 1:\n            log_pi_ref",
    ),
    (
        "dno.py",
        "fit_scores(z, pair_weights(r, mu1, mu2)) / eta",
        "fit_scores(z, pair_weights(r, None, None)) / eta",
    ),
    ("dno.py", "m + R(m.softmax(-1)) / eta,  # Eq. (7)", "m + r / eta,  # Eq. (7)"),
    ("dno.py", "m + (2 * r - r0) / eta", "m + (r + r0) / eta"),
    (
        "dno.py",
        "m + R((m + r / eta).softmax(-1)) / eta",
        "m + r / eta + R((m + r / eta).softmax(-1)) / eta",
    ),
    (
        "dno.py",
        "pi, g = mixture.softmax(-1), (r - 0.5) / eta",
        "pi, g = mixture.softmax(-1), r / eta",
    ),
    ("dno.py", "rewards[max(t - 1, 0)]", "rewards[max(t - 2, 0)]"),
    ("dno.py", "if (t + 1) % every == 0:", "if t % every == 0:"),
    ("dno.py", "gap_of_rewards(rewards[1:], rho)", "gap_of_rewards(rewards[:-1], rho)"),
    ("dno.py", "policies[:-1].mean(0), policies[-1]", "policies.mean(0), policies[-1]"),
    (
        "dno.py",
        "pi_bar = pi_bar + (pi_t - pi_bar) / t\n        yield",
        "pi_bar = pi_bar + (pi_t - pi_bar) / (t + 1)\n        yield",
    ),
    (
        "model.py",
        "logits[:, self.prompts.shape[1] - 1 :, : self.V]",
        "logits[:, self.prompts.shape[1] - 1 :]",
    ),
    ("model.py", "mask[nodes] = mask[parents]", "mask[nodes] = mask[parents - 1]"),
    ("model.py", "positions=self.mask.sum(-1) - 1", "positions=None"),
    (
        "model.py",
        "start, end = (torch.tensor([len(part) for part in parts]",
        "start, end = (torch.tensor([len(part) - 1 for part in parts]",
    ),
    (
        "model.py",
        "read.nonzero()[:, 0], log_probs)",
        "read.nonzero()[:, 0], log_probs) / read.sum(-1)",
    ),
    ("model.py", "(place >= start) & (place < end)", "(place >= start) & (place < end - 1)"),
    ("model.py", "(place >= start) & (place < end)", "(place > start) & (place < end)"),
    (
        "model.py",
        "going * log_probs.gather",
        "going * (log_probs / temperature).log_softmax(-1).gather",
    ),
    ("model.py", "tokens[:, 1:][read]", "tokens[:, :-1][read]"),
    ("model.py", "seen[:, None, :T] & causal", "causal"),
    (
        "model.py",
        "(T - empty).repeat_interleave(k)",
        "torch.full_like(empty, T).repeat_interleave(k)",
    ),
    ("model.py", "count[rows] += going", "count[rows] += 1"),
    ("model.py", "top * (held - top < top_p)", "top * (held < top_p)"),
    ("model.py", "(-pairs[pair], pair)", "(pairs[pair], pair)"),
    ("model.py", "pairs[pair] += count", "pairs[pair] += 1"),
    ("model.py", "logsumexp(0) - math.log(len(members))", "mean(0)"),
    ("model.py", "seed * len(self.states) + t)", "seed)"),
    (
        "dno.py",
        "D.batches(settings.prompts_per_step, generator)",
        "D.batches(settings.prompts_per_step, torch.Generator().manual_seed(0))",
    ),
    (
        "dno.py",
        'return wins.masked_fill(torch.eye(wins.shape[-1], dtype=torch.bool), float("nan")).nanmean(-1)',
        "return wins.nanmean(-1)",
    ),
    ("dno.py", '.masked_fill(wins.isnan(), float("nan")).triu(1)', ".triu(1)"),
    ("dno.py", 'best = r.nan_to_num(float("-inf")).masked_fill', "best = r.masked_fill"),
    (
        "dno.py",
        "return (known.unsqueeze(-1) & known.unsqueeze(-2)).triu(1)",
        "return (known.unsqueeze(-1) | known.unsqueeze(-2)).triu(1)",
    ),
    ("dno.py", 'if settings.judgments == "scores":', 'if settings.judgments == "points":'),
    ("dno.py", "won + (1 - won).mT.tril(-1)", "won + won.mT.tril(-1)"),
    (
        "dno.py",
        "return number, torch.Generator().manual_seed(number + 1)",
        "return number, torch.Generator().manual_seed(number)",
    ),
    ("dno.py", "(lead >= margin - ROUNDING)", "(lead >= margin)"),
    ("dno.py", "(lead > ROUNDING) & usable.unsqueeze(-1)", "(lead > ROUNDING)"),
    ("dno.py", "lead[:, -1] = 2.0", "lead[:, -1] = 1.0"),
    ("dno.py", "(scores >= 5) & usable", "(scores >= 4) & usable"),
    ("dno.py", "return r.masked_fill(repeats, 0.0), ~repeats", "return r, ~repeats"),
    ("dno.py", "return len(set(runs)) < len(runs)", "return len(set(runs)) + 1 < len(runs)"),
    ("dno.py", "share * decay**age", "share"),
    (
        "dno.py",
        'replace(part, log_reference=torch.full_like(part.log_reference, float("nan")))',
        "part",
    ),
    (
        "dno.py",
        "if best is not None and score <= best.score:",
        "if best is not None and score < best.score:",
    ),
    (
        "dno.py",
        "best, earlier = (after.best, after.earlier) if after else (validated(policy, 1, validate), [])  # Alg. 2",
        "best, earlier = (after.best, after.earlier) if after else (None, [])  # Alg. 2",
    ),
    (
        "dno.py",
        "log_ratio, r = log_pi - piece.log_reference",
        "log_ratio, r = log_pi + 0 * piece.log_reference",
    ),
    ("dno.py", "rate * (1 - step / len(batches))", "rate"),
    ("dno.py", "place // prompts == batch", "place % len(groups) == batch"),
    (
        "dno.py",
        'if option == "II":  # what was recorded',
        'if option == "III":  # what was recorded',
    ),
    (
        "dno.py",
        "return replace(D, log_reference=geometric_mixture(D.log_reference, log_pi_ref, tau, eta))",
        "return replace(D, log_reference=geometric_mixture(D.log_reference, log_pi_ref, tau / 2, eta))",
    ),
    ("oracle.py", 'random.Random(f"{self.seed} {x} {order}").shuffle(order)', "pass"),
    (
        "oracle.py",
        "P[x, y, z], P[x, z, y] = (there + 1 - back) / 2, (back + 1 - there) / 2",
        "P[x, y, z], P[x, z, y] = (there + back) / 2, 1 - (there + back) / 2",
    ),
    ("oracle.py", "(first > second) - (first < second)", "(first > second)"),
    ("oracle.py", "there = back = math.nan", "there = back = 0.5"),
    (
        "oracle.py",
        "points[x, y] = math.nan if score is None else float(score)",
        "points[x, y] = 0.0 if score is None else float(score)",
    ),
    ("judge/replies.py", "if len(graded) != 1:", "if len(graded) < 1:"),
    ("judge/questions.py", "return text if len(text) <= most else", "return text if True else"),
    ("oracle.py", "back - 0.5\n                ) > 0", "back - 0.5\n                ) < 0"),
    (
        "judge/replies.py",
        'if dig(choice, "finish_reason") != "length" else None',
        "if choice else None",
    ),
    ("judge/ledger.py", 'if self.spent() + row["bound"] > limit:', "if self.spent() > limit:"),
    ("judge/ledger.py", 'return "busy"', "pass"),
    (
        "judge/ledger.py",
        'self._spend(columns["dollars"] - bound)',
        'self._spend(columns["dollars"])',
    ),
    ("judge/ledger.py", 'FROM spending WHERE run = ?", (self.run,)', 'FROM spending"'),
    (
        "judge/endpoint.py",
        "result = self.connection.hidden(answer.result)",
        "result = answer.result",
    ),
    ("judge/ledger.py", "range(0, len(keys), 500)", "range(0, min(len(keys), 500), 500)"),
    ("judge/client.py", '"follow_redirects": False', '"follow_redirects": True'),
    ("judge/ledger.py", 'if found != "ok":', "if False:"),
    ("judge/endpoint.py", "if failed > self.max_failed * total:", "if failed > total:"),
    (
        "judge/client.py",
        "again = status in (408, 409, 425, 429) or status >= 500",
        "again = status >= 400",
    ),
    (
        "judge/endpoint.py",
        '"temperature": self.temperature,\n            "max_tokens": question.max_tokens,',
        '"max_tokens": 0,',
    ),
    ("judge/statistics.py", "G / (G - 1) * (sums**2).sum()", "(sums**2).sum()"),
    (
        "judge/statistics.py",
        "return (observed - chance) / (1 - chance) if chance < 1",
        "return observed if chance < 1",
    ),
    ("judge/statistics.py", "cyclic += wins == [1, 1, 1]", "cyclic += len(set(wins)) == 3"),
    ("model.py", "positions = torch.arange(past, past + T,", "positions = torch.arange(0, T,"),
    (
        "model.py",
        "dtype=torch.bool, device=tokens.device).tril(past)",
        "dtype=torch.bool, device=tokens.device).tril()",
    ),
    ("model.py", "F.rms_norm(x, x.shape[-1:], self.weight, self.eps)", "x * self.weight"),
    ("model.py", "return ctx.size * gradient[ctx.place]", "return gradient[ctx.place]"),
    ("model.py", "dist.all_reduce(scores)", "pass"),
    ("model.py", "own[: len(place)], place", "own, torch.zeros(len(own), dtype=torch.int64)"),
    ("model.py", "reduce_dtype=torch.float32)", "reduce_dtype=torch.bfloat16)"),
    ("model.py", "return items[self.rank :: self.size]", "return items"),
    ("model.py", "value = value.full_tensor() if", "value = value.to_local() if"),
    (
        "model.py",
        "def note(gradient: Tensor) -> None:\n            self.stale = self.apart",
        "def note(gradient: Tensor) -> None:\n            pass",
    ),
    ("model.py", "return gradient.float(), None", "return gradient.float() / 2, None"),
    (
        "model.py",
        "requires_grad_(False)\n        return ChatPolicy",
        "requires_grad_(True)\n        return ChatPolicy",
    ),
    ("model.py", "model.requires_grad_(False)\n    generator", "generator"),
    (
        "model.py",
        "(self.weight.float() + 2 * self.B @ self.A)",
        "(self.weight.float() + self.B @ self.A)",
    ),
    ("model.py", "torch.zeros(linear.out_features, rank,", "torch.ones(linear.out_features, rank,"),
    ("model.py", "scatter_add_(-1, place, grad * there)", "scatter_add_(-1, place, grad)"),
    ("model.py", "scores = scores + mask.unsqueeze(-3)", "pass"),
    ("model.py", "rows, p, u = rows[more], p[more], u[more]", "rows, p = rows[more], p[more]"),
    ("train.py", "for error in self.team.together([met]):", "for error in [met]:"),
    (
        "model.py",
        "[a * cos - b * sin, b * cos + a * sin]",
        "[a * cos + b * sin, b * cos + a * sin]",
    ),
]


def outcome(mutant: tuple[str, str, str], project: Path) -> str:
    """Name of the first test that fails on a copy of the project with the mutation, or "" if none
    does."""
    file, old, new = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(project, Path(folder) / "project")
        text = (copy / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{file} has {text.count(old)} times {old!r}; expected it once")
        (copy / file).write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *SLOW]
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        found = re.search(r"^(?:FAILED|ERROR) tests/(.*?)(?: - |$)", run.stdout, re.M)
        return found[1] if found else "" if run.returncode == 0 else run.stdout[-300:]


def main() -> int:
    """Try all mutants; 1 if any survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    files = sorted({file for file, _, _ in MUTANTS})
    parser.add_argument("--files", nargs="+", choices=files, default=files)
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if mutant[0] in options.files]
    survivors, ignored = 0, shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        project = shutil.copytree(
            ROOT, Path(folder) / "project", ignore=ignored
        )  # as it was when this started
        outcomes = pool.map(lambda mutant: outcome(mutant, project), mutants)
        for number, (mutant, test) in enumerate(zip(mutants, outcomes, strict=True), 1):
            survivors += not test
            file, old, new = mutant
            print(
                f"{number:2d} {file}: {old.strip()}\n     -> {new.strip()}\n     {test or 'SURVIVED'}",
                flush=True,
            )
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
