"""README.md and the pages of docs/, as the tests read them."""

import csv
import re

from helpers import ROOT

PAGES = {  # path from the root -> text
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
README = PAGES["README.md"]
ALL = "\n\n".join(PAGES.values())


def section(page, heading):
    """What stands between this heading of a page and the next of its level or above."""
    level, text = heading.split(" ")[0], PAGES[page]
    assert f"\n{heading}\n" in text, f"{page} has no {heading}"
    return re.split(rf"\n#{{1,{len(level)}}} ", text.split(f"\n{heading}\n")[1])[0]


def table(text, start):
    """The rows [[cell]] of the Markdown table whose first line starts so."""
    lines = (start + text.split(start)[1].split("\n\n")[0]).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]


def explained_columns(heading="## Sampled responses"):
    """The columns of metrics.jsonl that docs/runs.md explains under this heading."""
    cells = re.findall(r"^\|(.*?)\|", section("docs/runs.md", heading), re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def numbers(name):
    """The rows of docs/numbers/NAME.csv, as dictionaries of strings."""
    with (ROOT / f"docs/numbers/{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text):
    """The anchors of a page: its headings, code aside."""
    prose = re.sub(r"(?ms)^```.*?^```", "", text)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.M)}
