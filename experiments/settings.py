"""The command line made from dataclasses, errors and exit codes, devices."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from judge.ledger import Refused, Stopped, TooDear

DTYPES = {"float32": torch.float32, "float64": torch.float64}
COMPUTE = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # of real models
GROUPS = ("data", "algorithm", "model", "judge", "hardware", "run")  # of the help, in this order
METAVARS = {int: "N", float: "X", str: "NAME"}
MOST = 10**9  # of counts and seeds: what torch and the machine take ends below it
SHARE = (0, 1)
ETAS = (1e-9, 10**6)
RATES = (1e-9, 10)  # of Adam
TEMPERATURES = (0.01, 100)  # of sampling
THREADS = (1, 1024)  # with many more the OpenMP library ends the process


class BadInput(Exception):
    """The user can correct it: one line, exit code 2, nothing overwritten."""


# --- A setting is declared once -------------------------------------------------------------------


def setting(default: Any, help: str = "", group: str = "", **declared: Any) -> Any:
    """A field of a preset's dataclass: its default, its help with its unit, and what else holds.

    group: of GROUPS. common: is it among the first of its group in the help? within: (least,
    most). choices: what it may be. otherwise: what counts where the default is None. may_differ:
    may a run be resumed with another value? A preset that inherits a field and says only some of
    this, or gives it a plain default, keeps the rest (see `declarations`). A field that is None by
    default and whose type is not optional is filled in by __post_init__."""
    said = {"help": help, "group": group, **declared}
    return dataclasses.field(default=default, metadata={k: v for k, v in said.items() if v})


def declarations(config: type) -> dict[str, dict[str, Any]]:
    """What `setting` says of each field of a dataclass, a subclass's words before its base's."""
    found: dict[str, dict[str, Any]] = {}
    for base in reversed(config.__mro__):
        for name, field in getattr(base, "__dataclass_fields__", {}).items():
            found.setdefault(name, {}).update(field.metadata)
    return {field.name: found[field.name] for field in dataclasses.fields(config)}


def may_differ(config: type) -> set[str]:
    """The fields that may differ between the start of a run and its resumption."""
    return {name for name, said in declarations(config).items() if said.get("may_differ")}


def spelt(name: str) -> str:
    """A field's name as on the command line."""
    return name.replace("_", "-")


def span(within: tuple[float, float]) -> str:
    """A range in words."""
    return "{:,g} to {:,g}".format(*within).replace("e+0", "e").replace("e-0", "e-")


@dataclasses.dataclass
class Options:
    """What the options of all programs share."""

    def __post_init__(self) -> None:
        """ValueError naming the first field that is given and not within its range; NaN never
        is."""
        for name, said in declarations(type(self)).items():
            value, within = getattr(self, name), said.get("within")
            if value is not None and within and not within[0] <= value <= within[1]:
                raise ValueError(f"{name} is {value}; expected {span(within)}")

    def idle(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and why."""
        return {}

    def given(self, *names: str) -> list[str]:
        """Those of the fields that differ from their defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def note(self) -> None:
        """Say in a line what is given and has no effect."""
        idle = self.idle()
        found = [f"{spelt(name)} has no effect: {idle[name]}" for name in self.given(*idle)]
        if found:
            print("note: " + "; ".join(found))


# --- The command line -----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; `python {self.prog} --help` lists what there is")


def parse(words: list[str], config: type, command: str) -> Any:
    """The config of a command line.

    command: the words before the options, such as "train.py game". Prints the help and exits 0 if
    asked to. BadInput on what is unknown or out of range."""
    parser = options_parser(config, command)
    try:
        return config(**vars(parser.parse_args(words)))
    except ValueError as error:  # a config's own checks
        raise BadInput(str(error)) from error


def options_parser(config: type, command: str) -> argparse.ArgumentParser:
    """A parser with one --option for each field of the dataclass, in groups, common ones first."""
    parser = _Parser(
        command,
        f"python {command} [--option value ...]",
        " ".join((config.__doc__ or "").split()),
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=28, width=100),
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    hints, declared = typing.get_type_hints(config), declarations(config)
    fields = dataclasses.fields(config)
    for field in sorted(fields, key=lambda field: not declared[field.name].get("common")):
        said = declared[field.name]
        add_option(groups[said["group"]], field, hints[field.name], said)
    return parser


def add_option(
    group: argparse._ArgumentGroup, field: dataclasses.Field, hint: Any, said: dict[str, Any]
) -> None:
    """Add the --option of a field, whose type is `hint`, with or without None."""
    kind = next(part for part in typing.get_args(hint) or (hint,) if part is not type(None))
    flag, help, default = "--" + spelt(field.name), said["help"], field.default
    if kind is bool:
        group.add_argument(flag, action="store_true", help=help)
        return
    choices, shown = said.get("choices"), said.get("otherwise") if default is None else default
    known = [f"default {shown}"] if shown not in (None, "") else []
    known += [span(said["within"])] if "within" in said else []
    if choices and kind is str:
        known += ["or " + ", ".join(choice for choice in choices if choice != default)]
    group.add_argument(
        flag,
        type=kind,
        default=default,
        choices=choices,
        metavar=METAVARS[kind],
        help=f"{help} ({'; '.join(known)})" if known else help,
    )


# --- Options of runs -------------------------------------------------------------------


@dataclasses.dataclass
class RunOptions(Options):
    """Where a run is written, what it starts from, and the machine that it is on."""

    preset: ClassVar[str]
    seed: int = setting(0, "of all that is drawn at random", "run", common=True, within=(0, MOST))
    out: str = setting(
        None, "folder of the run", "run", common=True, may_differ=True, otherwise="runs/PRESET-SEED"
    )
    resume: bool = setting(
        False,
        "go on with the run in --out, as if it had never stopped",
        "run",
        common=True,
        may_differ=True,
    )
    device: str = setting("cpu", "cpu, cuda or cuda:N", "hardware", common=True, may_differ=True)
    dtype: str = setting("float32", "of the transformer", "hardware", choices=tuple(DTYPES))
    threads: int = setting(2, "of the CPU", "hardware", may_differ=True, within=THREADS)

    def __post_init__(self) -> None:
        """Name the folder, and check every number. ValueError naming the field."""
        super().__post_init__()
        self.out = self.out or f"runs/{self.preset}-{self.seed}"


# --- Exit codes -----------------------------------------------------------------------------------


def hear_ctrl_c() -> None:
    """Have Ctrl-C raise KeyboardInterrupt, unless this process was started to ignore it, as a
    shell's background jobs are. For a program whose imports are done: while they last, it ends at
    once."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def guarded(program: str, work: Callable[[], Any]) -> int:
    """Do the work and return the exit code.

    0: done. 1: a judge failed too often, or another process is lost. 2: bad input. 130: interrupted
    or at the limit of dollars; the run can go on. 141: nobody reads the output any more, as in
    `... | head`."""
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
        command = command_to_go_on(program, isinstance(error, TooDear))
        say(f"\n{program}: {str(error) or 'interrupted'}; {command} goes on from there")
        return 130
    except Stopped as error:
        say(f"{program}: {error}")
        return 1
    except RuntimeError as error:
        if not of_the_group(error):
            raise
        reason = f"another process of the run is gone ({str(error).splitlines()[0]})"
        say(f"{program}: {reason}; {command_to_go_on('train.py', False)} goes on from there")
        return 1
    return 0


def of_the_group(error: RuntimeError) -> bool:
    """Is the error one of the exchange between processes, as when one of them is gone?

    NCCL and the store raise DistError, gloo a plain RuntimeError. So of those it counts in which
    module the error was met, and backpropagation counts too: DistributedDataParallel exchanges
    gradients there, by hooks that leave no frame. The error's text is printed, so that nothing is
    hidden if it is another one."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    exchanging = ("torch.distributed", "torch.nn.parallel", "torch.autograd")
    plain = type(error) is RuntimeError and frame.f_globals["__name__"].startswith(exchanging)
    return dist.is_initialized() and (plain or isinstance(error, dist.DistError))


def command_to_go_on(program: str, too_dear: bool) -> str:
    """What to run after an interruption, in words."""
    more = ["--resume"] if program == "train.py" else []
    more += ["a higher --max-usd"] if too_dear else []
    return " with ".join(["the same command", " and ".join(more)] if more else ["the same command"])


def say(line: str) -> None:
    """Print an error. Of torchrun's processes on a machine, which all meet the same, only the first
    prints it."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(line, file=sys.stderr)


# --- Processes and devices ------------------------------------------------------------------------


def first_process() -> bool:
    """Is this the first of torchrun's processes, or the only one?"""
    return not dist.is_torchelastic_launched() or os.environ.get("RANK", "0") == "0"


def only_the_first_prints() -> AbstractContextManager:
    """Around the work of a program that torchrun may have started: what other processes print is
    thrown away."""
    return nullcontext() if first_process() else redirect_stdout(open(os.devnull, "w"))


def join_team(device: str, threads: int) -> str:
    """Under torchrun, join the other processes; returns the device that this process has.

    Each takes its own GPU, or its part of the CPU threads. BadInput if a machine has fewer GPUs
    than processes."""
    if not dist.is_torchelastic_launched():
        torch.set_num_threads(threads)
        return device
    place, here = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    torch.set_num_threads(max(1, threads // here))
    cuda = device.startswith("cuda")
    if cuda:
        gpus = torch.cuda.device_count()
        if gpus < here:
            expected = "expected --nproc-per-node of one a GPU"
            raise BadInput(f"{here} processes and {gpus} GPUs; {expected}")
        device = f"cuda:{place}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device


def leave_team() -> None:
    """Close what `join_team` opened.

    A group's threads end with the last reference to it. One that outlived the interpreter would
    abort the process when it let go of a tensor."""
    if not dist.is_initialized():
        return
    gc.collect()  # modules and their hooks, which refer to each other
    for mesh in [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]:
        getattr(mesh, "_pg_registry", {}).clear()  # DTensor's caches keep the mesh for good
    dist.destroy_process_group()


def check_device(name: str) -> torch.device:
    """The torch device of that name; BadInput if it is unknown or this machine has none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64).item()  # exact quantities need float64
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        fault = f"device {name!r} cannot be used ({str(error).splitlines()[0]})"
        raise BadInput(f"{fault}; expected cpu, cuda or cuda:N with float64") from error
    return device
