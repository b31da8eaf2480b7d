# SPDX-License-Identifier: Apache-2.0
"""The closing summary of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


def summarise(history: Sequence[Record], log_history: Sequence[Record], max_steps: int, output: Path) -> str:
    """Tell how MIR and the loss went, why training stopped, what watching cost, and what was written.

    Args:
        history: `MIRCallback.history`.
        log_history: `trainer.state.log_history`.
        max_steps: how long training could have gone on.
        output: the run's folder.
    """
    measured = [record for record in history if record["mir"] is not None]
    losses = [entry for entry in log_history if "loss" in entry]
    training = next(entry["train_runtime"] for entry in reversed(log_history) if "train_runtime" in entry)
    evaluating = sum(record["seconds"] for record in history)
    first, last = measured[0], measured[-1]
    peak = max(measured, key=lambda record: record["mir"])
    rows = {
        "MIR at the start": _value(first),
        "MIR at its peak": _value(peak),
        "MIR at the end": _value(last),
        "training loss": f"{losses[0]['loss']:.3f} (step {losses[0]['step']}) to "
        f"{losses[-1]['loss']:.3f} (step {losses[-1]['step']})",
        "stopped": f"at step {last['step']} of {max_steps}, {_why(last)}",
        "last verdict": last["reason"],
        "training time": f"{training:.0f} s, of which {evaluating:.0f} s ({evaluating / training:.0%}) were "
        f"{len(history)} evaluations",
        "probe": f"{last['num_samples']} samples, {last['num_vision_tokens']} vision and "
        f"{last['num_text_tokens']} text tokens, fingerprint {last['probe_fingerprint']}",
    }
    lines = [f"  {name:<18}{text}" for name, text in rows.items()]
    return "\n".join(["", "Summary", *lines, "", f"Written to {output}/", *_files(output)])


def _value(record: Record) -> str:
    return f"{record['mir']:.3f} (step {record['step']})"


def _why(last: Record) -> str:
    return "on a plateau" if last["verdict"] == "plateau" else "at the end of the schedule; no plateau was found"


def _files(output: Path) -> list[str]:
    known = {
        "mir.png": "MIR and loss over steps, distance of every layer",
        "mir_history.jsonl": "one line per evaluation",
        "wandb/": "offline run; `wandb sync` sends it to a server",
    }
    return [f"  {name:<18}{what}" for name, what in known.items() if (output / name).exists()]
