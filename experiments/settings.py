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


class BadInput(Exception):
    """The user can mend it: one line, exit code 2, nothing overwritten."""


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a preset's dataclass: its default, and help that gives unit, range and the paper's
    value if it has one."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(
            f"{message}; `python {self.prog.partition(' ')[0]} --help` lists what there is"
        )


def options_parser(name: str, config: type) -> argparse.ArgumentParser:
    """A parser with one --option for each field of the dataclass, inherited ones last. BadInput on
    what it does not know."""
    summary = (config.__doc__ or "").strip().splitlines()[0]
    parser = _Parser(name, description=summary, allow_abbrev=False, add_help=False)
    for field in sorted(
        dataclasses.fields(config), key=lambda field: field.name not in config.__annotations__
    ):
        kind = typing.get_type_hints(config)[field.name]
        kind = next(part for part in typing.get_args(kind) or (kind,) if part is not type(None))
        flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
        else:
            shown = "" if field.default is None else f" (default: {field.default})"
            choices, metavar = (
                field.metadata["choices"],
                None if field.metadata["choices"] else kind.__name__.upper(),
            )
            parser.add_argument(
                flag,
                type=kind,
                default=field.default,
                choices=choices,
                metavar=metavar,
                help=help + shown,
            )
    return parser


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
    return preset, presets[preset](
        **vars(options_parser(f"train.py {preset}", presets[preset]).parse_args(rest))
    )


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
        None,
        "synthetic, openai:MODEL, or replay:CACHE (recorded replies, no network); when left out openai if --judge-url or "
        "--judge-model is given, else synthetic",
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
        None, "dollars per million tokens of prompt and completion: 2.5,10 (default: as listed)"
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
        self.oracle = self.oracle or (
            "openai" if self.judge_url or self.judge_model else "synthetic"
        )
        check_source("oracle", self.oracle)
        teacher = getattr(self, "teacher", "synthetic")
        check_source("teacher", teacher)
        for name in ("judge_prices", "teacher_prices"):
            prices(getattr(self, name, None) or "0,0")
        judge, asked = self.oracle != "synthetic", {self.oracle, teacher} != {"synthetic"}
        live = "openai" in (self.oracle.partition(":")[0], teacher.partition(":")[0])
        of_use = {
            "judge_concurrency": asked,
            "judge_timeout": asked,
            "max_failed": asked,
            "judge_form": judge,
            "judge_model": judge,
            "judge_cache": live,
            "judge_prices": live,
            "judge_url": live,
            "max_usd": live,
        }
        if self.oracle.startswith("openai:"):  # which names the model already
            of_use["judge_model"] = self.judge_model == self.oracle.partition(":")[2]
        idle = changed(self, *(name for name, use in of_use.items() if not use))
        if idle:
            raise ValueError(
                f"{idle} belong to a language model, and oracle is {self.oracle}; add --oracle openai:MODEL"
            )
        check_ranges(
            self,
            judge_concurrency=(1, 1000),
            judge_timeout=(1e-3, 10**5),
            max_failed=(0, 1),
            max_usd=(0, 10**9),
        )


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
        raise ValueError(
            f"prices are {text!r}; expected dollars per million tokens of prompt and completion: 2.5,10"
        ) from None
    return Price(prompt, completion)


def hear_ctrl_c() -> None:
    """Have Ctrl-C raise KeyboardInterrupt, unless this process was started deaf to it, as a shell's
    background jobs are. For a program whose imports are done: while they last, it ends at once."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def guarded(program: str, work: Callable[[], Any]) -> int:
    """Do the work; the exit code: 0 done, 1 too many failures of a judge or another process lost, 2
    bad input, 130 interrupted or at the limit of dollars, to go on with, 141 nobody reads the
    output any more (as in `... | head`)."""
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
        more = [
            *["--resume"] * (program == "train.py"),
            *["a higher --max-usd"] * isinstance(error, TooDear),
        ]
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
        say(
            f"{program}: another process of the run is gone ({reason}); the same command with --resume goes on from there"
        )
        return 1
    return 0


def say(line: str) -> None:
    """Print an error; of torchrun's processes on a machine, which all meet the same, only the first
    does."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(line, file=sys.stderr)


def join_team(device: str, threads: int) -> str:
    """Under torchrun, join the other processes: each takes its own GPU, or its part of the CPU
    threads; only the first prints. The device that this process has. BadInput if a machine has
    fewer GPUs than processes."""
    if not dist.is_torchelastic_launched():
        torch.set_num_threads(threads)
        return device
    place, here = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    torch.set_num_threads(max(1, threads // here))
    cuda = device.startswith("cuda")
    if cuda:
        if torch.cuda.device_count() < here:
            raise BadInput(
                f"{here} processes and {torch.cuda.device_count()} GPUs; expected --nproc-per-node of one a GPU"
            )
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


def check_device(name: str) -> torch.device:
    """The torch device of that name; BadInput if it is unknown or this machine has none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64).item()  # exact quantities need float64
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"device {name!r} cannot be used ({reason}); expected cpu, cuda or cuda:N with float64"
        ) from error
    return device


DTYPES = {"float32": torch.float32, "float64": torch.float64}
COMPUTE = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # of real models
MOST = 10**9  # of counts and seeds: what torch and the machine take ends below it
TEMPERATURES = (0.01, 100)  # of sampling
THREADS = (1, 1024)  # of many more the OpenMP library ends the process
