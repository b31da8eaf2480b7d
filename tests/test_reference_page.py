# SPDX-License-Identifier: Apache-2.0
"""What `make docs` writes is up to date, and its list of what is supported names a test or a note."""

import generate
import pytest


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
    notes = (generate.ROOT / "benchmarks" / "notes" / "integrations.md").read_text(encoding="utf-8")
    for entry in (entry for entries in generate.SUPPORT.values() for entry in entries):
        assert bool(entry.by_hand) == (entry.status == "by hand"), entry.name
        assert entry.tests or entry.status not in ("tested", "refused"), entry.name
        assert f"\n## {entry.by_hand}" in notes, entry.name
