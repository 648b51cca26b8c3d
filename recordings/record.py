"""Record what a judge and a teacher reply to a few fixed questions, so that their whole path can be
run and read without them.

    python -m recordings.record --judge-url http://localhost:8000/v1 --judge-model NAME
        --out recordings

Writes comparisons.jsonl (six prompts of the world of text, for each all pairs of four responses,
with a label drawn from the synthetic judge, since no people were asked) and NAME.sqlite, the ledger
of: every pair in both orders, the four responses of a prompt side by side, and the teacher's answer
to each prompt. What cannot be read is recorded too.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import combinations
from pathlib import Path

from judge.client import make_client
from judge.endpoint import Endpoint
from oracle import OpenAIJudge, OpenAITeacher, RegisterJudge
from world import PROMPTS, REGISTERS, TOPICS, topic

ASKED = [PROMPTS[verb * len(TOPICS) + place] for verb in range(3) for place in (0, 6)]


def candidates(prompt: str, draw: random.Random) -> list[str]:
    """A response in each register, and a malformed one."""
    responses = [register.write(topic(prompt), draw) for register in REGISTERS.values()]
    return [*responses, " ".join(responses[0].split()[:5])]


def comparisons(seed: int = 0) -> list[dict[str, str]]:
    """All pairs of candidates, in random order, labelled by the synthetic judge's toss."""
    draw, items = random.Random(seed), []
    for prompt in ASKED:
        for pair in combinations(candidates(prompt, draw), 2):
            a, b = draw.sample(pair, 2)
            won = draw.random() < RegisterJudge().prefer([prompt], [a], [b]).item()
            items.append({"prompt": prompt, "a": a, "b": b, "label": "a" if won else "b"})
    return items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge-url", required=True)
    parser.add_argument("--judge-model", required=True)
    parser.add_argument("--out", type=Path, default=Path("recordings"))
    options = parser.parse_args()
    items = comparisons()
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (options.out / "comparisons.jsonl").write_text(lines)
    endpoint = Endpoint(
        options.judge_model,
        cache=options.out / f"{options.judge_model}.sqlite",
        concurrency=2,
        attempts=1,
        max_failed=1.0,
        client=make_client(options.judge_url),
    )
    columns = [[item[name] for item in items] for name in ("prompt", "a", "b")]
    for form in ("pairwise", "scored"):
        judge = OpenAIJudge(endpoint, form)
        print(form, judge.prefer(*columns), judge.report())
    print(OpenAITeacher(endpoint, max_tokens=128).answers(ASKED))
    print(endpoint.report())
    endpoint.ledger.db.execute(
        "PRAGMA journal_mode = DELETE"
    )  # one file, that can be read where nothing can be written
    endpoint.ledger.db.execute("VACUUM")


if __name__ == "__main__":
    main()
