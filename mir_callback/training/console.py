# SPDX-License-Identifier: Apache-2.0
"""What the callback says on the console: lines of rank 0 that stand beside a progress bar."""

from __future__ import annotations

from contextlib import suppress

from tqdm.auto import tqdm

from mir_callback import collectives
from mir_callback.training.history import Record
from mir_callback.training.verdicts import Verdict

UNATTACHED = (
    "[mir] this callback is not attached to the Trainer: values go to the history file and, if a run is active, "
    "directly to wandb. MIRCallback(...).attach(trainer) would send them through Trainer.log as well, to every "
    "reporter and to trainer.state.log_history."
)


def say(line: str) -> None:
    """Print a line above the progress bars. Ranks: all; rank 0 prints."""
    if collectives.is_main():
        with suppress(OSError):  # a full disk behind stdout, a closed pipe: there is nowhere to say it
            tqdm.write(line)


def evaluation_line(record: Record, verdict: Verdict | None) -> str:
    """One evaluation in one line."""
    if record["mir"] is None:
        return f"[mir] step {record['step']}: evaluation FAILED after {record['seconds']:.1f} s: {record['error']}"
    error = record.get("mir_se")
    spread = "" if error is None else f" +- {error:.4f}"
    line = f"[mir] step {record['step']}: MIR {record['mir']:.4f}{spread} ({record['seconds']:.1f} s)"
    if verdict is None:
        return line
    if verdict.would_stop:
        what = "stopping training" if verdict.stop else "only observing, training goes on"
        return f"{line} {verdict.kind}; {what}: {verdict.reason}"
    return f"{line} {verdict.kind}: {verdict.reason}"


def held_line(last: Record) -> str:
    """Why a resumed run does not go on, and how it would."""
    return (
        f"[mir] this run was stopped on its plateau at step {last['step']} ({last.get('reason')}) and stays stopped; "
        "the Trainer looks for this only after a batch, and may take one step. To train on, give "
        "MIRCallback(continue_after_stop=True) (--mir_continue_after_stop), or stop=None."
    )
