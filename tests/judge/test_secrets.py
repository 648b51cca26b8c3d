"""What is shown while a judge is asked, and that the key never is."""

import io
import json
import os
import re
import subprocess
import sys

import pytest

from helpers import ROOT
from helpers.endpoints import SECRET, golds
from helpers.server import LOST


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_and_nowhere_else(server, asking, capsys, monkeypatch):
    asking().ask(golds(3)[0])
    assert capsys.readouterr() == ("", "")
    server.control(latency=0.15)
    monkeypatch.setattr(sys, "stderr", Terminal())
    asking(cache=None, concurrency=1).ask(golds(3)[0])
    assert "asking judge" in sys.stderr.getvalue()
    assert "/3" in sys.stderr.getvalue()


# kind -> what the server does, one after the other; it sends the key back wherever it can
SCENES = {
    "errors": [
        *(
            {"status": (status, f"Error {status}: incorrect key", None, "")}
            for status in (401, 404, 500, 403, 400)
        ),
        *({"faults": [fault], "mode": "always"} for fault in ("429", "503")),
    ],
    "pairwise": [
        {},
        *(
            {"faults": [fault], "mode": "always"}
            for fault in (*LOST[1:], "truncated-json", "refusal")
        ),
    ],
    "scored": [
        {},
        *(
            {"faults": [fault], "mode": "always"}
            for fault in ("missing-ids", "not-utf-8", "two-answers", "python")
        ),
    ],
    "teacher": [
        {},
        *(
            {"faults": [fault], "mode": "always"}
            for fault in ("refusal", "truncated-json", "not-utf-8")
        ),
    ],
}

for scenes in SCENES.values():
    scenes += [{**scenes[0], "spelling": spelling} for spelling in ("solidus", "unicode")]

CHATTY = """
import json, logging, os, sys, traceback
from pathlib import Path
from judge.endpoint import Endpoint
from judge.ledger import Stopped
from judge.models import only_model
from judge.prices import Price
from helpers.server import Served
from oracle import OpenAIJudge, OpenAITeacher

logging.basicConfig(level=logging.DEBUG)
server, endpoints = Served(int(sys.argv[1])), []
for kind, scenes in json.loads(sys.argv[2]).items():
    for stream in (sys.stdout, sys.stderr):
        print(f"<<{kind}>>", file=stream, flush=True)
    for i, scene in enumerate(scenes):
        server.control(echo=True, **scene)
        cache = Path(kind, f"{i}.sqlite")
        settings = {"attempts": 2, "backoff": 0.01, "max_failed": i % 2, "price": Price(1, 1)}
        endpoints.append(Endpoint("judge", server.url, cache, **settings))
        try:
            if kind == "teacher":
                print(OpenAITeacher(endpoints[-1]).answers(["Why?"]))
            else:
                judge = OpenAIJudge(endpoints[-1], "scored" if kind == "scored" else "pairwise")
                print(judge.prefer(["Why?"], ["Text worth 3"], ["Text worth 4"]))
        except Exception:
            traceback.print_exc()
        print(endpoints[-1], endpoints[-1].report(), endpoints[-1].reasons)
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def chatter(running, tmp_path_factory):
    """The folder, and by kind what was printed to stdout and stderr, of a process whose key every
    reply repeats; it ends without closing its files."""
    folder = tmp_path_factory.mktemp("secret")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    secret = {
        "OPENAI_API_KEY": SECRET,
        "PYTHONPATH": path,
        "OPENAI_LOG": "debug",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", CHATTY, running.root.rpartition(":")[2], json.dumps(SCENES)]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **secret}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    printed = {}
    for stream in (done.stdout, done.stderr):
        parts = re.split(r"<<(\w+)>>\n", stream.decode())
        for kind, text in zip(parts[1::2], parts[2::2], strict=True):
            printed[kind] = printed.get(kind, "") + text
    return folder, printed


def unescaped(text):
    """A text without the escapes of JSON within JSON, however deep."""
    return re.sub(r"\\+u00([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text).replace(
        "\\", ""
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCENES)
def test_the_key_is_in_no_file_log_or_traceback_though_the_server_repeats_it(kind, chatter):
    folder, printed = chatter
    assert SECRET not in unescaped(printed[kind])
    files = list((folder / kind).iterdir())
    assert len([file for file in files if file.suffix == ".sqlite"]) == len(SCENES[kind])
    assert any(file.name.endswith("-wal") for file in files)
    assert (
        sorted(
            file.name for file in files if SECRET in unescaped(file.read_bytes().decode("latin-1"))
        )
        == []
    )
    assert any(b"[key]" in file.read_bytes() for file in files), "the server did repeat it"


@pytest.mark.slow
def test_errors_that_repeat_the_key_are_reported_without_it(chatter):
    _, printed = chatter
    assert "Error 401: incorrect key Bearer [key]" in printed["errors"]
    assert "Traceback" in printed["errors"]
