# SPDX-License-Identifier: Apache-2.0
"""`mir report`: one HTML page about one or several runs, finished or still training."""

from __future__ import annotations

import math
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from mir_callback.analysis.compare import Comparison, Recipe, compare
from mir_callback.analysis.load import Run
from mir_callback.analysis.page.views import PLANNED, RunView
from mir_callback.analysis.report import render_report
from mir_callback.cli.arguments import RUNS, output_path, recipes_from, write_output
from mir_callback.errors import ConfigError, HistoryError, ProbeError
from mir_callback.probe.probe import Probe

HELP = "make one HTML page of runs: MIR and loss, layers, cost, samples, how it was measured"
EPILOG = f"""\
{RUNS}

examples:
  mir report runs/demo                               # writes runs/demo/mir_report.html
  mir report runs/demo --watch 30                    # again every 30 seconds, while it trains
  mir report runs/lr-1e-3 runs/lr-2e-3 -o lr.html    # several runs in the same pictures, and compared
  mir report short='runs/short_seed*' long='runs/long_seed*' -o captions.html
  mir report runs/demo --no-probe                    # without the samples MIR was measured on
"""
FILE_NAME = "mir_report.html"
_LEAST_WATCH = 1.0


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this subcommand."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run, which may be training, or NAME=RUN,RUN,... for a recipe"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"page to write (default: {FILE_NAME} in the run's folder; of several, here)",
    )
    parser.add_argument(
        "--probe", metavar="PATH", help="saved probe, to show its samples (default: one that lies in the run's folder)"
    )
    parser.add_argument("--no-probe", action="store_true", help="show no samples, though the probe may be at hand")
    parser.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="write the page again and again; it reloads itself; end with Ctrl-C",
    )


def run(options: Namespace) -> None:
    """Read the runs, write the page, and with ``--watch`` go on doing so until interrupted.

    Raises:
        MIRError: a flag breaks its rule, no run can be read, or the page cannot be written.
    """
    _check(options)
    page = _page(options)
    probe = Probe.load(options.probe) if options.probe else None
    told: set[str] = set()
    _write(page, options, probe, told)
    if not options.watch:
        print(f"report in {page}")
        return
    print(f"report in {page}, written again every {options.watch:g} s until Ctrl-C", flush=True)
    try:
        while True:
            time.sleep(options.watch)
            try:
                _write(page, options, probe, told)
            except HistoryError as error:  # a run that starts anew moves its history aside; the page waits
                _tell(str(error), told)
    except KeyboardInterrupt:
        options.watch = None
        _write(page, options, probe, told)  # the page that stays does not reload itself
        print(f"\nreport in {page}")


def _check(options: Namespace) -> None:
    for flag in ("output", "probe"):
        if getattr(options, flag) == "":
            raise ConfigError(f"--{flag} must not be empty, got ''; is a shell variable unset?")
    if options.probe and options.no_probe:
        raise ConfigError(f"--probe and --no-probe exclude each other, got --probe {options.probe}; leave one out")
    if options.watch is not None and not (math.isfinite(options.watch) and options.watch >= _LEAST_WATCH):
        raise ConfigError(f"--watch must be at least {_LEAST_WATCH:g} second, got {options.watch:g}; use e.g. 30")


def _write(page: Path, options: Namespace, probe: Probe | None, told: set[str]) -> None:
    """Read everything anew and replace the page; what has gone wrong is told once and stands on the page."""
    recipes, notes = recipes_from(options.runs)
    runs = [run for recipe in recipes for run in recipe.runs]
    if not runs:
        raise HistoryError("; ".join(notes))
    if probe is not None:
        notes += _foreign(probe, runs)
    elif not options.no_probe:
        probe = _probe_beside(runs)
    views = [_in_recipe(run, recipe) for recipe in recipes for run in recipe.runs]
    for sentence in [*notes, *(f"{view.name}: {note}" for view in views for note in view.notes)]:
        _tell(sentence, told)
    now = datetime.now().astimezone()
    compared = _compared(recipes)
    text = render_report(
        views, comparison=compared, probe=probe, notes=notes, written=now, reload_seconds=options.watch
    )
    write_output("--output", output_path("--output", str(page), runs), text)


def _compared(recipes: Sequence[Recipe]) -> Comparison | None:
    """The comparison of several recipes; None where there is none, which the page itself explains."""
    measured = [recipe for recipe in recipes if any(run.measured for run in recipe.runs)]
    if len(measured) < 2:
        return None
    try:
        return compare(measured)
    except HistoryError:  # their values are not alike
        return None


def _tell(sentence: str, told: set[str]) -> None:
    if sentence not in told:
        told.add(sentence)
        print(f"mir report: {sentence}", file=sys.stderr)


def view_of(run: Run) -> RunView:
    """A run from disk as the page shows it."""
    settings = {PLANNED: run.max_steps, "read from": str(run.source)}
    known = {name: value for name, value in settings.items() if value is not None}
    return RunView(run.name, run.records, run.losses, known, run.problems)


def _in_recipe(run: Run, recipe: Recipe) -> RunView:
    label = recipe.label(run)
    return replace(view_of(run), name=label, recipe=None if label == recipe.name else recipe.name)


def _page(options: Namespace) -> Path:
    if options.output:
        return output_path("--output", options.output)
    only = Path(os.path.expanduser(options.runs[0]))
    if len(options.runs) > 1 or not os.path.exists(only):  # several, or a recipe
        return Path(FILE_NAME)
    return (only if only.is_dir() else only.parent) / FILE_NAME


def _probe_beside(runs: Sequence[Run]) -> Probe | None:
    """A probe that lies in a run's folder and is the one its values were measured on."""
    for run in runs:
        wanted = {record.get("probe_fingerprint") for record in run.records}
        for place in _possible_probes(run.source.parent):
            try:
                probe = Probe.load(place)
            except ProbeError:  # another kind of archive or folder
                continue
            if probe.fingerprint in wanted:
                return probe
    return None


def _possible_probes(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.zip"))
    yield from sorted(manifest.parent for manifest in folder.glob("*/probe.json"))


def _foreign(probe: Probe, runs: Sequence[Run]) -> list[str]:
    measured = {record.get("probe_fingerprint") for run in runs for record in run.records} - {None}
    if not measured or probe.fingerprint in measured:
        return []
    return [
        f"--probe is {probe.fingerprint}, but the values are of {', '.join(sorted(map(str, measured)))}: "
        "the samples shown are not those that were measured"
    ]
