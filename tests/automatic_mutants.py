"""Does every operator, number and condition of `FILES` matter to some test?

Mutants made by machine, tried fast.

    python tests/automatic_mutants.py [dno.py oracle.py ...] [--sample N] [--only FILE:LINE]
        [--resume FILE]          (about 30 minutes)

Prints a line for every survivor and the totals of each file; exits 1 below 90%. Not part of the
test suite, like mutants.py.

A mutant changes one place: an operator (`OPERATORS`), a number (-1 is one number), True, False, a
condition (negated), a keyword argument (dropped), a function (`SWAPPED`), a method or attribute
(`DROPPED`), a string that is compared with or a default, a statement that is a call or sets an
attribute or an item (deleted), break, continue.

Left out: docstrings, annotations, type aliases, protocols, messages (raise, print, f-strings), and
zip's strict, which only guards against errors of the programmer.

Each mutant has a fork of this process, which has imported all but the project, and runs only the
tests that execute the mutated line, fastest first, on a copy of the project. What is executed when
the module is imported is tried on the tests of what uses it. Which lines a test executes and how
long it takes is measured once (2 minutes) and kept beside the results, in /tmp."""

import argparse
import ast
import gc
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

for library in ("OMP", "OPENBLAS", "MKL"):  # a fork needs a process of one thread
    os.environ[f"{library}_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent
CACHE = Path(tempfile.gettempdir()) / "automatic_mutants"
TRIED = ("paper", "model", "judge", "experiments/test_agreement.py", "experiments/test_llm.py")
LEFT_OUT = (
    "recordings",
    "faults",
    "endpoint_settings",
    "who_is_asked",
    "money",
    "ledger",
    "secrets",
)
FILES = (
    "dno.py",
    "checks.py",
    "pairs.py",
    "regularized.py",
    "fits.py",
    "relatives.py",
    "solvers.py",
    "oracle.py",
)
MODULES = (
    "torch",
    "torch._dynamo",
    "numpy",
    "scipy.optimize",
    "scipy.sparse.csgraph",
    "scipy.stats",
    "matplotlib.pyplot",
    "openai",
    "tiktoken",
    "tqdm",
    "doctest",
    "sqlite3",
    "pytest",
)
OPERATORS = {  # what becomes what
    ast.Add: "+-",
    ast.Sub: "-+",
    ast.Mult: "*/",
    ast.Div: "/*",
    ast.Mod: ("%", "//"),
    ast.FloorDiv: ("//", "*"),
    ast.Pow: ("**", "*"),
    ast.MatMult: "@*",
    ast.BitAnd: "&|",
    ast.BitOr: "|&",
    ast.LShift: ("<<", ">>"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
PAIRS = (
    "amax amin",
    "argmax argmin",
    "max min",
    "sum mean",
    "any all",
    "triu tril",
    "log_softmax softmax",
    "cumsum cumprod",
    "floor ceil",
    "zeros ones",
    "zeros_like ones_like",
    "startswith endswith",
    "nanmean nansum",
    "mean std",
)
SWAPPED = {old: new for pair in reversed(PAIRS) for old, new in (pair.split(), pair.split()[::-1])}
DROPPED = {"mT", "T", "abs", "clamp", "clip", "detach", "clone", "double", "flatten"}


@dataclass
class Mutant:
    """One change of one file, whose content it makes changed. name: the line before and after, and
    which of those of that name; scope: the lines whose execution it may change; used_as: if the
    line is executed on import, the name that it defines."""

    file: str
    line: int
    name: str
    changed: bytes
    scope: set[int]
    used_as: str


class Generator:
    """Collects the mutants of a source text in `found`."""

    def __init__(self, file: str, source: str):
        self.file, self.data, self.scope, self.name = file, source.encode(), set(), ""
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []
        self.names = Counter()
        self.visit(ast.parse(source))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where the node begins and ends in the bytes."""
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[
            node.end_lineno - 1
        ] + node.end_col_offset

    def add(self, start: int, end: int, new: str) -> None:
        """Note the mutant if it can be compiled."""
        changed, line = (
            self.data[:start] + new.encode() + self.data[end:],
            self.data[:start].count(b"\n"),
        )
        try:
            compile(changed, self.file, "exec", dont_inherit=True)
        except SyntaxError:
            return
        name = "  ->  ".join(
            text.decode().splitlines()[line].strip() for text in (self.data, changed)
        )
        self.names[name] += 1
        name += f"  (no. {self.names[name]})" if self.names[name] > 1 else ""
        self.found.append(Mutant(self.file, line + 1, name, changed, set(self.scope), self.name))

    def operator(self, left: ast.AST, operator: ast.AST, right: ast.AST) -> None:
        """Swap the operator that stands between two nodes."""
        old, new = OPERATORS[type(operator)]
        start = self.span(left)[1]
        place = start + self.data[start : self.span(right)[0]].index(old.encode())
        self.add(place, place + len(old), new)

    def condition(self, test: ast.AST) -> None:
        """Negate a test, unless the mutants of its operator do."""
        match test:
            case ast.UnaryOp(ast.Not()):
                return
            case ast.Compare(
                ops=[ast.Eq() | ast.NotEq() | ast.In() | ast.NotIn() | ast.Is() | ast.IsNot()]
            ):
                return
        start, end = self.span(test)
        self.add(start, end, f"(not ({self.data[start:end].decode()}))")

    def number(self, node: ast.AST, value: float) -> None:
        """Replace a number by its neighbour, if it is whole, or by half of it, or by ten times it,
        if it is small."""
        if isinstance(value, int):
            new = value + 1 if value >= 0 else value - 1
        else:
            new = 1.0 if value == 0 else 10 * value if abs(value) < 0.01 else value / 2
        self.add(*self.span(node), repr(new))

    def strings(self, nodes: list[ast.AST | None]) -> None:
        """Spoil those of the nodes that are strings."""
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.add(*self.span(node), repr(node.value + "X"))

    def call(self, node: ast.Call) -> None:
        """Swap the function, drop the method, drop keyword arguments; float("nan") becomes another
        number."""
        name, end = (
            getattr(node.func, "attr", getattr(node.func, "id", "")),
            self.span(node.func)[1],
        )
        if name in SWAPPED:
            self.add(end - len(name), end, SWAPPED[name])
        if name in DROPPED and isinstance(node.func, ast.Attribute):
            self.add(self.span(node.func.value)[1], self.span(node)[1], "")
        if name == "float" and isinstance(node.args[0], ast.Constant):
            self.add(
                *self.span(node.args[0]),
                repr({"nan": "0", "inf": "-inf", "-inf": "inf"}[node.args[0].value]),
            )
        for keyword in node.keywords:
            if keyword.arg not in (None, "strict"):
                start, end = self.span(keyword)
                after, before = (
                    re.match(rb"\s*,\s*", self.data[end:]),
                    re.search(rb",\s*$", self.data[:start]),
                )
                self.add(
                    *(
                        (start, end + after.end())
                        if after
                        else (before.start() if before else start, end)
                    ),
                    "",
                )

    def visit(self, node: ast.AST) -> None:
        """Collect the mutants of a node and of what it is made of."""
        kept, children = (self.scope, self.name), list(ast.iter_child_nodes(node))
        if isinstance(node, ast.stmt):
            inner = [
                part for name in ("body", "orelse", "handlers") for part in getattr(node, name, [])
            ]
            self.scope = set(
                range(
                    node.lineno,
                    max(node.lineno, inner[0].lineno - 1 if inner else node.end_lineno) + 1,
                )
            )
            target = getattr(node, "targets", [getattr(node, "target", None)])[0]
            name = target.id if isinstance(target, ast.Name) else getattr(node, "name", "")
            self.name = "|".join(
                filter(None, (self.name, name))
            )  # a field is used by what names it or its class
        match node:
            case ast.Raise() | ast.JoinedStr():
                children = []
            case ast.ClassDef(bases=[ast.Name("Protocol")]):
                children = []
            case (
                ast.Expr(ast.Constant() | ast.Call(ast.Name("print")))
                | ast.Assign(value=ast.Subscript(ast.Name("Callable")))
            ):
                children = []
            case ast.FunctionDef():  # defaults and decorators concern the whole body
                self.scope = set(range(node.body[0].lineno, node.end_lineno + 1))
                defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
                self.strings(defaults)
                children = [*defaults, *node.decorator_list, *node.body]
            case ast.AnnAssign():
                self.strings([node.value])
                children = [node.value] if node.value else []
            case ast.Assign() if all(
                isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets
            ):
                self.add(*self.span(node), "pass")
            case ast.Expr(ast.Call()):
                self.add(*self.span(node), "pass")
            case ast.Break() | ast.Continue():
                self.add(*self.span(node), "continue" if isinstance(node, ast.Break) else "break")
            case ast.AugAssign():
                self.operator(node.target, node.op, node.value)
            case ast.BinOp():
                self.operator(node.left, node.op, node.right)
            case ast.BoolOp():
                for left, right in pairwise(node.values):
                    self.operator(left, node.op, right)
            case ast.Compare():
                for (left, right), operator in zip(
                    pairwise([node.left, *node.comparators]), node.ops, strict=True
                ):
                    self.operator(left, operator, right)
                    self.strings(right.elts if isinstance(right, ast.Tuple) else [right])
            case ast.UnaryOp(ast.USub(), ast.Constant(value)):  # a negative number is one number
                self.number(node, -value)
                children = []
            case ast.UnaryOp():
                start = self.span(node)[0]
                self.add(start, start + (3 if isinstance(node.op, ast.Not) else 1), "")
            case ast.Constant(bool()):
                self.add(*self.span(node), repr(not node.value))
            case ast.Constant(int() | float()):
                self.number(node, node.value)
            case ast.Attribute(attr="mT" | "T"):
                self.add(self.span(node.value)[1], self.span(node)[1], "")
            case ast.If() | ast.While() | ast.IfExp():
                self.condition(node.test)
            case ast.comprehension():
                for test in node.ifs:
                    self.condition(test)
            case ast.Call():
                self.call(node)
            case (
                ast.keyword(None | "strict") | ast.keyword(value=ast.Constant(bool()))
            ):  # dropping it flips it
                children = []
        for child in children:
            self.visit(child)
        self.scope, self.name = kept


class Tests:
    """Which tests execute a line and how long they take, measured on a copy of the project, which
    then holds compiled files."""

    def __init__(self, root: Path):
        files = sorted(
            [
                *root.glob("*.py"),
                *root.glob("*/*.py"),
                *root.glob("tests/*/*.py"),
                root / "pyproject.toml",
            ]
        )
        key = hashlib.sha256(
            b"".join(path.read_bytes() for path in files if path.name != Path(__file__).name)
        ).hexdigest()[:16]
        self.project = CACHE / key / "project"
        if not (CACHE / key / "times.xml").exists():
            print("measuring which test executes what ...", flush=True)
            shutil.rmtree(CACHE / key, ignore_errors=True)
            shutil.copytree(
                root, self.project, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__")
            )
            chosen = [f"tests/{name}" for name in TRIED]
            chosen += [f"--ignore-glob=*/judge/test_{name}*" for name in LEFT_OUT]  # no formulas
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                *(f"--cov={file.removesuffix('.py')}" for file in FILES),
                "--cov-context=test",
                "--cov-report=",
                f"--junitxml={CACHE / key / 'partial.xml'}",
            ]
            subprocess.run(
                [*command, *chosen],
                cwd=self.project,
                check=True,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
            )
            (CACHE / key / "partial.xml").rename(CACHE / key / "times.xml")
        self.times: dict[str, float] = defaultdict(lambda: 1.0)  # of a test, with parameters
        for case in ET.parse(CACHE / key / "times.xml").iter("testcase"):
            self.times[f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"] = float(
                case.get("time")
            )
        self.all_of: dict[str, set[str]] = defaultdict(set)  # function -> its parametrised tests
        for test in self.times:
            self.all_of[test.split("[")[0]].add(test)
        self.text: dict[str, str] = defaultdict(str)  # of a function
        for path in self.project.glob("tests/*/test_*.py"):
            lines = path.read_text().splitlines()
            for node in ast.parse("\n".join(lines)).body:
                if isinstance(node, ast.FunctionDef):
                    first = min(part.lineno for part in (node, *node.decorator_list))
                    self.text[f"{path.relative_to(self.project)}::{node.name}"] = "\n".join(
                        lines[first - 1 : node.end_lineno]
                    )
        import coverage

        data = coverage.CoverageData(self.project / ".coverage")
        data.read()
        self.of_line: dict[tuple[str, int], set[str]] = {}
        for path in data.measured_files():
            for line, contexts in data.contexts_by_lineno(path).items():
                self.of_line[Path(path).name, line] = {
                    context.rpartition("|")[0] for context in contexts
                }

    def of(self, mutant: Mutant, source: str, budget: float) -> list[str]:
        """The tests to run, fastest first, of no more than budget seconds in all; [] if the line is
        never executed."""
        found: set[str] = set().union(
            *(self.of_line.get((mutant.file, line), set()) for line in mutant.scope)
        )
        if found == {""}:  # on import only: whatever executes a line that names it
            name = re.compile(rf"\b({mutant.used_as})\b")
            named = [i for i, line in enumerate(source.splitlines(), 1) if name.search(line)]
            found = set().union(*(self.of_line.get((mutant.file, line), set()) for line in named))
            found |= {test for test in self.times if name.search(self.text[test.split("[")[0]])}
            if found <= {""}:
                found = set().union(
                    *(tests for (file, _), tests in self.of_line.items() if file == mutant.file)
                )
        chosen: dict[str, float] = defaultdict(
            float
        )  # a function with all its parameters, if they are quick
        for test in found - {""}:
            function = test.split("[")[0]
            whole = sum(self.times[other] for other in self.all_of[function])
            chosen[function if whole < 0.5 else test] = whole if whole < 0.5 else self.times[test]
        tests, spent = [], 0.0
        for test in sorted(chosen, key=chosen.__getitem__):
            spent += chosen[test]
            if tests and (spent > budget or chosen[test] > 10):
                break
            tests.append(test)
        return tests


class Watch:
    """Kills its own process when a test takes too long, and tells which test failed."""

    def __init__(self, times: dict[str, float], failed: int):
        self.times, self.failed = times, failed

    def pytest_runtest_setup(self, item) -> None:
        """SIGALRM is not handled, so that it ends the process whatever it is at."""
        signal.alarm(int(15 + 10 * self.times.get(item.nodeid, 1.0)))

    def pytest_runtest_logreport(self, report) -> None:
        """Write the name of a failed test to the pipe."""
        if report.failed:
            os.write(self.failed, report.nodeid.encode()[:1000])


def run(project: Path, tests: list[str], times: dict[str, float], *options: str) -> tuple[str, str]:
    """killed, timed out or survived, and the test that told: the tests run on the project in a fork
    of this process."""
    import pytest

    told, failed = os.pipe()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            signal.alarm(60)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
            os.chdir(project)
            os.environ.update(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTHONDONTWRITEBYTECODE="1")
            sys.dont_write_bytecode = True
            flags = [
                "-x",
                "-q",
                "--tb=no",
                "-p",
                "no:cacheprovider",
                f"--basetemp={project.parent / 'tmp'}",
                *options,
            ]
            code = int(pytest.main([*flags, *tests], plugins=[Watch(times, failed)]))
        finally:
            os._exit(code)
    os.close(failed)
    status = os.waitpid(child, 0)[1]
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests started
    with os.fdopen(told, "rb") as pipe:
        test = pipe.read().decode()
    if os.WIFSIGNALED(status):
        return (
            "timed out" if os.WTERMSIG(status) == signal.SIGALRM else "killed"
        ), f"signal {os.WTERMSIG(status)}"
    return (
        "survived" if os.WEXITSTATUS(status) == 0 else "killed"
    ), test or f"exit code {os.WEXITSTATUS(status)}"


def preload() -> None:
    """Import what the project imports, but not it; with one thread, before any operation."""
    for module in MODULES:
        importlib.import_module(module)
    sys.modules["matplotlib"].use("Agg")
    sys.modules["torch"].set_num_threads(1)
    gc.freeze()  # or each fork copies all of that as it looks for garbage


def main() -> int:
    """Try the mutants; 1 if fewer than 90% of a file's are killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=FILES, help=", ".join(FILES))
    parser.add_argument("--sample", type=int, help="a random subset of so many")
    parser.add_argument("--only", help="FILE:LINE")
    parser.add_argument(
        "--resume", type=Path, help="results of an earlier run, to be left as they are and added to"
    )
    parser.add_argument(
        "--retry", action="store_true", help="with --resume: survivors are tried again"
    )
    parser.add_argument(
        "--budget", type=float, default=15.0, help="at most so many seconds of tests a mutant"
    )
    options = parser.parse_args()
    if unknown := set(options.files) - set(FILES):
        parser.error(f"{', '.join(unknown)}: it is measured only what executes {', '.join(FILES)}")
    tests, began = Tests(ROOT), time.time()
    sources = {file: (tests.project / file).read_text() for file in options.files}
    mutants = [
        mutant for file, source in sources.items() for mutant in Generator(file, source).found
    ]
    if options.only:
        mutants = [mutant for mutant in mutants if f"{mutant.file}:{mutant.line}" == options.only]
    if options.sample:
        mutants = random.Random(0).sample(mutants, min(options.sample, len(mutants)))
    results = options.resume or CACHE / f"results-{time.strftime('%H%M%S')}.jsonl"
    known = (
        {row["mutant"]: row for row in map(json.loads, results.read_text().splitlines())}
        if results.exists()
        else {}
    )
    preload()
    totals, ran = Counter(), 0
    with tempfile.TemporaryDirectory() as folder, results.open("a") as log:
        project = shutil.copytree(tests.project, Path(folder) / "project")
        needed = sorted(
            {
                test
                for mutant in mutants
                for test in tests.of(mutant, sources[mutant.file], options.budget)
            }
        )
        if run(project, needed, tests.times, "--collect-only")[0] != "survived":
            raise SystemExit("some test cannot be found in the project as it is")
        for mutant in mutants:
            key = f"{mutant.file}: {mutant.name}"
            if key not in known or (options.retry and known[key]["outcome"] == "survived"):
                chosen, start = tests.of(mutant, sources[mutant.file], options.budget), time.time()
                outcome, test = "survived", "not executed"
                if chosen:
                    (project / mutant.file).write_bytes(mutant.changed)
                    outcome, test = run(project, chosen, tests.times)
                    shutil.copy2(tests.project / mutant.file, project / mutant.file)
                known[key] = {
                    "mutant": key,
                    "outcome": outcome,
                    "test": test,
                    "seconds": round(time.time() - start, 2),
                }
                log.write(json.dumps(known[key]) + "\n")
                log.flush()
                ran += 1
            totals[mutant.file, known[key]["outcome"]] += 1
            if known[key]["outcome"] == "survived":
                print(f"{mutant.file}:{mutant.line}  {mutant.name}", flush=True)
    worst = 1.0
    for file in options.files:
        killed, late, survived = (
            totals[file, outcome] for outcome in ("killed", "timed out", "survived")
        )
        share = (killed + late) / max(1, killed + late + survived)
        total = killed + late + survived
        print(
            f"{file}: {total} mutants, {killed} killed, {late} timed out, {survived} survived: "
            f"{share:.1%}"
        )
        worst = min(worst, share)
    print(f"{ran} tried in {(time.time() - began) / 60:.1f} minutes; results in {results}")
    return int(worst < 0.9)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    sys.exit(main())
