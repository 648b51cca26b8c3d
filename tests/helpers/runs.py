"""Runs of train.py: as a user starts them, and what they leave in their folder."""

import json
import signal
import subprocess
import sys

import train
from helpers import ROOT

SMALL = (
    "--num-prompts 2 --vocabulary 3 --length 2 --iterations 6 --steps 5 --pairs 64 "
    "--width 16 --layers 1"
).split()


def start(*arguments):
    """train.py as a user starts it: what it prints is thrown away, and Ctrl-C reaches it, even if
    the tests run where a shell made background jobs deaf to it."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=hear
    )


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(out)]


def everything_in(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(capsys, *arguments):
    """The one line on stderr with which main refuses the arguments."""
    assert train.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err
