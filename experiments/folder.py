"""The folder of a run: config.json, metrics.jsonl, the checkpoint."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import IO, TYPE_CHECKING, Any

import torch

from chat.team import Team
from experiments.settings import BadInput, first_process, may_differ
from judge.ledger import Refused

if TYPE_CHECKING:
    from matplotlib.figure import Figure

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]  # a module is optional in no other way

# may lie in the folder before a run starts
BESIDE = (".part", ".lock", ".sqlite", ".sqlite-wal", ".sqlite-shm")
# why a file cannot grow, though it could be made
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


# --- The folder is one process's alone ------------------------------------------------------------


@contextmanager
def claimed(out: str, resume: bool | None) -> Iterator[None]:
    """Around all that a run does: its folder, made if need be, is this process's alone.

    resume: whether the run goes on with an earlier one; None if it never does. BadInput, before
    anything is loaded, if the folder cannot be written to, if another living process has it, or if
    it is to be resumed and does not exist; later, if its disk is full."""
    folder, begun = Path(out), False
    if not first_process():
        yield  # the first of torchrun's processes has it for all
        return
    try:
        if resume and not folder.exists():
            fault = f"there is no run in {out} to go on with"
            raise BadInput(f"{fault}; leave --resume out to start one")
        with made(folder), locked(folder):
            begun = True
            yield
    except OSError as error:
        if begun and error.errno not in FULL:
            raise
        if not begun:
            reason = f"out {out} is no folder that can be written to ({error.strerror})"
            raise BadInput(f"{reason}; choose another --out") from error
        again = "the same command" if resume is None else "the same command with --resume"
        reason = f"{error.filename or out} cannot be written ({error.strerror})"
        raise BadInput(f"{reason}; make room, then {again} goes on from there") from error


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """The folder, made if need be. If the work in it fails on bad input, it is removed if empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except (BadInput, Refused, OSError):
        for path in new:
            if any(path.iterdir()):
                break
            path.rmdir()
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """run.lock in the folder, which one process at a time can have.

    The kernel releases it when its process ends, however it ends. BadInput if another process has
    it. Where there are no such locks, as on Windows, that is said and nothing is locked."""
    path = folder / "run.lock"
    file = None if fcntl is None else lock(path)
    try:
        if file is None:
            print(f"{folder} cannot be locked on this system; let no other process write there")
        else:
            file.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=file, end="", flush=True)
        yield
    finally:
        path.unlink(missing_ok=True)
        if file is not None:
            file.close()


def lock(path: Path) -> IO[str] | None:
    """The file, made if need be, with the kernel's lock on it; None where there are no locks.
    BadInput if another process has it."""
    while True:
        file = path.open("a+", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            reason = f"{path.parent} is in use by {file.read() or 'another process'}"
            raise BadInput(f"{reason}; wait for it to end, or choose another --out") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its owner has removed it since: there may be a new one


# --- What a run keeps there -----------------------------------------------------------------------


class Run:
    """The folder of one run: config.json, metrics.jsonl, checkpoint/state.pt, and what the preset
    adds.

    `state` is the last checkpoint, or None at the start. classes: what it may hold besides tensors
    and plain values. device: for its tensors. Of several processes, which must share the folder,
    all read and the first one writes. Raises BadInput, before anything is written, if `out` holds
    anything but a run of the same config, or a run without --resume."""

    def __init__(
        self, preset: str, config: Any, classes: tuple[type, ...] = (), device: str | None = None
    ):
        team = Team()
        self.out, self.device, self.classes = Path(config.out), device or config.device, classes
        settings = {"preset": preset, **dataclasses.asdict(config)}
        self.may_differ = may_differ(type(config))
        fixed = {name: value for name, value in settings.items() if name not in self.may_differ}
        # marks what this run writes to go on from
        self.mark = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
        started = self.out.exists() and any(
            path.suffix not in BESIDE for path in self.out.iterdir()
        )
        self.state = self._earlier(settings) if started else None
        self.phases = (self._own("checkpoint/phases.pt", key=list) if started else None) or {}
        self.metrics = self.state["metrics"] if self.state else []
        self.writes = team.rank == 0
        # all processes look before the first one writes
        seen = team.together([(started, len(self.metrics), sorted(map(str, self.phases)))])
        if any(other != seen[0] for other in seen):
            fault = f"the processes see different content in {self.out}"
            raise BadInput(f"{fault}; expected --out to be a folder that all share")
        if self.writes:
            (self.out / "checkpoint").mkdir(parents=True, exist_ok=True)
        if not started:
            self.write("config.json", json.dumps(settings, indent=2) + "\n")

    def _earlier(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        try:
            earlier = json.loads((self.out / "config.json").read_text())
            check_like(earlier, dict, "it")
        except (OSError, ValueError) as error:
            fault = f"{self.out} holds something, but no readable config.json"
            raise another_out(fault) from error
        for name in sorted(settings.keys() | earlier.keys()):
            there, here = earlier.get(name), settings.get(name)
            if name not in self.may_differ and here != there:
                difference = f"{name} is {there!r} there and {here!r} here"
                raise another_out(f"{self.out} holds another run: {difference}")
        if not settings["resume"]:
            fault = f"{self.out} holds this run already; add --resume to go on with it"
            raise BadInput(f"{fault}, or choose another --out")
        return self._own("checkpoint/state.pt", metrics=list)

    def _own(self, name: str, **kinds: type) -> dict[str, Any] | None:
        """The content of a file that this run wrote, with keys of these kinds; None if there is no
        such file."""
        content = self.load(name)
        if content is None:
            return None
        wanted = {"mark": str, **kinds}.items()
        if any(not isinstance(content.get(key), kind) for key, kind in wanted):
            raise another_out(f"{self.out}/{name} is not a checkpoint of a run")
        if content.pop("mark") != self.mark:
            fault = f"{self.out}/{name} is not of this run, but of one with other settings"
            raise another_out(fault)
        return content

    def load(self, name: str) -> dict[str, Any] | None:
        """What `keep` wrote, or None if it wrote nothing of that name. BadInput if it is anything
        else."""
        path = self.out / name
        if not path.exists():
            return None
        try:
            with torch.serialization.safe_globals([*self.classes]):
                content = torch.load(path, weights_only=True, map_location=self.device)
        except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            fault = f"{path} is not a readable checkpoint ({type(error).__name__})"
            raise another_out(fault) from error
        if not isinstance(content, dict):
            raise another_out(f"{path} is not a checkpoint of a run")
        return content

    def expect(self, content: dict[str, Any], like: dict[str, Any]) -> None:
        """BadInput unless a checkpoint's content has what `like` has, as `check_like` compares the
        two."""
        known = {name: content[name] for name in like if name in content}
        try:
            check_like(known, like, "its content")
        except ValueError as error:
            raise self.foreign(str(error)) from error

    def foreign(self, reason: str) -> BadInput:
        """The error to raise if the checkpoint is not one of this run."""
        return another_out(f"the checkpoint in {self.out} is not of this run ({reason})")

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the folder in one piece: a reader sees the old content or the new, also
        after a crash."""
        if not self.writes:
            return
        part = self.out / f".{Path(name).name}.part"
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, self.out / name)

    def write_lines(self, name: str, items: Iterable[dict[str, Any]]) -> None:
        """Write a .jsonl file of the folder, an object a line, in one piece."""
        self.write(name, "".join(json.dumps(item) + "\n" for item in items))

    def save(self, row: dict[str, Any], state: dict[str, Any]) -> None:
        """End an iteration: its row joins metrics.jsonl, then row and state become the checkpoint,
        atomically."""
        self.metrics.append(row)
        self.write_lines("metrics.jsonl", self.metrics)
        self.checkpoint(state)

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Make state, and the rows so far, what --resume goes on from."""
        self.keep("checkpoint/state.pt", {**state, "metrics": self.metrics, "mark": self.mark})

    def keep(self, name: str, content: dict[str, Any]) -> None:
        """Write a file of tensors and values in one piece."""
        if not self.writes:
            return
        part = self.out / f"{name}.part"
        with part.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # by which torch replaces what it met while writing
                raise error.__context__ or error from None
        os.replace(part, self.out / name)

    def remember(
        self, key: list[int], phase: str, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """function(*arguments), or what it returned when this phase of the key (an iteration) was
        last reached.

        A run that is killed between phases does not repeat them. Only the last key's phases are
        kept."""
        if self.phases.get("key") != key:
            self.phases = {"key": key}
        if phase not in self.phases:
            self.phases[phase] = function(*arguments)
            self.keep("checkpoint/phases.pt", {**self.phases, "mark": self.mark})
        return self.phases[phase]

    def figure(self, name: str, draw: Callable[..., Figure], *arguments: Any) -> None:
        """Save draw(*arguments), a figure of pyplot's in our style, as a PNG."""
        from matplotlib import pyplot  # here, as it takes a second to import

        from experiments.figures import STYLE

        with pyplot.style.context(STYLE):
            figure = draw(*arguments)
            figure.savefig(self.out / name)
        pyplot.close(figure)


def like(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the state of such an optimizer is to look like, however many steps it has taken."""
    return {"state": dict, "param_groups": optimizer.state_dict()["param_groups"]}


def another_out(fault: str) -> BadInput:
    """The error to raise about what is in a folder."""
    return BadInput(f"{fault}; choose another --out")


def check_like(found: Any, like: Any, name: str) -> None:
    """ValueError unless found is like: a type, of which it must be one; a tensor, whose shape and
    type it must have; a dict or list of such, whose keys or length it must have; or another value,
    to which it is not compared."""
    fits = True
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(like, type | UnionType):
        fits = isinstance(found, like)
    elif isinstance(like, torch.Tensor):
        fits = isinstance(found, torch.Tensor)
        fits = fits and (found.shape, found.dtype) == (like.shape, like.dtype)
    elif isinstance(like, dict):
        fits, parts = isinstance(found, dict) and found.keys() == like.keys(), like.items()
    elif isinstance(like, list):
        fits, parts = isinstance(found, list) and len(found) == len(like), enumerate(like)
    if not fits:
        raise ValueError(f"{name} is {outline(found)}; expected {outline(like)}")
    for key, part in parts:
        check_like(found[key], part, f"{name}[{key!r}]")


def outline(thing: Any) -> str:
    """What kind of thing it is, in a few words."""
    if isinstance(thing, torch.Tensor):
        return f"{thing.dtype} of shape {list(thing.shape)}"
    if isinstance(thing, dict | list):
        return f"a {type(thing).__name__} of {len(thing)}"
    return str(getattr(thing, "__name__", type(thing).__name__))
