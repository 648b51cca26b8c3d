"""What every run of `train.py` shares: a command line made from a dataclass, also of judges that are language models; the run's
folder; the look of its figures."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import gc
import hashlib
import json
import os
import pickle
import platform
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import IO, Any, NoReturn

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from judge import Endpoint, Ledger, Price, Refused, Stopped, TooDear, make_client, only, only_model, recorded_models
from model import Team

STYLE = {
    "axes.prop_cycle": plt.cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]),
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 10,
    "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 150,
}  # fmt: skip  # colours told apart by colour-blind readers (Okabe and Ito); line styles tell them apart in grey


class BadInput(Exception):
    """The user can mend it: one line, exit code 2, nothing overwritten."""


# --- The command line ------------------------------------------------------------------------------------------------------


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a preset's dataclass: its default, and help that gives unit, range and the paper's value if it has one."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; `python {self.prog.partition(' ')[0]} --help` lists what there is")


def options_parser(name: str, config: type) -> argparse.ArgumentParser:
    """A parser with one --option for each field of the dataclass, inherited ones last. BadInput on what it does not know."""
    summary = (config.__doc__ or "").strip().splitlines()[0]
    parser = _Parser(name, description=summary, allow_abbrev=False, add_help=False)
    for field in sorted(dataclasses.fields(config), key=lambda field: field.name not in config.__annotations__):
        kind = typing.get_type_hints(config)[field.name]
        kind = next(part for part in typing.get_args(kind) or (kind,) if part is not type(None))
        flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
        else:
            shown = "" if field.default is None else f" (default: {field.default})"
            choices, metavar = field.metadata["choices"], None if field.metadata["choices"] else kind.__name__.upper()
            parser.add_argument(flag, type=kind, default=field.default, choices=choices, metavar=metavar, help=help + shown)
    return parser


def parse(argv: list[str], presets: dict[str, type], default: str) -> tuple[str, Any]:
    """(preset, its config) from the command line; prints the help and exits 0 if asked to. BadInput on anything unknown."""
    preset, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (default, argv)
    if preset not in presets:
        raise BadInput(f"unknown preset {preset!r}; expected one of {', '.join(presets)}")
    if "-h" in rest or "--help" in rest:
        print(f"usage: python train.py [PRESET] [--field value ...]\n\npresets: {', '.join(presets)} (default: {default})\n")
        for name, config in presets.items():
            if name == preset or argv[0].startswith("-"):
                print(options_parser(f"train.py {name}", config).format_help())
        sys.exit(0)
    return preset, presets[preset](**vars(options_parser(f"train.py {preset}", presets[preset]).parse_args(rest)))


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """ValueError naming the first field that is given and not within its range, as no NaN is."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} is {value}; expected at least {least} and at most {most}")


def changed(config: Any, *names: str) -> str:
    """Those of the fields that are not as they are by default, as the command line has them."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    found = [name for name in names if getattr(config, name, None) != defaults.get(name)]
    return ", ".join(name.replace("_", "-") for name in found)


@dataclasses.dataclass
class JudgeOptions:
    """Who judges, and what it may cost."""

    oracle: str | None = setting(
        None, "synthetic, openai:MODEL, or replay:CACHE (recorded replies, no network); when left out openai if --judge-url or "
        "--judge-model is given, else synthetic"
    )  # fmt: skip
    judge_url: str | None = setting(None, "of an OpenAI-compatible endpoint, http://localhost:8000/v1 say (default: OpenAI's)")
    judge_model: str | None = setting(None, "the judge's name there (default: the only one that the endpoint has)")
    judge_form: str = setting("scored", "0 to 6 points for all candidates at once, or two at a time", ("scored", "pairwise"))
    judge_prices: str | None = setting(None, "dollars per million tokens of prompt and completion: 2.5,10 (default: as listed)")
    judge_cache: str | None = setting(None, "file of all requests and replies (default: judgments.sqlite in --out)")
    judge_concurrency: int = setting(16, "requests under way at a time")
    judge_timeout: float = setting(120.0, "seconds that a request may take")
    max_failed: float = setting(0.05, "in [0, 1], share of the questions of a round that may stay without an answer")
    max_usd: float | None = setting(None, "dollars that the run may spend on requests; it stops below, resumable")
    dry_run: bool = setting(False, "say what would be asked, and at what price; send and write nothing")

    def check_judge(self) -> None:
        """Settle who judges, and check the judge's options. ValueError naming the field."""
        self.oracle = self.oracle or ("openai" if self.judge_url or self.judge_model else "synthetic")
        check_source("oracle", self.oracle)
        teacher = getattr(self, "teacher", "synthetic")
        check_source("teacher", teacher)
        for name in ("judge_prices", "teacher_prices"):
            prices(getattr(self, name, None) or "0,0")
        judge, asked = self.oracle != "synthetic", {self.oracle, teacher} != {"synthetic"}
        live = "openai" in (self.oracle.partition(":")[0], teacher.partition(":")[0])
        of_use = {"judge_concurrency": asked, "judge_timeout": asked, "max_failed": asked,
                  "judge_form": judge, "judge_model": judge, "judge_cache": live, "judge_prices": live,
                  "judge_url": live, "max_usd": live}  # fmt: skip
        if self.oracle.startswith("openai:"):  # which names the model already
            of_use["judge_model"] = self.judge_model == self.oracle.partition(":")[2]
        idle = changed(self, *(name for name, use in of_use.items() if not use))
        if idle:
            raise ValueError(f"{idle} belong to a language model, and oracle is {self.oracle}; add --oracle openai:MODEL")
        check_ranges(self, judge_concurrency=(1, 1000), judge_timeout=(1e-3, 10**5), max_failed=(0, 1),
                     max_usd=(0, 10**9))  # fmt: skip


def check_source(name: str, source: str) -> None:
    """ValueError unless it is synthetic, openai[:MODEL] or replay:CACHE."""
    kind, colon, rest = source.partition(":")
    if kind == "openai" and colon and not rest.strip():
        raise ValueError(
            f"{name} is {source!r}; the model's name is missing: expected openai:MODEL"
        )
    if not (source == "synthetic" or kind == "openai" or (kind == "replay" and rest)):
        raise ValueError(f"{name} is {source!r}; expected synthetic, openai:MODEL or replay:CACHE")


def prices(text: str) -> Price:
    """The Price written as "2.5,10". ValueError if it is none."""
    try:
        prompt, completion = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"prices are {text!r}; expected dollars per million tokens of prompt and completion: 2.5,10") from None
    return Price(prompt, completion)


def open_judge(options: Any) -> Endpoint:
    """The endpoint of `JudgeOptions`. Refused if there can be none."""
    return open_endpoint(options, options.oracle, options.judge_model, options.judge_url, options.judge_prices, "judge")


def open_endpoint(options: Any, source: str, model: str | None, url: str | None, price: str | None, kind: str) -> Endpoint:
    """The endpoint that a source such as openai:MODEL names; kind: judge or teacher, whose price is the judge's if it is the
    same model and has none of its own. Refused if there can be none."""
    how, _, rest = source.partition(":")
    common = {"max_failed": options.max_failed, "run": str(Path(options.out).resolve())}
    if how == "replay":
        how = "name one: --judge-model NAME" if kind == "judge" else "give a cache of one teacher"
        name = model or only(recorded_models(rest, kind), rest, how)
        return Endpoint(name, cache=rest, live=False, **common)
    cache: Any = options.judge_cache or f"{options.out}/judgments.sqlite"
    if options.dry_run:
        cache = Ledger(cache, common["run"], read_only=True) if os.path.exists(cache) else None
    try:
        name = rest or model or only_model(url)
        price = price or (options.judge_prices if name == options.judge_model else None)
        return Endpoint(name, url, cache, client=make_client(url, options.dry_run), concurrency=options.judge_concurrency,
                        timeout=options.judge_timeout, price=prices(price) if price else None, max_usd=options.max_usd,
                        **common)  # fmt: skip
    except ValueError as error:
        raise BadInput(f"{kind}: {error} (--{kind}-prices 2.5,10, in dollars per million tokens)") from error


@dataclasses.dataclass
class AgreementOptions(JudgeOptions):
    """agreement: how far a judge agrees with people, on comparisons in a file."""

    figure: str | None = setting(None, "file to draw in (default: agreement.png in --out)")
    out: str = setting("runs/agreement", "folder for the figure and the judge's cache")

    def __post_init__(self) -> None:
        """Settle who judges: the answers recorded in the file if nobody is named. ValueError on a bad option."""
        named = self.oracle or self.judge_url or self.judge_model
        self.check_judge()
        self.oracle = self.oracle if named else "recorded"
        if self.figure is not None and not os.path.isdir(os.path.dirname(self.figure) or "."):
            raise ValueError(f"figure is {self.figure}; expected a file in a folder that exists")
        self.figure = self.figure or os.path.join(self.out, "agreement.png")
        kind, known = (
            os.path.splitext(self.figure)[1][1:],
            plt.Figure().canvas.get_supported_filetypes(),
        )
        if kind.lower() not in known:
            raise ValueError(
                f"figure is {self.figure}; expected a name that ends with one of "
                f".{', .'.join(sorted(known))}"
            )


def parse_agreement(argv: list[str]) -> tuple[str, AgreementOptions]:
    """(file, options) of `python oracle.py agreement`. Prints the help and exits 0 if asked to. BadInput on what is unknown."""
    parser = options_parser("oracle.py agreement", AgreementOptions)
    if "-h" in argv or "--help" in argv:
        print("usage: python oracle.py agreement FILE.jsonl [--option value ...]\n\n" + parser.format_help())
        sys.exit(0)
    if len(argv) < 2 or argv[0] != "agreement" or argv[1].startswith("-"):
        raise BadInput(f"the command is {' '.join(argv)!r}; expected agreement FILE.jsonl, and options after it")
    try:
        return argv[1], AgreementOptions(**vars(parser.parse_args(argv[2:])))
    except ValueError as error:
        raise BadInput(str(error)) from error


def hear_ctrl_c() -> None:
    """Have Ctrl-C raise KeyboardInterrupt, unless this process was started deaf to it, as a shell's background jobs are. For a
    program whose imports are done: while they last, it ends at once."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def guarded(program: str, work: Callable[[], Any]) -> int:
    """Do the work; the exit code: 0 done, 1 too many failures of a judge or another process lost, 2 bad input, 130 interrupted
    or at the limit of dollars, to go on with, 141 nobody reads the output any more (as in `... | head`)."""
    try:
        try:
            work()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        return 141  # a shell's for a process that SIGPIPE ended
    except (BadInput, Refused) as error:
        say(f"{program}: {error}".replace("\n", " "))
        return 2
    except (TooDear, KeyboardInterrupt) as error:
        more = [*["--resume"] * (program == "train.py"), *["a higher --max-usd"] * isinstance(error, TooDear)]
        command = " with ".join(["the same command", *([" and ".join(more)] if more else [])])
        say(f"\n{program}: {str(error) or 'interrupted'}; {command} goes on from there")
        return 130
    except Stopped as error:
        say(f"{program}: {error}")
        return 1
    except RuntimeError as error:
        if not (dist.is_initialized() and any(name in str(error) for name in ("gloo", "NCCL"))):
            raise
        reason = str(error).splitlines()[0]
        say(f"{program}: another process of the run is gone ({reason}); the same command with --resume goes on from there")
        return 1
    return 0


def say(line: str) -> None:
    """Print an error; of torchrun's processes on a machine, which all meet the same, only the first does."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(line, file=sys.stderr)


def join_team(device: str, threads: int) -> str:
    """Under torchrun, join the other processes: each takes its own GPU, or its part of the CPU threads; only the first prints.
    The device that this process has. BadInput if a machine has fewer GPUs than processes."""
    if not dist.is_torchelastic_launched():
        torch.set_num_threads(threads)
        return device
    place, here = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    torch.set_num_threads(max(1, threads // here))
    cuda = device.startswith("cuda")
    if cuda:
        if torch.cuda.device_count() < here:
            raise BadInput(f"{here} processes and {torch.cuda.device_count()} GPUs; expected --nproc-per-node of one a GPU")
        device = f"cuda:{place}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def leave_team() -> None:
    """Close what `join_team` opened. A group's threads end with the last reference to it; one that
    outlived the interpreter would abort the process when it let go of a tensor."""
    if not dist.is_initialized():
        return
    gc.collect()  # modules and their hooks, which refer to each other
    for mesh in [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]:
        getattr(mesh, "_pg_registry", {}).clear()  # DTensor's caches keep the mesh for good
    dist.destroy_process_group()


# --- The folder of a run ---------------------------------------------------------------------------------------------------

MAY_DIFFER = (  # between the start of a run and its resumption
    "out", "resume", "device", "threads", "jobs", "fsdp", "checkpointing", "compile", "judge_url", "judge_prices",
    "judge_cache", "judge_concurrency", "judge_timeout", "max_failed", "max_usd", "dry_run", "teacher_url", "teacher_prices",
)  # fmt: skip
BESIDE = (".part", ".lock", ".sqlite", ".sqlite-wal", ".sqlite-shm")  # may lie in the folder before a run starts
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # why a file cannot grow, though it could be made


@contextmanager
def claimed(out: str, resume: bool | None) -> Iterator[None]:
    """Around all that a run does: its folder, made if need be, which is this process's alone until
    it ends. resume: whether it goes on with a run; None if it never does.

    BadInput, before anything is loaded, if the folder cannot be written to, if another living
    process has it, or if it is to be resumed and is not there; later, if its disk is full."""
    folder, begun = Path(out), False
    if dist.is_torchelastic_launched() and os.environ["RANK"] != "0":
        yield  # the first of torchrun's processes has it for all
        return
    try:
        if resume and not folder.exists():
            raise BadInput(f"there is no run in {out} to go on with; leave --resume out to start one")
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
    """The folder, made if need be; if the work in it fails on bad input, it goes again if empty."""
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
    """run.lock in the folder, which one process at a time can have: the kernel takes it back from
    one that ends, however it does. BadInput if another process has it. Where there are no such
    locks, as on Windows, that is said and nothing is locked."""
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
        file.close()  # whoever had it has removed it since: there may be a new one


class Run:
    """The folder of one run: config.json, metrics.jsonl, checkpoint/state.pt, and what the preset adds.

    Raises BadInput, before anything is written, if `out` holds anything but a run of the same config, or one without --resume.
    `state` is the last checkpoint, or None at the start. classes: what it may hold beside tensors and plain values. device: for
    its tensors. Of several processes, which must share the folder, all read and the first one writes."""

    def __init__(self, preset: str, config: Any, classes: tuple[type, ...] = (), device: str | None = None):
        self.out, self.classes, self.device, team = Path(config.out), list(classes), device or config.device, Team()
        settings = {"preset": preset, **dataclasses.asdict(config)}
        fixed = {name: value for name, value in settings.items() if name not in MAY_DIFFER}
        self.mark = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()  # of what it writes to go on from
        started = self.out.exists() and any(path.suffix not in BESIDE for path in self.out.iterdir())
        self.state = self._earlier(settings) if started else None
        self.phases = (self._own("checkpoint/phases.pt", key=list) if started else None) or {}
        self.metrics, self.writes = self.state["metrics"] if self.state else [], team.rank == 0
        seen = team.together([(started, len(self.metrics), sorted(map(str, self.phases)))])  # after which it may be written to
        if any(other != seen[0] for other in seen):
            raise BadInput(f"the processes see different content in {self.out}; expected --out to be a folder that all share")
        if self.writes:
            (self.out / "checkpoint").mkdir(parents=True, exist_ok=True)
        if not started:
            self.write("config.json", json.dumps(settings, indent=2) + "\n")

    def _earlier(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        try:
            earlier = json.loads((self.out / "config.json").read_text())
            check_like(earlier, dict, "it")
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.out} holds something, but no readable config.json; choose another --out") from error
        for name in sorted(settings.keys() | earlier.keys()):
            if name not in MAY_DIFFER and settings.get(name) != earlier.get(name):
                difference = f"{name} is {earlier.get(name)!r} there and {settings.get(name)!r} here"
                raise BadInput(f"{self.out} holds another run: {difference}; choose another --out")
        if not settings["resume"]:
            raise BadInput(f"{self.out} holds this run already; add --resume to go on with it, or choose another --out")
        return self._own("checkpoint/state.pt", metrics=list)

    def _own(self, name: str, **kinds: type) -> dict[str, Any] | None:
        content = self.load(name)
        if content is None:
            return None
        if any(not isinstance(content.get(key), kind) for key, kind in {"mark": str, **kinds}.items()):
            raise BadInput(f"{self.out}/{name} is not a checkpoint of a run; choose another --out")
        if content.pop("mark") != self.mark:
            raise BadInput(f"{self.out}/{name} is not of this run, but of one with other settings; choose another --out")
        return content

    def load(self, name: str) -> dict[str, Any] | None:
        """What `keep` wrote, or None if it wrote nothing of that name. BadInput if it is not that."""
        path = self.out / name
        if not path.exists():
            return None
        try:
            with torch.serialization.safe_globals(self.classes):
                content = torch.load(path, weights_only=True, map_location=self.device)
        except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise BadInput(f"{path} is not a readable checkpoint ({type(error).__name__}); choose another --out") from error
        if not isinstance(content, dict):
            raise BadInput(f"{path} is not a checkpoint of a run; choose another --out")
        return content

    def expect(self, content: dict[str, Any], like: dict[str, Any]) -> None:
        """BadInput unless a checkpoint's content has what `like` has, as `check_like` compares the two."""
        try:
            check_like({name: content[name] for name in like if name in content}, like, "its content")
        except ValueError as error:
            raise self.foreign(str(error)) from error

    def foreign(self, reason: str) -> BadInput:
        """The error to raise if the checkpoint is not one of this run."""
        return BadInput(f"the checkpoint in {self.out} is not of this run ({reason}); choose another --out")

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the folder in one piece: whoever looks sees the old content or the new, also after a crash."""
        if not self.writes:
            return
        part = self.out / f".{Path(name).name}.part"
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, self.out / name)

    def write_lines(self, name: str, items: Iterable[dict[str, Any]]) -> None:
        """Write a .jsonl file of the folder, an object a line, in one piece."""
        self.write(name, "".join(json.dumps(item) + "\n" for item in items))

    def save(self, row: dict[str, Any], state: dict[str, Any]) -> None:
        """End an iteration: its row joins metrics.jsonl, then row and state become the checkpoint, atomically."""
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

    def remember(self, key: list[int], phase: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments), or what it was when this phase of the key (an iteration) was last reached: a run killed between
        phases does not repeat them. Only the last key's phases are kept."""
        if self.phases.get("key") != key:
            self.phases = {"key": key}
        if phase not in self.phases:
            self.phases[phase] = function(*arguments)
            self.keep("checkpoint/phases.pt", {**self.phases, "mark": self.mark})
        return self.phases[phase]

    def figure(self, name: str, figure: plt.Figure) -> None:
        """Save a figure as a PNG."""
        figure.savefig(self.out / name)
        plt.close(figure)


def check_like(found: Any, like: Any, name: str) -> None:
    """ValueError unless found is like: a type, of which it must be one; a tensor, whose shape and type it must have; a dict or
    list of such, whose keys or length it must have; or another value, to which it is not compared."""
    if isinstance(like, type | UnionType):
        fits = isinstance(found, like)
    elif isinstance(like, torch.Tensor):
        fits = isinstance(found, torch.Tensor) and (found.shape, found.dtype) == (like.shape, like.dtype)
    elif isinstance(like, dict):
        fits = isinstance(found, dict) and found.keys() == like.keys()
    else:
        fits = not isinstance(like, list) or (isinstance(found, list) and len(found) == len(like))
    if not fits:
        raise ValueError(f"{name} is {outline(found)}; expected {outline(like)}")
    parts = like.items() if isinstance(like, dict) else enumerate(like) if isinstance(like, list) else ()
    for key, part in parts:
        check_like(found[key], part, f"{name}[{key!r}]")


def outline(thing: Any) -> str:
    """What sort of thing it is, in a few words."""
    if isinstance(thing, torch.Tensor):
        return f"{thing.dtype} of shape {list(thing.shape)}"
    if isinstance(thing, dict | list):
        return f"a {type(thing).__name__} of {len(thing)}"
    return str(getattr(thing, "__name__", type(thing).__name__))


def check_device(name: str) -> torch.device:
    """The torch device of that name; BadInput if it is unknown or this machine has none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64).item()  # exact quantities need float64
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"device {name!r} cannot be used ({reason}); expected cpu, cuda or cuda:N with float64") from error
    return device
