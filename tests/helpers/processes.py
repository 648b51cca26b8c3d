"""Processes that are forked from one that has imported everything and run nothing, which takes
milliseconds where a new interpreter takes seconds. It cannot be the process of the tests: after a
backward pass torch lets no child of its process make another.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from helpers import ROOT


class Child:
    """A process that `Nursery` started; what it printed is in `out`."""

    def __init__(self, nursery, pid, out):
        self.nursery, self.pid, self.out, self.code = nursery, pid, out, None

    def said(self):
        return self.out.read_text()

    def poll(self):
        """Its exit code, minus the signal if one killed it; None while it lives."""
        if self.code is None:
            self.code = self.nursery.ask({"poll": self.pid})
        return self.code

    def wait(self, timeout=300):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)
        return self.code

    def send_signal(self, number):
        os.kill(self.pid, number)


class Nursery:
    """The process that has imported everything. It ends with the tests."""

    def __init__(self, folder):
        self.folder, self.born = folder, 0
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.processes"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, call, *arguments, **environment):
        """A child that calls "module:function" with arguments that JSON can hold, in the
        environment with these changes, and exits with what it returns."""
        self.born += 1
        out = self.folder / f"said-{self.born}"
        request = {"call": call, "arguments": arguments, "out": str(out), "of": environment}
        return Child(self, self.ask(request), out)

    def team(self, call, *arguments):
        """Two such children, in the environment that torchrun gives its processes."""
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        shared = dict(zip("WORLD_SIZE LOCAL_WORLD_SIZE".split(), "22", strict=True))
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        shared["TORCHELASTIC_RUN_ID"] = "none"
        ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        return [self.start(call, *arguments, **environment) for environment in ranks]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def born(request):
    """The child's life."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.update(request["of"])
    module, _, name = request["call"].partition(":")
    code = 1
    try:
        code = getattr(importlib.import_module(module), name)(*request["arguments"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


# what presets import when they are used; and making an optimizer does the last
IMPORTED = (
    *"openai scipy.optimize scipy.stats train experiments.text experiments.llm".split(),
    *"experiments.game_figures experiments.sampled_figures torch._dynamo".split(),
)


def nurse():
    """Answer requests for children until the tests end. Figures are drawn and not rendered."""
    for name in IMPORTED:
        importlib.import_module(name)
    from matplotlib.figure import Figure

    from helpers.text_runs import learn_once

    learn_once(setattr)
    Figure.savefig = lambda _, path: Path(path).write_bytes(b"sketch")
    answers = os.fdopen(os.dup(1), "w")  # children print elsewhere
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                born(request)
        print(json.dumps(answer), file=answers, flush=True)


# --- What children do -----------------------------------------------------------------------------


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def train_with(arguments):
    """train.py with these arguments."""
    import train

    return train.main(arguments)


def train_and_leave_nothing(arguments):
    """train.py; then, is the process group closed, down to its threads? One that is left can abort
    the process at its end."""
    code = train_with(arguments)
    tasks = Path("/proc/self/task")
    left = [name for task in tasks.iterdir() if "gloo" in (name := (task / "comm").read_text())]
    if left:
        print(f"threads left: {left}")
    return code or len(left)


def train_until_written(arguments, out, rows):
    """train.py, killed by another thread, whatever it is doing, when it has written so many
    rows."""
    metrics = Path(out) / "metrics.jsonl"

    def watch():
        while not metrics.exists() or metrics.read_text().count("\n") < rows:
            time.sleep(0.002)
        die()

    threading.Thread(target=watch, daemon=True).start()
    return train_with(arguments)


def train_until_kept(arguments, name, when, before, calls):
    """train.py, killed when it has kept the file `name` with a content for which `when` holds, or,
    if `before`, when it is about to put it in its place. Calls of sampler and judge are written to
    the file `calls`."""
    from experiments.folder import Run
    from oracle import RegisterJudge
    from text import TextPolicy

    for said, asked, method in (
        ("sample", TextPolicy, "sample"),
        ("judge", RegisterJudge, "prefer"),
    ):

        def counted(*given, said=said, original=getattr(asked, method)):
            with open(calls, "a") as file:
                print(said, file=file)
            return original(*given)

        setattr(asked, method, counted)
    keep = Run.keep

    def deadly(self, written, content):
        due = written == name and eval(when, {"content": content})
        if due and before:
            os.replace = die
        keep(self, written, content)
        if due:
            die()

    Run.keep = deadly
    return train_with(arguments)


def train_until_asked(arguments, name, number, before):
    """train.py, killed at a call of its ledger: of which method, which one, before or after."""
    from judge.ledger import Ledger

    original, calls = getattr(Ledger, name), []

    def deadly(*given, **named):
        calls.append(name)
        due = len(calls) == number
        if due and before:
            die()
        result = original(*given, **named)
        if due:
            die()
        return result

    setattr(Ledger, name, deadly)
    return train_with(arguments)


if __name__ == "__main__":
    nurse()
