"""The command line made from dataclasses, errors and exit codes, devices."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import signal
import sys
import typing
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from judge.ledger import Refused, Stopped, TooDear
from judge.prices import Price

DTYPES = {"float32": torch.float32, "float64": torch.float64}
COMPUTE = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # of real models
MOST = 10**9  # of counts and seeds: what torch and the machine take ends below it
TEMPERATURES = (0.01, 100)  # of sampling
THREADS = (1, 1024)  # with many more the OpenMP library ends the process


class BadInput(Exception):
    """The user can correct it: one line, exit code 2, nothing overwritten."""


# --- Options from dataclasses ---------------------------------------------------------------------


def setting(
    default: Any, help: str, choices: tuple[str, ...] | tuple[int, ...] | None = None
) -> Any:
    """A field of a preset's dataclass: its default, and help that gives unit, range and the paper's
    value if it has one.

    A field that is None by default and whose type is not optional is filled in by __post_init__."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        program = self.prog.partition(" ")[0]
        raise BadInput(f"{message}; `python {program} --help` lists what there is")


def options_parser(name: str, config: type) -> argparse.ArgumentParser:
    """A parser with one --option for each field of the dataclass, inherited ones last. BadInput on
    what it does not know."""
    summary = (config.__doc__ or "").strip().splitlines()[0]
    parser = _Parser(name, description=summary, allow_abbrev=False, add_help=False)
    hints, own = typing.get_type_hints(config), config.__annotations__
    for field in sorted(dataclasses.fields(config), key=lambda field: field.name not in own):
        add_option(parser, field, hints[field.name])
    return parser


def add_option(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    """Add the --option of a field, whose type is `hint`, with or without None."""
    kind = next(part for part in typing.get_args(hint) or (hint,) if part is not type(None))
    flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=help)
        return
    default, choices = field.default, field.metadata["choices"]
    shown = "" if default is None else f" (default: {default})"
    metavar = None if choices else kind.__name__.upper()
    parser.add_argument(
        flag, type=kind, default=default, choices=choices, metavar=metavar, help=help + shown
    )


def parse(argv: list[str], presets: dict[str, type], default: str) -> tuple[str, Any]:
    """(preset, its config) from the command line; prints the help and exits 0 if asked to. BadInput
    on anything unknown."""
    preset, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (default, argv)
    if preset not in presets:
        raise BadInput(f"unknown preset {preset!r}; expected one of {', '.join(presets)}")
    if "-h" in rest or "--help" in rest:
        print(f"usage: python train.py {preset} [--field value ...]\n")
        print(options_parser(f"train.py {preset}", presets[preset]).format_help())
        sys.exit(0)
    parser = options_parser(f"train.py {preset}", presets[preset])
    return preset, presets[preset](**vars(parser.parse_args(rest)))


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """ValueError naming the first field that is given and not within its range; NaN never is."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} is {value}; expected at least {least} and at most {most}")


def changed(config: Any, *names: str) -> str:
    """Those of the fields that differ from their defaults, spelt as on the command line."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    found = [name for name in names if getattr(config, name, None) != defaults.get(name)]
    return ", ".join(name.replace("_", "-") for name in found)


# --- Options of judges ----------------------------------------------------------------------------


@dataclasses.dataclass
class JudgeOptions:
    """Who judges, and what it may cost."""

    oracle: str = setting(
        None,
        "synthetic, openai:MODEL, or replay:CACHE (recorded replies, no network); when left out "
        "openai if --judge-url or --judge-model is given, else synthetic",
    )
    judge_url: str | None = setting(
        None, "of an OpenAI-compatible endpoint, http://localhost:8000/v1 say (default: OpenAI's)"
    )
    judge_model: str | None = setting(
        None, "the judge's name there (default: the only one that the endpoint has)"
    )
    judge_form: str = setting(
        "scored",
        "0 to 6 points for all candidates at once, or two at a time",
        ("scored", "pairwise"),
    )
    judge_prices: str | None = setting(
        None, "dollars per million tokens of prompt and completion: 2.5,10 (default: not known)"
    )
    judge_cache: str | None = setting(
        None, "file of all requests and replies (default: judgments.sqlite in --out)"
    )
    judge_concurrency: int = setting(16, "requests under way at a time")
    judge_timeout: float = setting(120.0, "seconds that a request may take")
    max_failed: float = setting(
        0.05, "in [0, 1], share of the questions of a round that may stay without an answer"
    )
    max_usd: float | None = setting(
        None, "dollars that the run may spend on requests; it stops below, resumable"
    )
    dry_run: bool = setting(
        False, "say what would be asked, and at what price; send and write nothing"
    )

    def check_judge(self) -> None:
        """Settle who judges, and check the judge's options. ValueError naming the field."""
        named = self.judge_url or self.judge_model
        self.oracle = self.oracle or ("openai" if named else "synthetic")
        check_source("oracle", self.oracle)
        check_source("teacher", getattr(self, "teacher", "synthetic"))
        for name in ("judge_prices", "teacher_prices"):
            prices(getattr(self, name, None) or "0,0")
        idle = changed(self, *self.unused())
        if idle:
            fault = f"{idle} belong to a language model, and oracle is {self.oracle}"
            raise ValueError(f"{fault}; add --oracle openai:MODEL")
        check_ranges(
            self,
            judge_concurrency=(1, 1000),
            judge_timeout=(1e-3, 10**5),
            max_failed=(0, 1),
            max_usd=(0, 10**9),
        )

    def unused(self) -> list[str]:
        """The options that have no effect with this judge and teacher."""
        teacher = getattr(self, "teacher", "synthetic")
        sources = (self.oracle, teacher)
        names = []
        if sources == ("synthetic", "synthetic"):
            names += ["judge_concurrency", "judge_timeout", "max_failed"]
        if self.oracle == "synthetic":
            names += ["judge_form"]
        how, _, model = self.oracle.partition(":")
        stated = how == "openai" and model  # the source itself names the model
        if self.judge_model != model if stated else self.oracle == "synthetic":
            names += ["judge_model"]
        if "openai" not in [source.partition(":")[0] for source in sources]:
            names += ["judge_cache", "judge_prices", "judge_url", "max_usd"]
        return names


def check_source(name: str, source: str) -> None:
    """ValueError unless it is synthetic, openai[:MODEL] or replay:CACHE."""
    kind, colon, rest = source.partition(":")
    if kind == "openai" and colon and not rest.strip():
        fault = f"{name} is {source!r}; the model's name is missing"
        raise ValueError(f"{fault}: expected openai:MODEL")
    if not (source == "synthetic" or kind == "openai" or (kind == "replay" and rest)):
        raise ValueError(f"{name} is {source!r}; expected synthetic, openai:MODEL or replay:CACHE")


def prices(text: str) -> Price:
    """The Price written as "2.5,10". ValueError if it is none."""
    try:
        prompt, completion = map(float, text.split(","))
    except ValueError:
        expected = "expected dollars per million tokens of prompt and completion: 2.5,10"
        raise ValueError(f"prices are {text!r}; {expected}") from None
    return Price(prompt, completion)


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
        if not (dist.is_initialized() and any(name in str(error) for name in ("gloo", "NCCL"))):
            raise
        reason = f"another process of the run is gone ({str(error).splitlines()[0]})"
        say(f"{program}: {reason}; {command_to_go_on('train.py', False)} goes on from there")
        return 1
    return 0


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


def join_team(device: str, threads: int) -> str:
    """Under torchrun, join the other processes; returns the device that this process has.

    Each takes its own GPU, or its part of the CPU threads. Only the first prints. BadInput if a
    machine has fewer GPUs than processes."""
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
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
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
