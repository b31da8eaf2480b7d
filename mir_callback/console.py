# SPDX-License-Identifier: Apache-2.0
"""What is said on the console: the logger `mir_callback`, whose lines stand above progress bars.

Everything goes through `logging.getLogger("mir_callback")`: silence it with `setLevel(logging.ERROR)`, or take its
handler away and put your own in its place. Only rank 0 speaks.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.early_stopping import Verdict
from mir_callback.record import EvalRecord

log = logging.getLogger("mir_callback")

UNATTACHED = (
    "this callback is not attached to the Trainer: values go to the history file and, if a run is active, directly to "
    "wandb. MIRCallback(...).attach(trainer) would send them through Trainer.log as well, to every reporter and to "
    "trainer.state.log_history."
)


class ConsoleHandler(logging.Handler):
    """Rank 0's lines, `[mir] ...` on standard output, warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line above the progress bars."""
        if not distributed.is_main():
            return
        serious = record.levelno >= logging.WARNING
        line = f"[mir] {'WARNING: ' if serious else ''}{record.getMessage()}"
        with suppress(OSError, ValueError):  # a full disk behind stdout, a closed pipe: there is nowhere to say it
            tqdm.write(line, file=sys.stderr if serious else sys.stdout)


def _set_up() -> None:
    """Let the logger speak, unless the user has given it a handler or a level already."""
    if not log.handlers:
        log.addHandler(ConsoleHandler())
        log.propagate = False  # a script that configures the root logger would show each line twice
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


def evaluation_line(record: EvalRecord, verdict: Verdict | None) -> str:
    """One evaluation in one line."""
    if record.mir is None:
        return f"step {record.step}: evaluation FAILED after {record.seconds:.1f} s: {record.error}"
    spread = "" if record.mir_se is None else f" +- {record.mir_se:.4f}"
    line = f"step {record.step}: MIR {record.mir:.4f}{spread} ({record.seconds:.1f} s)"
    if verdict is None:
        return line
    if verdict.would_stop:
        what = "stopping training" if verdict.stop else "only observing, training goes on"
        return f"{line} {verdict.kind}; {what}: {verdict.reason}"
    return f"{line} {verdict.kind}: {verdict.reason}"


_set_up()
