"""Small runs of train.py, and what they leave in their folder."""

import fcntl
import json
import os
import shutil

import train

SMALL = (
    "--num-prompts 2 --vocabulary 3 --length 2 --iterations 6 --steps 5 --pairs 64 "
    "--width 16 --layers 1"
).split()


def made_once(tmp_path_factory, name, make):
    """A copy of the folder that make(folder) fills. That is done by the first of all test processes
    to ask; the others wait for it."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    (made := shared / "made").mkdir(exist_ok=True)
    with (made / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (made / f"{name}.done").exists():
            shutil.rmtree(made / name, ignore_errors=True)
            make(made / name)
            (made / f"{name}.done").touch()
    return shutil.copytree(made / name, tmp_path_factory.mktemp("made") / name)


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
