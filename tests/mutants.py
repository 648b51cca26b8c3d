"""Does every formula have a test that fails when it is broken?

One-line mutants of the modules, one run of the tests about its file each.

    python tests/mutants.py [--jobs 2] [--files dno.py judge ...]          (about 40 minutes)

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
SECTIONS_2_AND_3 = "paper/section_2_preferences paper/section_3 paper/solvers"
JUDGES = "judge experiments/agreement"
TESTS = {  # about a file, or all files of a folder: folders of tests, or how their names start
    "dno.py": f"{SECTIONS_2_AND_3} paper",  # the likeliest first
    "checks.py": "paper",
    "pairs.py": "paper/section_4 paper",
    "regularized.py": "paper/appendix_a paper/sampled paper",
    "fits.py": "paper/section_2 paper/solvers",
    "relatives.py": "paper/relatives paper/solvers",
    "solvers.py": "paper/solvers paper/relatives paper/section_3_theorem_1 paper",
    "model.py": "model paper/section_3_algorithm_1 experiments/llm",
    "text.py": "model/text_policy model/mixtures model/tokenizer",
    "oracle.py": f"judge/oracle judge/language {JUDGES} paper/section_4",
    "judge": JUDGES,
    "chat": "model experiments/llm experiments/team",
}
MUTANTS = {  # of a file: (text that occurs in it once, what it becomes)
    "dno.py": [
        ("torch.bmm(pi.unsqueeze(1), P.mT)", "torch.bmm(pi.unsqueeze(1), P)"),
        ("(2 * r.amax(-1) - 1).clamp(min=0), rho", "r.amax(-1) - 0.5, rho"),
        ("(2 * r.amax(-1) - 1).clamp(min=0), rho", "1 - 2 * r.amin(-1), rho"),
        ("(2 * r.amax(-1) - 1).clamp(min=0), rho", "2 * r.amax(-1) - 1"),
        ("return values.mean(-1)", "return values.sum(-1)"),
        ("(check_policy(pi, r.shape) * r).sum(-1)", "(check_policy(pi, r.shape) * r).mean(-1)"),
        ("A_ub=np.hstack([-table.T,", "A_ub=np.hstack([-table,"),
        ("F.logsigmoid(logit) - (1 - z) * F.logsigmoid(-logit)", "F.logsigmoid(logit)"),
        ("- (1 - z) * F.logsigmoid(-logit)\n", "- (1 - z) * F.logsigmoid(logit)\n"),
        ("(log_pi + r / eta).log_softmax(-1)", "(log_pi + r * eta).log_softmax(-1)"),
        ("(log_pi + r / eta).log_softmax(-1)", "(log_pi - r / eta).log_softmax(-1)"),
        ("(log_pi + r / eta).log_softmax(-1)", "(r / eta).log_softmax(-1)"),
        ("(log_pi + r / eta).log_softmax(-1)", "log_pi + r / eta"),
        ("return eta * (log_pi - log_pi_t)", "return (log_pi - log_pi_t) / eta"),
        ("return eta * (log_pi - log_pi_t)", "return eta * log_pi"),
        ("z = torch.sigmoid(r1 - r2).detach()", "z = torch.sigmoid(r1 - r2)"),
        ("z = torch.sigmoid(r1 - r2).detach()", "z = torch.sigmoid(r2 - r1).detach()"),
        ("z = torch.sigmoid(r1 - r2).detach()", "z = (r1 > r2).to(r1)"),
        ("eta * (log_ratio1 - log_ratio2)", "(log_ratio1 - log_ratio2) / eta"),
        ("eta * (log_ratio1 - log_ratio2)", "eta * (log_ratio1 + log_ratio2)"),
        ("eta * (log_ratio_pos - log_ratio_neg)", "log_ratio_pos - log_ratio_neg"),
        (
            "-F.logsigmoid(eta * (log_ratio_pos - log_ratio_neg))",
            "F.logsigmoid(eta * (log_ratio_neg - log_ratio_pos))",
        ),
        ("p * (log_p - log_q)", "p * (log_q - log_p)"),
        ("(p - q).abs().sum(-1) / 2", "(p - q).abs().sum(-1)"),
        ('"target": lambda pi_t, pi_star: pi_star', '"target": lambda pi_t, pi_star: pi_t'),
        ("torch.full_like(pi_t, 1 / pi_t.shape[-1])", "pi_t"),
        ("draw(mu2)", "draw(mu1)"),
        (' if rho is None else check_policy(rho, mu1.shape[:1], "rho").cpu()', ""),
        ("x + u, right=True) - x * Y", "x + u) - x * Y + 1"),
        ("log_probs() - log_reference", "log_probs() - policy.log_probs().detach()"),
        ("policy.log_probs() - log_reference", "policy.log_probs()"),
        ("r1, r2 = r_t[x, y1], r_t[x, y2]", "r1, r2 = r_t[x, y2], r_t[x, y1]"),
        ("if settings.tolerance and excess < settings.tolerance:", "if excess < 0:"),
        ("settings.learning_rate * (1 - step", "settings.learning_rate * (1 - 0 * step"),
        ("optimizer.zero_grad()\n        loss.backward()", "loss.backward()"),
        ("r_t = expected_win_rate(", "r_t = 1 - expected_win_rate("),
        ("regress(policy, log_pi_t,", "regress(policy, 0 * log_pi_t,"),
        ("- pi_bar) / t", "- pi_bar) / (t + 1)"),
        (
            "D.batches(settings.prompts_per_step, generator)",
            "D.batches(settings.prompts_per_step, torch.Generator())",
        ),
        ("(itself, math.nan).nanmean(-1)", "(itself, 0.5).nanmean(-1)"),
        (".masked_fill(preferences.isnan(), math.nan)", ""),
        ('settings.judgments == "scores"', 'settings.judgments == "points"'),
        ("(1 - won).mT.tril(-1)", "won.mT.tril(-1)"),
        ("manual_seed(number + 1)", "manual_seed(number)"),
        ("score <= best.score", "score < best.score"),
        ("validated(policy, 1, validate)", "None"),
        ("log_pi - piece.log_reference", "log_pi + 0 * piece.log_reference"),
        ("rate * (1 - step / len(batches))", "rate"),
    ],
    "checks.py": [
        ("isinstance(value, Integral) and ", ""),
        ("FLOAT32.tiny <= value <= 1 / FLOAT32.tiny", "0 < value < 1e300"),
    ],
    "pairs.py": [
        ('r.nan_to_num(float("-inf"))', "r"),
        ("known.unsqueeze(-1) & known", "known.unsqueeze(-1) | known"),
        ("lead >= margin - ROUNDING", "lead >= margin"),
        ("(enough & may_be_positive.unsqueeze(-1))", "enough"),
        ("lead[:, -1] = 2.0", "lead[:, -1] = 1.0"),
        ("scores >= 5", "scores >= 4"),
        ("return r.masked_fill(repeats, 0.0), ~repeats", "return r, ~repeats"),
        ("len(set(runs)) < len(runs)", "len(set(runs)) + 1 < len(runs)"),
        ("share * decay**age", "share"),
        ('torch.full_like(part.log_reference, float("nan"))', "part.log_reference"),
        ("place // prompts", "place % len(groups)"),
    ],
    "regularized.py": [
        ("if tau == eta:", "if tau > eta:"),
        ("regress(policy, log_mixture,", "regress(policy, log_pi_t,"),
        (
            "(1 - tau / eta) * log_pi + (tau / eta) * log_pi_ref",
            "(1 - tau) * log_pi + tau * log_pi_ref",
        ),
        (
            "(1 - tau / eta) * log_pi + (tau / eta) * log_pi_ref",
            "(tau / eta) * log_pi + (1 - tau / eta) * log_pi_ref",
        ),
        ("costs = kl_divergence(pi_prime.log(), log_ref) - ", "costs = -"),
        ("(best + kl_divergence(pi.log(), log_ref))", "best"),
        ("expected_win_rate(P, pi) / tau", "expected_win_rate(P, pi)"),
        (' if option == "I" else log_mixture.softmax(-1)', ""),
        ("== 0:  # differs\n            log_pi_ref", "== 1:  # differs\n            log_pi_ref"),
        ('if option == "II":', 'if option == "III":'),
        (
            "geometric_mixture(D.log_reference, log_pi_ref, tau, eta)",
            "geometric_mixture(D.log_reference, log_pi_ref, tau / 2, eta)",
        ),
    ],
    "fits.py": [
        ("residual.max() <= SOLVE_TOLERANCE", "residual.max() < 1"),
        ("weight + weight.mT", "weight"),
        ("weight * z_hat * (1 - z_hat)", "weight * z_hat"),
        ("second.unsqueeze(-2)", "first.unsqueeze(-2)"),
    ],
    "relatives.py": [
        ("u - log_reference - win_rate_against", "u - log_reference + win_rate_against"),
        (", mu1, mu2)) / ", ", None, None)) / "),
        ("now.step(now.against(now.log_mixture))", "now.step(now.r_t)"),
        ("return now.step(2 * now.r_t - now.r_before)", "return now.step(now.r_t + now.r_before)"),
        ("(now.r_before if now.t > 1 else 0)", "now.r_before"),
        ("now.step(now.against(now.step(now.r_t)))", "now.step(now.against(now.log_mixture))"),
        ("(now.r_t - 0.5) / now.eta", "now.r_t / now.eta"),
        ("total = now.eta + now.tau", "total = now.eta"),
        ("(now.r_t + now.r_before) / (2 * now.eta)", "now.r_t / now.eta"),
        ("two_policies(now) + now.r_t / now.eta", "now.step(now.r_t)"),
        ("(now.log_pi + now.log_before) / 2", "now.log_pi"),
        ("lambda pi: 2 * pi / ref", "lambda pi: pi / ref"),
        ("lambda pi: -ref / pi, lambda", "lambda pi: ref / pi, lambda"),
        ("now.step(-now.tau * exponents", "now.step(now.tau * exponents"),
        ("now.P.amin(-1)", "now.P.mean(-1)"),
        ("(1 - change) * (odds - explained)", "(1 - change) * odds"),
        ("strength / now.t**0.5", "strength"),
        ("r - (log_pi.exp() * r).sum(-1, keepdim=True)", "r - r.mean(-1, keepdim=True)"),
        ("+ change).clamp(min=0)", "+ change)"),
        ('added(now.memory, "regrets", last) + last', 'added(now.memory, "regrets", last)'),
        ("total + last if predictive else total", "total"),
        ('now.memory.get("rewards", 0) + now.r_t', "now.r_t"),
    ],
    "solvers.py": [
        (" + (mean_p - mean_q).squeeze(-1) ** 2", ""),
        ("(d, pi_star, pi, rho)", "(d, pi_star, pi_star, rho)"),
        ("rewards[-2] if t > 1 else", "rewards[-3] if t > 2 else"),
        ("if t % every == 0", "if (t - 1) % every == 0"),
        ("gap_of_rewards(rewards[1:], rho)", "gap_of_rewards(rewards[:-1], rho)"),
        ("(weight * policies[:-1]).sum(0)", "(weight * policies[1:]).sum(0)"),
        ("weight = count if linear else", "weight = count if not linear else"),
        ("math.sqrt(3 * eta / tau)", "math.sqrt(eta / tau)"),
        ("log_before, log_pi = log_pi,", "log_before, log_pi = log_before,"),
        ("pi.unsqueeze(-1) * (P - 0.5)", "P - 0.5"),
    ],
    "model.py": [
        (
            "logits[:, self.prompts.shape[1] - 1 :, : self.V]",
            "logits[:, self.prompts.shape[1] - 1 :]",
        ),
        ("mask[nodes] = mask[parents]", "mask[nodes] = mask[parents - 1]"),
        ("positions=self.mask.sum(-1) - 1", "positions=None"),
        (
            "torch.tensor([len(part) for part in parts]",
            "torch.tensor([len(part) - 1 for part in parts]",
        ),
        ("read.nonzero()[:, 0], log_probs)", "read.nonzero()[:, 0], log_probs) / read.sum(-1)"),
        ("(place >= start) & (place < end)", "(place >= start) & (place < end - 1)"),
        ("(place >= start) & (place < end)", "(place > start) & (place < end)"),
        ("going * log_probs.gather", "going * (log_probs / temperature).log_softmax(-1).gather"),
        ("tokens[:, 1:][read]", "tokens[:, :-1][read]"),
        ("seen[:, None] & causal", "causal"),
        ("(T - empty).repeat_interleave(k)", "torch.full_like(empty, T).repeat_interleave(k)"),
        ("count[rows] += going", "count[rows] += 1"),
        ("held - top < top_p", "held < top_p"),
        ("torch.arange(past, past + T,", "torch.arange(0, T,"),
        (".tril(past)", ".tril()"),
        ("F.rms_norm(x, x.shape[-1:], self.weight, self.eps)", "x * self.weight"),
        ("scores = scores + mask.unsqueeze(-3)", "pass"),
        ("rows, p, u = rows[more], p[more], u[more]", "rows, p = rows[more], p[more]"),
        ("[a * cos - b * sin,", "[a * cos + b * sin,"),
    ],
    "text.py": [
        ("(-pairs[pair], pair)", "(pairs[pair], pair)"),
        ("pairs[pair] += count", "pairs[pair] += 1"),
        ("logsumexp(0) - math.log(len(members))", "mean(0)"),
        ("seed * len(self.states) + t", "seed"),
    ],
    "oracle.py": [
        ("math.nan if (x, y) in failed else 0.5", "0.5"),
        ("self.deterministic = self.form.deterministic", "self.deterministic = False"),
    ],
    "judge/replies.py": [
        ("if len(graded) != 1:", "if len(graded) < 1:"),
        ('if dig(choice, "finish_reason") != "length" else', "if choice else"),
    ],
    "judge/questions.py": [
        ("if len(text) <= most else", "if True else"),
        ('random.Random(f"{self.seed} {x} {order}").shuffle(order)', "pass"),
        (
            "(there + 1 - back) / 2, (back + 1 - there) / 2",
            "(there + back) / 2, 1 - (there + back) / 2",
        ),
        ("(first > second) - (first < second)", "(first > second)"),
        ("there = back = math.nan", "there = back = 0.5"),
        ("= math.nan if score is None else", "= 0.0 if score is None else"),
        ("+= (there - 0.5) * (", "+= -(there - 0.5) * ("),
    ],
    "judge/ledger.py": [
        ('self.spent() + row["bound"] > limit', "self.spent() > limit"),
        ('return "busy"', "pass"),
        ('columns["dollars"] - bound', 'columns["dollars"]'),
        ('FROM spending WHERE run = ?", (self.run,)', 'FROM spending"'),
        ("range(0, len(keys), 500)", "range(0, min(len(keys), 500), 500)"),
        ('if found != "ok":', "if False:"),
    ],
    "judge/client.py": [
        ('"follow_redirects": False', '"follow_redirects": True'),
        ("status in (408, 409, 425, 429) or status >= 500", "status >= 400"),
        ("parsed=self.hidden(json.dumps(answer.result))", "parsed=json.dumps(answer.result)"),
        ("text=self.hidden(text)", "text=text"),
    ],
    "judge/endpoint.py": [
        ("used + self.attempts:", "self.attempts:"),
        ("failed > self.max_failed * total", "failed > total"),
        (
            '"number": question.number',
            '"number": question.number, "temperature": 0, "max_tokens": 0',
        ),
    ],
    "judge/statistics.py": [
        ("G / (G - 1) * (sums**2)", "(sums**2)"),
        ("stdtrit(G - 1, 0.975)", "1.96"),
        ("(observed - chance) / (1 - chance) if chance", "observed if chance"),
        ("wins == [1, 1, 1]", "wins != [1, 1, 1]"),
    ],
    "chat/processes.py": [
        ("weight.full_tensor() if", "weight.to_local() if"),
        ("(size - 1) * (own - own.detach())", "(own - own.detach())"),
        ("dist.all_reduce(scores)", "pass"),
        ("reduce_dtype=torch.float32", "reduce_dtype=torch.bfloat16"),
        ("return gradient.float(), None", "return gradient.float() / 2, None"),
    ],
    "chat/policy.py": [
        ("own[: len(place)], place", "own, torch.zeros(len(own), dtype=torch.int64)"),
        ("if not torch.equal(new, weight):", "if False:"),
        ("if not torch.equal(new, weight):", "if True:"),
        ("(self.model).requires_grad_(False)", "(self.model).requires_grad_(True)"),
    ],
    "chat/team.py": [
        ("return items[self.rank :: self.size]", "return items"),
        ("if isinstance(theirs, Stopped):", "if theirs is found and isinstance(found, Stopped):"),
    ],
    "chat/low_rank.py": [
        ("model.requires_grad_(False)", "pass"),
        ("+ 2 * part.B @ part.A", "+ part.B @ part.A"),
        ("torch.zeros(linear.out_features", "torch.ones(linear.out_features"),
    ],
    "chat/scoring.py": [
        ("of_places * there", "of_places"),
        ("hidden.to(torch.promote_types(hidden.dtype, torch.float32))", "hidden"),
    ],
}


def tests_of(file: str) -> list[str]:
    """The test files that are about this file."""
    starts = TESTS[file if file in TESTS else file.partition("/")[0]].split()
    patterns = [re.sub(r"^(\w+)/?(\w*)$", r"tests/\1/test_\2*.py", start) for start in starts]
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [str(path.relative_to(ROOT)) for path in dict.fromkeys(found)]


def outcome(mutant: tuple[str, str, str], project: Path) -> str:
    """Name of the first test that fails on a copy of the project with the mutation, or "" if none
    does."""
    file, old, new = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(project, Path(folder) / "project")
        (copy / file).write_text((copy / file).read_text().replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += tests_of(file)
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        found = re.search(r"^(?:FAILED|ERROR) tests/(.*?)(?: - |$)", run.stdout, re.M)
        return found[1] if found else "" if run.returncode == 0 else run.stdout[-300:]


def misplaced() -> list[str]:
    """What is wrong with the table: every text has to occur once in its file."""
    counts = {
        (file, old): (ROOT / file).read_text().count(old)
        for file, pairs in MUTANTS.items()
        for old, _ in pairs
    }
    return [f"{file} has {n} times {old!r}" for (file, old), n in counts.items() if n != 1]


def main() -> int:
    """Try all mutants; 1 if any survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--files", nargs="+", default=list(TESTS), help="or folders")
    parser.add_argument("--every", type=int, default=1, help="a sample: one of so many mutants")
    options = parser.parse_args()
    if wrong := misplaced():
        raise SystemExit("\n".join([*wrong, "expected each of them once"]))
    mutants = [
        (file, old, new)
        for file, pairs in MUTANTS.items()
        for old, new in pairs
        if {file, file.partition("/")[0]} & set(options.files)
    ][:: options.every]
    survivors, ignored = 0, shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        # as it was when this started
        project = shutil.copytree(ROOT, Path(folder) / "project", ignore=ignored)
        outcomes = pool.map(lambda mutant: outcome(mutant, project), mutants)
        for number, (mutant, test) in enumerate(zip(mutants, outcomes, strict=True), 1):
            survivors += not test
            file, old, new = mutant
            told = test or "SURVIVED"
            print(f"{number:2d} {file}: {old.strip()}", flush=True)
            print(f"     -> {new.strip()}\n     {told}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
