# SPDX-License-Identifier: Apache-2.0
"""`mir compare`: which of several runs or recipes has the lower MIR, and is that more than noise."""

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

EPILOG = f"""\
{RUNS}
Without such replicates it is not known how far a seed alone moves MIR; it is then assumed, generously.

examples:
  mir compare runs/short_captions runs/long_captions
  mir compare short='runs/short_seed*' long='runs/long_seed*' --markdown comparison.md
  mir compare runs/a runs/b --rule window=6,min_delta=0.03 --json - | jq .verdict
"""
_FILE_WIDTH = 160  # where there is no terminal to fit
_WRITERS = {"json": to_json, "csv": to_csv, "markdown": to_markdown}


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this subcommand."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or NAME=RUN,RUN,... for a recipe")
    how = parser.add_argument_group("how to compare").add_argument
    how("--by", choices=AXES, default="step", help="rank at equal steps, tokens, samples or training time")
    how("--at", type=float, metavar="N", help="where on that axis (default: the last position all have reached)")
    how("--seed-std", type=float, metavar="X", help="standard deviation of MIR between seeds, if known")
    how("--level", type=float, default=DEFAULT_LEVEL, help="probability of a false difference (default: 0.05)")
    how("--allow-mismatch", action="store_true", help="compare values of other probes, tokens or roots too, and say so")
    how("--rule", metavar="NAME=VALUE,...", help="options of the stop rule to try (default: PlateauRule())")
    result = parser.add_argument_group("besides the tables on the terminal ('-' writes to it instead of them)")
    result.add_argument("--json", metavar="FILE", help="write everything as JSON")
    result.add_argument("--csv", metavar="FILE", help="write a line for each run as CSV")
    result.add_argument("--markdown", metavar="FILE", help="write the tables as Markdown")


def run(options: Namespace) -> None:
    """Read the runs, compare them, and show and write what was found; MIRError if that fails."""
    outputs = {name: words for name in _WRITERS if (words := getattr(options, name)) is not None}
    if list(outputs.values()).count("-") > 1:
        raise ConfigError("'-' can be given for one of --json, --csv and --markdown; name files for the others")
    rule = parse_rule(options.rule)
    recipes, missing = read_recipes(options.runs)
    if not recipes:
        raise HistoryError("; ".join(missing))
    for message in missing:
        print(f"mir compare: left out: {message}", file=sys.stderr)
    runs = [run for recipe in recipes for run in recipe.runs]
    files = {name: check_output(f"--{name}", words, runs) for name, words in outputs.items() if words != "-"}
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
    """A stop rule from `name=value,...`; ConfigError if there is no such option, or no value of one."""
    known = [field.name for field in fields(PlateauRule)]
    values: dict[str, float | int | bool | None] = {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition("=")
        if name not in known:
            raise ConfigError(
                f"--rule takes {', '.join(known)}, not {part!r}; write e.g. --rule window=8,min_delta=0.02"
            )
        try:
            values[name] = literal_eval(value)
            float(values[name] or 0)
        except (ValueError, SyntaxError, TypeError, OverflowError) as error:
            raise ConfigError(f"{name} of --rule is a number, True, False or None, not {value!r}") from error
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
        drawn = Table(title=Text(table.title), title_justify="left", box=SIMPLE_HEAD)
        for number, heading in enumerate(table.columns):
            drawn.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
        console.print()
    for remark in list_remarks(found):
        console.print(f"- {remark}", markup=False, style="dim", soft_wrap=True)
    if len(found.recipes) > 1:
        verdict = state_verdict(found) or f"Nothing is ranked by {found.by}; the sentences above say why."
        console.print(verdict, markup=False, style="bold", soft_wrap=True)
