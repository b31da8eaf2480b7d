# SPDX-License-Identifier: Apache-2.0
"""What `make docs` writes is up to date, and every test and file that a page names exists."""

import ast
import re

import generate
import pytest

ROOT = generate.ROOT
PAGES = [page for where in ("", "docs/", "benchmarks/notes/", "examples/*/") for page in ROOT.glob(f"{where}*.md")]


def test_generated_pages_are_those_of_the_code():
    for path, text in generate.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run `make docs`"


@pytest.mark.parametrize("text", ["no markers", "<!-- support: end -->\n<!-- support: begin -->"])
def test_error_when_a_page_has_no_place_for_the_table(tmp_path, text):
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(SystemExit, match="README.md"):
        generate.between_markers(page, "table")


def test_what_counts_as_tested_or_refused_names_a_test_and_what_was_done_by_hand_a_note():
    notes = (ROOT / "benchmarks" / "notes" / "integrations.md").read_text(encoding="utf-8")
    for entry in (entry for entries in generate.SUPPORT.values() for entry in entries):
        assert bool(entry.by_hand) == (entry.status == "by hand"), entry.name
        assert entry.tests or entry.status not in ("tested", "refused"), entry.name
        assert f"\n## {entry.by_hand}" in notes, entry.name


def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page):
    named = re.findall(r"(tests/[\w/]*\w(?:\.py)?)(?:::(\w+))?", page.read_text(encoding="utf-8"))
    for file, test in named:
        assert (ROOT / file).exists(), file
        assert not test or test in functions_of(ROOT / file), f"{file}::{test}"


def anchors_of(path):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors_of(path), target
