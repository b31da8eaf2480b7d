# SPDX-License-Identifier: Apache-2.0
"""`mir report`: an HTML page about runs, finished or still training."""

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
from mir_callback.analysis.page.views import RunView, list_drawn
from mir_callback.cli.arguments import RUNS, check_output, read_recipes, write_output
from mir_callback.errors import ConfigError, HistoryError, MIRError, ProbeError
from mir_callback.fs import printable
from mir_callback.probe.probe import Probe
from mir_callback.probe.storage import RUN_PROBE

FILE_NAME = "mir_report.html"
EPILOG = f"""\
{RUNS}

examples:
  mir report runs/demo --watch 30                    # writes runs/demo/{FILE_NAME}, again every 30 seconds
  mir report runs/lr-1e-3 runs/lr-2e-3 -o lr.html    # compares runs
"""


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this subcommand."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run, or NAME=RUN,RUN,... for a recipe")
    add("-o", "--output", metavar="FILE", help=f"page to write (default: {FILE_NAME} in the run's folder, or here)")
    add("--probe", metavar="PATH", help="saved probe, to show its samples (default: the one in the run's folder)")
    add("--no-probe", action="store_true", help="show no samples")
    add("--watch", type=float, metavar="SECONDS", help="update the page periodically until Ctrl-C; it reloads itself")


def run(options: Namespace) -> None:
    """Read the runs and write the page, with ``--watch`` again and again until Ctrl-C; MIRError if that fails."""
    for flag in ("output", "probe"):
        if getattr(options, flag) == "":
            raise ConfigError(f"--{flag} is empty. Is a shell variable unset?")
    if options.probe and options.no_probe:
        raise ConfigError(f"--probe {options.probe} and --no-probe exclude each other. Leave one out.")
    if options.watch is not None and not (math.isfinite(options.watch) and options.watch >= 1):
        raise ConfigError(f"--watch takes at least 1 second, got {options.watch:g}. Use e.g. 30.")
    page = _choose_page(options)
    probe = Probe.load(options.probe) if options.probe else None
    seen: set[str] = set()
    _write(page, options, probe, seen)
    if not options.watch:
        print(f"wrote {printable(str(page))}")
        return
    print(f"writing {printable(str(page))} every {options.watch:g} s until Ctrl-C", flush=True)
    try:
        while True:
            time.sleep(options.watch)
            try:
                _write(page, options, probe, seen)
            except (MIRError, OSError) as error:  # a new run has moved the history aside, the disk is full: wait
                _warn([str(error)], seen)
    except KeyboardInterrupt:
        options.watch = None
        _write(page, options, probe, seen)  # the last page does not reload itself
        print(f"\nwrote {printable(str(page))}")


def _write(page: Path, options: Namespace, probe: Probe | None, seen: set[str]) -> None:
    """Read the runs and replace the page; problems are shown on the page, and printed the first time."""
    recipes, notes = read_recipes(options.runs, layers_of=list_drawn)
    runs = [run for recipe in recipes for run in recipe.runs]
    if not runs:
        raise HistoryError(" ".join(notes))
    measured_on = {record.probe_fingerprint for run in runs for record in run.records} - {None}
    if probe is not None and measured_on and probe.fingerprint not in measured_on:
        notes.append(
            f"--probe {options.probe} is not the probe that the values were measured on: the samples shown are others"
        )
    if probe is None and not options.no_probe:
        probe = _find_probe(runs, notes)
    views = [RunView.from_run(run, recipe) for recipe in recipes for run in recipe.runs]
    _warn([*notes, *(f"{view.name}: {note}" for view in views for note in view.notes)], seen)
    parts = {"comparison": _compare(recipes), "probe": probe, "notes": notes, "reload_seconds": options.watch}
    text = render_report(views, written=datetime.now().astimezone(), **parts)
    # A link in the default's place is replaced and not followed, as it may lead out of the run's folder.
    write_output("--output", page if page.is_symlink() else check_output("--output", str(page), runs), text)


def _compare(recipes: Sequence[Recipe]) -> Comparison | None:
    """The comparison of several recipes; None if they are not comparable, which the page explains."""
    measured = [recipe for recipe in recipes if any(run.measured for run in recipe.runs)]
    try:
        return compare(measured) if len(measured) > 1 else None
    except HistoryError:
        return None


def _warn(messages: Sequence[str], seen: set[str]) -> None:
    for message in messages:
        if message not in seen:
            seen.add(message)
            print(f"mir report: {printable(message)}", file=sys.stderr)


def _choose_page(options: Namespace) -> Path:
    if options.output:
        return check_output("--output", options.output)
    only = Path(os.path.expanduser(options.runs[0]))
    if len(options.runs) > 1 or not os.path.exists(only):  # several, or a recipe
        return Path(FILE_NAME)
    return (only if only.is_dir() else only.parent) / FILE_NAME


def _find_probe(runs: Sequence[Run], notes: list[str]) -> Probe | None:
    """The probe in a run's folder, if its values were measured on it; adds a note if it cannot be read."""
    for run in runs:
        path = run.source.parent / RUN_PROBE
        if not path.exists():
            continue
        try:
            probe = Probe.load(path)
        except ProbeError as error:
            notes.append(f"no samples are shown: {error}")
        else:
            if probe.fingerprint in {record.probe_fingerprint for record in run.records}:
                return probe
    return None
