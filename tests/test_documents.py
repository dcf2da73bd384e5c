"""Tables, links and flags of the documents."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmark/README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_OURS = {"__index_url"}  # a flag of pip


def outside_code(text):
    """The text without fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def uneven_rows(text):
    """Rows of tables that have another number of cells than their header; a bare | in a cell makes one more."""
    wrong, width = [], None
    for line in outside_code(text).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        wrong += [line] if cells and width and cells != width else []
        width = cells and (width or cells)
    return wrong


def anchors(text):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", outside_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path, text):
    """Relative links and pictures whose file or heading does not exist."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", outside_code(text))
    files = [(path.parent / name if name else path, anchor) for name, anchor in links]
    return [(f, a) for f, a in files if not f.exists() or a and a not in anchors(f.read_text())]


def unknown_flags(text):
    """Flags that no script's Args has; the commands above the tables are of other programs."""
    flags = {flag.replace("-", "_") for flag in re.findall(r"--[a-z][a-z-]*", re.sub("<!--.*?-->", "", text))}
    nodes = [node for path in ROOT.glob("*.py") for node in ast.parse(path.read_text()).body]
    fields = [field for node in nodes if getattr(node, "name", "") == "Args" for field in node.body]
    names = {field.target.id for field in fields if isinstance(field, ast.AnnAssign)}
    return flags - NOT_OURS - {f"__{no}{name}" for name in names for no in ("", "no_")}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_and_links_hold(path):
    assert not uneven_rows(path.read_text()) and not broken_links(path, path.read_text())


def test_readme_is_short_and_names_real_flags():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100 and len(text.split()) <= 1_100 and not unknown_flags(text)
