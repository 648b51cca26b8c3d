"""How near judging comes to what an endpoint's latency allows, and how fast judgments come from the
cache.

    python -m benchmarks.judge [--latency 0.2] [--concurrency 64] [--pairs 1000]

Two requests a pair, to a server on this machine that answers after `latency` seconds; the ideal is
requests x latency / concurrency. Then the same judgments again by a new process, from the cache.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.server import serving
from judge.endpoint import Endpoint
from judge.prices import Price
from oracle import OpenAIJudge


def judge_pairs(url: str | None, cache: str, concurrency: int, pairs: int) -> tuple[float, float]:
    """Seconds that the judgments take, and their sum; without a URL from the cache."""
    price = Price(10, 30) if url else None
    endpoint = Endpoint(
        "local-judge", url, cache, live=bool(url), concurrency=concurrency, price=price
    )
    judge = OpenAIJudge(endpoint, "pairwise")
    judge.prefer(["warm"], ["a"], ["b"])  # the client and its first connection, or the file
    prompts = [f"Question {i} about something?" for i in range(pairs)]
    a, b = (
        [f"Answer {name}{i}: " + "some words of an answer " * 30 for i in range(pairs)]
        for name in "ab"
    )
    gc.collect()  # its first pass over all that was imported takes as long as 2000 judgments
    start = time.perf_counter()
    total = judge.prefer(prompts, a, b).sum().item()
    return time.perf_counter() - start, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--cached", help="only from this cache")
    options = parser.parse_args()
    if options.cached:
        print(*judge_pairs(None, options.cached, options.concurrency, options.pairs))
        return
    requests, ideal = 2 * options.pairs, 2 * options.pairs * options.latency / options.concurrency
    with serving() as server, tempfile.TemporaryDirectory() as folder:
        server.control(latency=options.latency)
        seconds, total = judge_pairs(
            server.url, f"{folder}/judgments.sqlite", options.concurrency, options.pairs
        )
        counted = server.stats()["requests"] - 2
        print(
            f"{counted} requests counted by a server of latency {options.latency} s, "
            f"at concurrency {options.concurrency}: {seconds:.2f} s, "
            f"{ideal / seconds:.3f} of the ideal {ideal:.2f} s"
        )
        again = [sys.executable, "-m", "benchmarks.judge", "--pairs", str(options.pairs)]
        again += ["--cached", f"{folder}/judgments.sqlite"]
        reply = subprocess.run(again, capture_output=True, text=True, check=True).stdout.split()
        assert float(reply[1]) == total, "the cache gives other answers"
        print(
            f"again, from the cache: {float(reply[0]):.3f} s, "
            f"{requests / float(reply[0]):,.0f} a second"
        )


if __name__ == "__main__":
    main()
