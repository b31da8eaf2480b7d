# SPDX-License-Identifier: Apache-2.0
"""`mir compare`: which run or recipe has the lower MIR, and is the difference beyond noise?"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from ast import literal_eval
from dataclasses import fields

from mir_callback.analysis.compare import DEFAULT_LEVEL, Comparison, compare
from mir_callback.analysis.curves import AXES
from mir_callback.analysis.tables import list_remarks, make_tables, state_verdict, to_csv, to_json, to_markdown
from mir_callback.cli.arguments import RUNS, check_output, read_recipes, write_output
from mir_callback.early_stopping import PlateauRule
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.fs import printable

EPILOG = f"""\
{RUNS}
Recipes of several runs are tested, paired by seed where they share seeds. One run of a recipe decides nothing.

example:
  mir compare short='runs/short_seed*' long='runs/long_seed*' --markdown comparison.md
"""
_FILE_WIDTH = 160  # characters, if the output is not a terminal
_WRITERS = {"json": to_json, "csv": to_csv, "markdown": to_markdown}


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this subcommand."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or NAME=RUN,RUN,... for a recipe")
    how = parser.add_argument_group("how to compare").add_argument
    how("--by", choices=AXES, default="step", help="rank at equal steps, tokens, samples or training time")
    how("--at", type=float, metavar="N", help="position on that axis (default: the last that all have reached)")
    how("--seed-std", type=float, metavar="X", help="standard deviation of MIR between seeds, if known")
    how("--level", type=float, default=DEFAULT_LEVEL, help="significance level (default: 0.05)")
    how("--allow-mismatch", action="store_true", help="compare even if probes, tokens or roots differ")
    how("--rule", metavar="NAME=VALUE,...", help="options of the stop rule to try, e.g. window=8,min_delta=0.03")
    result = parser.add_argument_group("output besides the tables ('-': stdout, without the tables)")
    result.add_argument("--json", metavar="FILE", help="write the comparison as JSON")
    result.add_argument("--csv", metavar="FILE", help="write one line per run as CSV")
    result.add_argument("--markdown", metavar="FILE", help="write the tables as Markdown")


def run(options: Namespace) -> None:
    """Read the runs, compare them, print and write the result; MIRError if that fails."""
    outputs = {name: words for name in _WRITERS if (words := getattr(options, name)) is not None}
    if list(outputs.values()).count("-") > 1:
        raise ConfigError("Only one of --json, --csv and --markdown can be '-'. Name files for the others.")
    rule = parse_rule(options.rule)
    recipes, missing = read_recipes(options.runs, layers_of=lambda records: ())
    if not recipes:
        raise HistoryError(" ".join(missing))
    for message in missing:
        print(f"mir compare: skipped: {printable(message)}", file=sys.stderr)
    runs = [run for recipe in recipes for run in recipe.runs]
    files = {name: check_output(f"--{name}", words, runs) for name, words in outputs.items() if words != "-"}
    for name, path in files.items():
        if same := [f"--{other}" for other in files if other != name and files[other] == path]:
            raise ConfigError(f"--{name} and {same[0]} both name {outputs[name]}. Choose another for one of them.")
    settings = {name: getattr(options, name) for name in ("by", "at", "level", "seed_std", "allow_mismatch")}
    found = compare(recipes, rule=rule, **settings)
    for name in outputs:
        text = _WRITERS[name](found)
        if name in files:
            write_output(f"--{name}", files[name], text)
        else:
            sys.stdout.write(text)
    if len(files) == len(outputs):
        show(found)


def parse_rule(text: str | None) -> PlateauRule:
    """Build a stop rule from `name=value,...`; ConfigError if a name or value is invalid."""
    known = [field.name for field in fields(PlateauRule)]
    values: dict[str, float | int | bool | None] = {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition("=")
        if name not in known:
            raise ConfigError(
                f"--rule has no option {part!r}, only {', '.join(known)}. Use e.g. --rule window=8,min_delta=0.03."
            )
        try:
            values[name] = literal_eval(value)
            float(values[name] or 0)
        except (ValueError, SyntaxError, TypeError, OverflowError) as error:
            raise ConfigError(f"--rule {part}: {value!r} is not a number, True, False or None.") from error
    return PlateauRule(**values)  # type: ignore[arg-type]


def show(found: Comparison) -> None:
    """Print a comparison."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_FILE_WIDTH)
    for table in make_tables(found):
        drawn = Table(title=Text(printable(table.title)), title_justify="left", box=SIMPLE_HEAD)
        for number, heading in enumerate(table.columns):
            drawn.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(printable(cell)) for cell in row))
        console.print(drawn)
        console.print()
    for remark in list_remarks(found):
        console.print(f"- {printable(remark)}", markup=False, style="dim", soft_wrap=True)
    if len(found.recipes) > 1:
        verdict = state_verdict(found) or f"No ranking by {found.by}; see the notes above."
        console.print(printable(verdict), markup=False, style="bold", soft_wrap=True)
