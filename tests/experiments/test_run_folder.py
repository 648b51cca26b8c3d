"""The folder of a run and the ends of a program: folders that cannot be written to, full disks,
two processes in one folder, checkpoints of other runs, Ctrl-C at any moment, output that
nobody reads."""

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import experiments.agreement
import experiments.folder
import train
from experiments.agreement import main
from experiments.folder import Run, claimed, lock
from experiments.settings import guarded, hear_ctrl_c, may_differ
from helpers import ROOT
from helpers.runs import SMALL, everything_in, refused, timeless

PRESETS = {"game": [], "text": [], "ablations": [], "llm": ["--model", "x"]}

AGREEMENT = '{"prompt": "x", "a": "y", "b": "z", "label": "a", "judge": 0.9}\n'

LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")


@pytest.fixture
def not_started(monkeypatch):
    """Presets and `agreement` that fail when they are started."""
    fail = lambda *_: pytest.fail("it was started")  # noqa: E731
    monkeypatch.setattr(train, "preset", lambda name, of=train.preset: (of(name)[0], fail))
    monkeypatch.setattr(experiments.agreement, "compare_with_people", fail)


@pytest.fixture(scope="module")
def finished(game_run):
    return game_run


def ends_after(monkeypatch, out, rows):
    """A run in `out` that was interrupted when it had saved so many rows."""
    save = Run.save

    def saved(self, row, state):
        save(self, row, state)
        if len(self.metrics) == rows:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", saved)
        assert train.main([*SMALL, "--out", str(out)]) == 130


# --- Folders that cannot be written to ---


@pytest.mark.parametrize(
    "out", ["file", "file/run", "file/a/run", "/proc/self", "/proc/run", "x" * 300]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_an_out_that_is_no_folder_to_write_to_is_refused_at_once(
    preset, out, not_started, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("precious")
    said = refused(capsys, preset, *PRESETS[preset], "--out", out)
    assert f"out {out} is no folder that can be written to (" in said
    assert "choose another --out" in said
    assert everything_in(tmp_path) == {str(tmp_path / "file"): b"precious"}


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/self"])
def test_agreement_refuses_an_out_that_is_no_folder_at_once(
    out, not_started, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text(AGREEMENT)
    judge = ["--oracle", "openai:m", "--judge-url", "http://localhost:9"]
    assert main(["file", *judge, "--out", out]) == 2
    said = capsys.readouterr().err
    assert f"experiments.agreement: out {out} is no folder that can be written to (" in said
    assert said.count("\n") == 1
    assert everything_in(tmp_path) == {str(tmp_path / "file"): AGREEMENT.encode()}


@pytest.mark.parametrize("preset", PRESETS)
def test_there_is_nothing_to_resume_in_a_folder_that_does_not_exist(
    preset, not_started, capsys, tmp_path
):
    said = refused(capsys, preset, *PRESETS[preset], "--out", tmp_path / "a" / "run", "--resume")
    assert f"no run in {tmp_path}/a/run to go on with; leave --resume out" in said
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_no_folder_but_one_with_something_in_it(capsys, tmp_path):
    (tmp_path / "there").mkdir()
    for out in ("there", "there/a/b", "c/d"):
        refused(capsys, "--game", tmp_path / "missing.npz", "--out", tmp_path / out)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_files_of_a_run_have_the_modes_that_the_user_asked_for(tmp_path):
    before = os.umask(0o027)
    try:
        assert train.main([*SMALL, "--iterations", "1", "--out", str(tmp_path / "run")]) == 0
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*")}
    assert all(mode == (0o750 if path.is_dir() else 0o640) for path, mode in modes.items()), modes


# --- Full disks ---


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", [".metrics.jsonl.part", "checkpoint/state.pt.part", "gaps.png"])
def test_after_a_full_disk_the_run_goes_on_to_the_same_result(
    name, finished, rendered, capsys, tmp_path, monkeypatch
):
    """/dev/full stands where the file is to be written: no byte fits."""
    out = tmp_path / "run"
    ends_after(monkeypatch, out, 2)
    (out / name).symlink_to("/dev/full")
    capsys.readouterr()
    said = refused(capsys, *SMALL, "--out", out, "--resume")
    assert f"{out} cannot be written (No space left on device); make room, then the same" in said
    assert "with --resume goes on from there" in said
    (out / name).unlink()
    assert train.main([*SMALL, "--out", str(out), "--resume"]) == 0
    assert timeless(out) == timeless(finished)
    for name, table in np.load(finished / "tables.npz").items():
        assert np.array_equal(table, np.load(out / "tables.npz")[name])


def test_an_error_in_writing_that_is_not_the_disks_is_not_hidden(tmp_path, monkeypatch):
    missing = tmp_path / "missing" / "file"
    monkeypatch.setattr(Run, "write_lines", lambda *_: missing.read_text())
    with pytest.raises(FileNotFoundError):
        train.main([*SMALL, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("piece", range(1, 16))
def test_what_is_met_in_writing_a_checkpoint_is_not_replaced_by_torchs_complaint(
    error, piece, tmp_path, monkeypatch
):
    """Met in the first, second, ... piece that is written: torch raises RuntimeError instead."""
    run = Run("game", train.GameConfig(out=str(tmp_path / "run")))
    pieces = []

    class Disk:
        def write(self, content):
            pieces.append(content)
            if len(pieces) == piece:
                raise error
            return len(content)

        def flush(self):
            pass

    monkeypatch.setattr(Path, "open", lambda *_: contextlib.nullcontext(Disk()))
    with pytest.raises(type(error)):
        run.keep("checkpoint/state.pt", {"weights": [torch.zeros(1000) for _ in range(3)]})


# --- Two processes ---


@pytest.mark.parametrize("preset", PRESETS)
def test_a_folder_in_use_by_a_living_process_is_refused(preset, not_started, capsys, tmp_path):
    out = tmp_path / "run"
    with claimed(str(out), resume=False):
        before = everything_in(tmp_path)
        for more in ((), ("--resume",)):
            said = refused(capsys, preset, *PRESETS[preset], "--out", out, *more)
            assert f"{out} is in use by process {os.getpid()} on " in said
        assert everything_in(tmp_path) == before
    assert list(out.iterdir()) == []


def test_killed_a_process_leaves_a_folder_that_the_next_one_can_use(finished, capsys, tmp_path):
    out, (ready, tell) = tmp_path / "run", os.pipe()
    child = os.fork()
    if child == 0:
        with claimed(str(out), resume=False):
            os.write(tell, b"x")
            signal.pause()
    os.read(ready, 1)
    assert f"in use by process {child} on " in refused(capsys, *SMALL, "--out", out)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (out / "run.lock").exists()
    assert train.main([*SMALL, "--out", str(out)]) == 0
    assert timeless(out) == timeless(finished)
    assert not (out / "run.lock").exists()


def test_a_lock_that_its_owner_removes_while_another_takes_it_is_not_taken(tmp_path, monkeypatch):
    path, flock, calls = tmp_path / "run.lock", experiments.folder.fcntl.flock, []

    def removed_at_first(file, how):
        calls.append(how)
        if len(calls) == 1:
            path.unlink()
        flock(file, how)

    monkeypatch.setattr(experiments.folder.fcntl, "flock", removed_at_first)
    with lock(path) as file:
        assert os.path.sameopenfile(file.fileno(), os.open(path, os.O_RDONLY))
    assert len(calls) == 2


@pytest.mark.parametrize("why", ["no fcntl", "no locks"])
def test_where_there_are_no_locks_that_is_said_and_the_work_is_done(
    why, capsys, tmp_path, monkeypatch
):
    if why == "no fcntl":
        monkeypatch.setattr(experiments.folder, "fcntl", None)
    else:

        def fail(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(experiments.folder.fcntl, "flock", fail)
    with claimed(str(tmp_path / "run"), resume=False):
        assert f"{tmp_path}/run cannot be locked on this system" in capsys.readouterr().out
    assert list((tmp_path / "run").iterdir()) == []


# --- Checkpoints ---


def changed(state, name):
    """The checkpoint with one thing wrong in it."""
    weights = dict(state["policy"])
    key, weight = next(iter(weights.items()))
    wrong = {
        "no weight": {"policy": {k: v for k, v in weights.items() if k != key}},
        "a weight more": {"policy": {**weights, "more": weight}},
        "a weight of another type": {"policy": {**weights, key: weight.double()}},
        "a weight of another shape": {"policy": {**weights, key: weight[:-1]}},
        "weights in a list": {"policy": list(weights.values())},
        "no group": {"optimizer": {**state["optimizer"], "param_groups": []}},
        "no field": {"after": {k: v for k, v in state["after"].items() if k != "log_pi_t"}},
        "policies in a list": {"policies": state["policies"].tolist()},
        "generator a number": {"generator": 3},
    }
    if name == "no generator":
        return {k: v for k, v in state.items() if k != "generator"}
    return {**state, **wrong[name]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no weight", "its content['policy'] is a dict of"),
        ("a weight more", "its content['policy'] is a"),
        ("a weight of another type", "is torch.float64 of shape"),
        ("a weight of another shape", "; expected torch.float32 of shape"),
        ("weights in a list", "its content['policy'] is a list of"),
        (
            "no group",
            "its content['optimizer']['param_groups'] is a list of 0; expected a list of 1",
        ),
        ("no field", "its content['after'] is a dict of"),
        ("policies in a list", "its content['policies'] is a list of 3; expected Tensor"),
        ("generator a number", "its content['generator'] is int; expected Tensor"),
        ("no generator", "its content is a dict of"),
    ],
)
def test_a_checkpoint_with_other_content_is_refused_and_left_alone(
    name, said, capsys, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    ends_after(monkeypatch, out, 2)
    state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    torch.save(changed(state, name), out / "checkpoint" / "state.pt")
    before = everything_in(out)
    capsys.readouterr()
    line = refused(capsys, *SMALL, "--out", out, "--resume")
    assert f"the checkpoint in {out} is not of this run (" in line
    assert said in line
    assert everything_in(out) == before


def test_a_checkpoint_of_a_run_with_another_seed_is_refused(finished, capsys, tmp_path):
    """It fits in every shape; only the mark of the settings tells it apart."""
    out = tmp_path / "run"
    assert train.main([*SMALL, "--seed", "1", "--out", str(out)]) == 0
    (out / "checkpoint" / "state.pt").write_bytes(
        (finished / "checkpoint" / "state.pt").read_bytes()
    )
    assert "state.pt is not of this run" in refused(
        capsys, *SMALL, "--seed", 1, "--out", out, "--resume"
    )


@pytest.mark.parametrize("error", [KeyError, TypeError, ValueError, RuntimeError, AttributeError])
def test_an_error_of_ours_in_taking_up_a_run_is_not_blamed_on_its_checkpoint(
    error, finished, monkeypatch
):
    def load_state_dict(self, state):
        raise error("ours")

    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", load_state_dict)
    with pytest.raises(error, match="ours"):
        train.main([*SMALL, "--out", str(finished), "--resume"])


@pytest.mark.parametrize("content", [b"[1, 2]", b"3", b"null", b"{", b"\xff"])
def test_a_config_that_is_none_is_refused(content, capsys, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert "no readable config.json" in refused(capsys, *SMALL, "--out", tmp_path, "--resume")


# --- What may differ on resumption ---

OF_RUNS = {"out", "resume", "device", "threads"}

OF_JUDGES = set(
    "dry_run judge_url judge_prices judge_cache judge_concurrency judge_timeout max_failed "
    "max_usd".split()
)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("game", OF_RUNS),
        ("text", OF_RUNS | OF_JUDGES | {"teacher_url", "teacher_prices"}),
        ("ablations", OF_RUNS | {"jobs"}),
        ("llm", OF_RUNS | OF_JUDGES | {"checkpointing", "compile", "fsdp"}),
    ],
)
def test_only_what_leaves_the_result_alone_may_differ_on_resumption(preset, expected):
    assert may_differ(train.preset(preset)[0]) == expected


def test_what_may_differ_does_not_stop_a_resumption(finished, tmp_path):
    out = tmp_path / "moved"
    shutil.copytree(finished, out)
    assert train.main([*SMALL, "--threads", "2", "--out", str(out), "--resume"]) == 0
    assert timeless(out) == timeless(finished)


# --- How a program ends ---


class OutOfMemory(RuntimeError):
    """As torch.OutOfMemoryError, which is a RuntimeError too."""


def ended_by(error, module, capsys, monkeypatch):
    """What is said on stderr when the error is met in the module, by one process of several."""
    names = {"__name__": module, "error": error}
    exec("def fail(): raise error", names)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert guarded("train.py", names["fail"]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "module"),
    [
        (RuntimeError("Connection closed by peer"), "torch.distributed.distributed_c10d"),
        (RuntimeError("Connection closed by peer"), "torch.nn.parallel.distributed"),
        (RuntimeError("Connection closed by peer"), "torch.autograd.graph"),
        (torch.distributed.DistNetworkError("no answer"), "chat.team"),
        (torch.distributed.DistBackendError("no answer"), "torch.distributed.distributed_c10d"),
    ],
)
def test_an_error_of_the_exchange_between_processes_is_a_line_with_its_text(
    error, module, capsys, monkeypatch
):
    said = ended_by(error, module, capsys, monkeypatch)
    assert f"another process of the run is gone ({error}); the same command with --resume" in said


@pytest.mark.parametrize(
    ("error", "module"),
    [
        (RuntimeError("size mismatch: gloo and NCCL"), "model"),
        (OutOfMemory("no memory"), "torch.autograd.graph"),
        (RuntimeError("size mismatch"), "torch.nn.modules.linear"),
    ],
)
def test_another_error_is_raised_also_by_one_process_of_several(error, module, capsys, monkeypatch):
    with pytest.raises(type(error), match=str(error)):
        ended_by(error, module, capsys, monkeypatch)


def started(*command, **options):
    """A program of the project as a user starts it in a shell, in a process group of its own."""
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear,
        start_new_session=True,
        **options,
    )


def wait_for_import(pid, library="_multiarray_umath"):
    """Until the process has loaded the library; numpy's is the first of seconds of imports."""
    deadline = time.monotonic() + 120
    while library not in Path(f"/proc/{pid}/maps").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@LINUX
@pytest.mark.parametrize("program", [[ROOT / "train.py"], ["-m", "experiments.agreement"]])
def test_interrupted_while_it_imports_a_program_ends_with_130_and_no_word(program, tmp_path):
    process = started(
        *program, "labels.jsonl", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    wait_for_import(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 130


def test_a_process_that_was_started_deaf_to_ctrl_c_stays_so(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        hear_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, lambda *_: None)
        hear_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@LINUX
def test_interrupted_the_ablations_and_their_workers_end_without_a_traceback(tmp_path):
    """Ctrl-C reaches all of them, the workers in the middle of their imports."""
    sizes = (
        "--algorithm 4 --iterations 1 --tuning-iterations 1 --prompts 2 --survey 2 --sft-steps 1"
    ).split()
    process, workers = (
        started(ROOT / "train.py", "ablations", *sizes, "--out", tmp_path / "run"),
        [],
    )
    deadline = time.monotonic() + 240
    while not workers:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        command = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children}
        workers = [child for child in children if "spawn_main" in command[child]]
    wait_for_import(workers[0])
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert "Traceback" not in said
    assert "interrupted; the same command with --resume goes on" in said
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [
        pytest.param([ROOT / "train.py", *SMALL, "--out", "run"], "", marks=pytest.mark.slow),
        ([ROOT / "train.py", *SMALL, "--out", "run"], "1"),
        pytest.param([ROOT / "train.py", "--help"], "", marks=pytest.mark.slow),
        pytest.param(["-m", "experiments.agreement", "labels.jsonl"], "", marks=pytest.mark.slow),
    ],
)
def test_a_program_whose_output_nobody_reads_ends_with_141_and_no_word(
    command, unbuffered, tmp_path
):
    """As in `train.py ... | head -0`. Who prints little meets the closed pipe only at the end."""
    (tmp_path / "labels.jsonl").write_text(AGREEMENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    process = started(*command, cwd=tmp_path, env=environment)
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(timeout=120), said) == (141, "")
    assert not list(tmp_path.rglob("run.lock"))
