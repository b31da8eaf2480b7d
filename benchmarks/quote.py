# SPDX-License-Identifier: Apache-2.0
"""Put the tables of benchmarks/results/ where docs/performance.md and benchmarks/notes/performance.md quote them.

    python benchmarks/quote.py

A quotation stands between ``<!-- NAME.md -->`` and ``<!-- end -->``; all of the file but its command is quoted.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGES = (HERE.parent / "docs" / "performance.md", HERE / "notes" / "performance.md")
_QUOTATION = re.compile(r"(?<=<!-- )([a-z_]+\.md)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def quoting(page: str) -> str:
    """The page with every quotation as its file has it now."""

    def quotation(found: re.Match[str]) -> str:
        _, _, text = (RESULTS / found[1]).read_text(encoding="utf-8").partition("\n\n")
        return f"{found[1]}{found[2]}\n{text.strip()}\n\n"

    return _QUOTATION.sub(quotation, page)


def quoted(page: str) -> list[str]:
    """The names of the files that a page quotes."""
    return [found[1] for found in _QUOTATION.finditer(page)]


def main() -> None:
    """Write the pages."""
    for page in PAGES:
        page.write_text(quoting(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
