# SPDX-License-Identifier: Apache-2.0
"""The closing summary of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mir_callback import EvalRecord
from mir_callback.record import lowest_record


def summarise(
    history: Sequence[EvalRecord], log_history: Sequence[Mapping[str, Any]], max_steps: int, output: Path
) -> str:
    """Tell how MIR and the loss went, why training stopped, what watching cost, what was written and what to do next.

    Args:
        history: `MIRCallback.history`.
        log_history: `trainer.state.log_history`.
        max_steps: how long training could have gone on.
        output: the run's folder.
    """
    measured = [record for record in history if record.mir is not None]
    losses = [entry for entry in log_history if "loss" in entry]
    training = next(entry["train_runtime"] for entry in reversed(log_history) if "train_runtime" in entry)
    evaluating = sum(record.seconds for record in history)
    first, last = measured[0], measured[-1]
    peak = max(measured, key=lambda record: record.mir)
    rows = {
        "MIR at the start": _value(first),
        "MIR at its peak": _value(peak),
        "MIR at its lowest": _value(lowest_record(history) or last),
        "MIR at the end": _value(last),
        "training loss": f"{losses[0]['loss']:.3f} (step {losses[0]['step']}) to "
        f"{losses[-1]['loss']:.3f} (step {losses[-1]['step']})",
        "stopped": f"at step {last.step} of {max_steps}, {_why(last)}",
        "last verdict": last.reason,
        "training time": f"{training:.0f} s, of which {evaluating:.0f} s ({evaluating / training:.0%}) were "
        f"{len(history)} evaluations",
        "probe": f"{last.num_samples} samples, {last.num_vision_tokens} vision and "
        f"{last.num_text_tokens} text tokens, fingerprint {last.probe_fingerprint}",
    }
    lines = [f"  {name:<20}{text}" for name, text in rows.items()]
    return "\n".join(["", "Summary", *lines, "", f"Written to {output}/", *_files(output), "", "Next", *_next(output)])


def _value(record: EvalRecord) -> str:
    return f"{record.mir:.3f} (step {record.step})"


def _why(last: EvalRecord) -> str:
    return "on a plateau" if last.verdict == "plateau" else "at the end of the schedule; no plateau was found"


def _files(output: Path) -> list[str]:
    known = {
        "mir.png": "MIR and loss over steps, distance of every layer",
        "mir_history.jsonl": "one line per evaluation",
        "mir_probe.zip": "the samples it was measured on",
        "model.safetensors": "the model as it was at the end",
        "wandb/": "offline run; `wandb sync` sends it to a server",
    }
    return [f"  {name:<20}{what}" for name, what in known.items() if (output / name).exists()]


def _next(output: Path) -> list[str]:
    steps = {
        f".venv/bin/mir report {output}": "the run as one page, to look at and to send",
        f".venv/bin/mir eval {output}": "MIR of the saved model, from the disk",
        "docs/guide.md": "how to read it, and from here to a decision",
    }
    width = max(map(len, steps)) + 2
    return [f"  {command:<{width}}{what}" for command, what in steps.items()]
