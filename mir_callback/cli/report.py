# SPDX-License-Identifier: Apache-2.0
"""`mir report`: one HTML page about one or several runs, finished or still training."""

from __future__ import annotations

import math
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from mir_callback.analysis.compare import Comparison, Recipe, compare
from mir_callback.analysis.load import Run
from mir_callback.analysis.page import render_report
from mir_callback.analysis.page.views import RunView
from mir_callback.cli.arguments import RUNS, check_output, read_recipes, write_output
from mir_callback.errors import ConfigError, HistoryError, ProbeError
from mir_callback.probe.probe import Probe

FILE_NAME = "mir_report.html"
EPILOG = f"""\
{RUNS}

examples:
  mir report runs/demo                               # writes runs/demo/{FILE_NAME}
  mir report runs/demo --watch 30                    # again every 30 seconds, while it trains
  mir report runs/lr-1e-3 runs/lr-2e-3 -o lr.html    # several runs in the same pictures, and compared
  mir report short='runs/short_seed*' long='runs/long_seed*' -o captions.html
  mir report runs/demo --no-probe                    # without the samples MIR was measured on
"""


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this subcommand."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run, which may be training, or NAME=RUN,RUN,... for a recipe")
    add("-o", "--output", metavar="FILE", help=f"page to write (default: {FILE_NAME} in the run's folder, or here)")
    add("--probe", metavar="PATH", help="saved probe, to show its samples (default: one that lies in the run's folder)")
    add("--no-probe", action="store_true", help="show no samples, though the probe may be at hand")
    add("--watch", type=float, metavar="SECONDS", help="write the page again and again; it reloads itself; end with ^C")


def run(options: Namespace) -> None:
    """Read the runs, write the page, and with ``--watch`` go on doing so until interrupted; MIRError if that fails."""
    for flag in ("output", "probe"):
        if getattr(options, flag) == "":
            raise ConfigError(f"--{flag} is empty, ''; is a shell variable unset?")
    if options.probe and options.no_probe:
        raise ConfigError(f"--probe {options.probe} and --no-probe exclude each other; leave one out")
    if options.watch is not None and not (math.isfinite(options.watch) and options.watch >= 1):
        raise ConfigError(f"--watch takes 1 second or more, not {options.watch:g}; use e.g. 30")
    page = _choose_page(options)
    probe = Probe.load(options.probe) if options.probe else None
    said: set[str] = set()
    _write(page, options, probe, said)
    if not options.watch:
        print(f"report in {page}")
        return
    print(f"report in {page}, written again every {options.watch:g} s until Ctrl-C", flush=True)
    try:
        while True:
            time.sleep(options.watch)
            try:
                _write(page, options, probe, said)
            except HistoryError as error:  # a run that starts anew moves its history aside; the page waits
                _say([str(error)], said)
    except KeyboardInterrupt:
        options.watch = None
        _write(page, options, probe, said)  # the page that stays does not reload itself
        print(f"\nreport in {page}")


def _write(page: Path, options: Namespace, probe: Probe | None, said: set[str]) -> None:
    """Read everything anew and replace the page; what has gone wrong is said once and stands on the page."""
    recipes, notes = read_recipes(options.runs)
    runs = [run for recipe in recipes for run in recipe.runs]
    if not runs:
        raise HistoryError("; ".join(notes))
    measured_on = {record.probe_fingerprint for run in runs for record in run.records} - {None}
    if probe is not None and measured_on and probe.fingerprint not in measured_on:
        notes.append(
            f"--probe {options.probe} is not the probe that the values were measured on: the samples shown are others"
        )
    if probe is None and not options.no_probe:
        probe = _find_probe(runs)
    views = [RunView.from_run(run, recipe) for recipe in recipes for run in recipe.runs]
    _say([*notes, *(f"{view.name}: {note}" for view in views for note in view.notes)], said)
    parts = {"comparison": _compare(recipes), "probe": probe, "notes": notes, "reload_seconds": options.watch}
    text = render_report(views, written=datetime.now().astimezone(), **parts)
    # A link in the default's place is replaced and not followed, as it may lead out of the run's folder.
    write_output("--output", page if page.is_symlink() else check_output("--output", str(page), runs), text)


def _compare(recipes: Sequence[Recipe]) -> Comparison | None:
    """The comparison of several recipes; None where there is none, which the page itself explains."""
    measured = [recipe for recipe in recipes if any(run.measured for run in recipe.runs)]
    try:
        return compare(measured) if len(measured) > 1 else None
    except HistoryError:  # their values are not alike
        return None


def _say(messages: Sequence[str], said: set[str]) -> None:
    for message in messages:
        if message not in said:
            said.add(message)
            print(f"mir report: {message}", file=sys.stderr)


def _choose_page(options: Namespace) -> Path:
    if options.output:
        return check_output("--output", options.output)
    only = Path(os.path.expanduser(options.runs[0]))
    if len(options.runs) > 1 or not os.path.exists(only):  # several, or a recipe
        return Path(FILE_NAME)
    return (only if only.is_dir() else only.parent) / FILE_NAME


def _find_probe(runs: Sequence[Run]) -> Probe | None:
    """A probe that lies in a run's folder and is the one its values were measured on."""
    for run in runs:
        folder, measured_on = run.source.parent, {record.probe_fingerprint for record in run.records}
        for path in [*sorted(folder.glob("*.zip")), *sorted(file.parent for file in folder.glob("*/probe.json"))]:
            try:
                probe = Probe.load(path)
            except ProbeError:  # another kind of archive or folder
                continue
            if probe.fingerprint in measured_on:
                return probe
    return None
