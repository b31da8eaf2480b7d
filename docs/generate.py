# SPDX-License-Identifier: Apache-2.0
"""Write docs/reference.md from the code: every option, every field of a history line. `make docs`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from mir_callback.config import GROUPS, MIRArguments, MIRConfig
from mir_callback.early_stopping import PlateauRule
from mir_callback.probe.probe import ProbeSource
from mir_callback.record import FIELDS

PAGE = Path(__file__).with_name("reference.md")
HEAD = """\
# Reference: options, flags, fields

What `MIRMonitor`, `MIRCallback` and `attach_mir` take as keyword arguments, and what a line of `mir_history.jsonl`
holds. Every option is a flag too, for the launcher and for scripts that put `MIRArguments` beside their own dataclasses
in `HfArgumentParser`. This page is written by `make docs` from `mir_callback/config.py`,
`mir_callback/early_stopping.py` and `mir_callback/record.py`.
"""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def _options(chosen: Iterable[Field[Any]], prefix: str) -> str:
    flags = {each.name: each for each in fields(MIRArguments)}
    rows = []
    for each in chosen:
        name = f"{prefix}{each.name}"
        default = "" if name not in flags else f"`--{name}`"
        rows.append((f"`{each.name}`", default, f"`{each.default!r}`", each.metadata["help"]))
    return _table(("option", "flag", "default", "meaning"), rows)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for group, title in GROUPS.items():
        chosen = [each for each in fields(MIRConfig) if each.metadata["group"] == group]
        parts.append(f"## Options: {title}\n\n{_options(chosen, 'mir_')}\n")
    parts.append(
        f"## Options of PlateauRule\n\n`stop=PlateauRule(...)`\n\n{_options(fields(PlateauRule), 'mir_stop_')}\n"
    )
    parts.append(f"## The probe of `attach_mir` and the launcher\n\n{_options(fields(ProbeSource), 'mir_')}\n")
    rows = [
        (f"`{name}`", str(each.type).removesuffix(" | None"), each.metadata["unit"], each.metadata["help"])
        for name, each in FIELDS.items()
    ]
    parts.append(
        "## Fields of a line of `mir_history.jsonl`\n\nOne JSON object an evaluation; a field without a value is left "
        "out or null. Fields of other versions are kept when a run is continued.\n\n"
        f"{_table(('field', 'type', 'unit', 'meaning'), rows)}\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
