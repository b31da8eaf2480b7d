# SPDX-License-Identifier: Apache-2.0
"""What a run has measured and kept while it trained: its probe, and its values beside those of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mir_callback.errors import ConfigError, HistoryError
from mir_callback.probe.samples import Probe
from mir_callback.probe.storage import RUN_PROBE
from mir_callback.training.history import FILE_NAME, Record, read_history

# What must be the same for a live value to be that of its checkpoint, and what to do where it is not.
_REMEDIES = {
    "probe_fingerprint": "give --probe the run's own",
    "tokens_fingerprint": "give --processor (for LLaVA --conversation) that of the run",
    "root": "give --root that of the run",
    "pixels_fingerprint": "the image processor has other settings or its image library another version",
    "dtype": "give --dtype or --autocast as the run had it",
}

_UNKNOWN_STEP = (
    "nothing tells the step of these weights: their value is recorded as that of step 0, and none of the run's own "
    "stands beside it; put trainer_state.json beside them (trainer.save_state() writes it)"
)


class LiveValues:
    """A run's own values, to be looked at beside those of its checkpoints.

    Args:
        run: the run's output folder, with or without a history.

    Attributes:
        problem: why there are none although there is a history, None otherwise.
    """

    def __init__(self, run: Path) -> None:
        self.problem: str | None = None
        self._by_step: dict[int, Record] = {}
        self._told: set[str] = set()
        path = run / FILE_NAME
        try:
            records = read_history(path) if path.exists() else []
        except (HistoryError, OSError) as error:
            self.problem = f"the values of the run itself cannot be shown beside: {error}"
            return
        self._by_step = {record["step"]: record for record in records if record["mir"] is not None}

    def beside(self, record: Mapping[str, Any], *, step_known: bool) -> tuple[float | None, list[str]]:
        """The live value of a record's step, and what to know before comparing the two.

        Args:
            record: of a checkpoint.
            step_known: whether the record's step is that of its weights, and not only where such values are put.

        Returns:
            The value, None if there is none that was made the same way; and sentences, each only the first time.
        """
        if not step_known:
            return None, [_UNKNOWN_STEP] if self._by_step else []
        live = self._by_step.get(record["step"])
        if live is None or record["mir"] is None:
            return None, []
        told = []
        comparable = True
        for field, remedy in _REMEDIES.items():
            theirs, ours = live.get(field), record.get(field)
            if theirs is None or ours is None or theirs == ours:
                continue
            comparable = comparable and field in ("pixels_fingerprint", "dtype")
            if field not in self._told:
                self._told.add(field)
                told.append(f"the run measured itself with {field} {theirs}, its checkpoints are with {ours}: {remedy}")
        return (float(live["mir"]) if comparable else None), told


def probe_of_run(run: Path) -> Probe:
    """The probe saved in a run's folder.

    Raises:
        ConfigError: there is none.
        ProbeError: it is damaged.
    """
    path = run / RUN_PROBE
    if not path.exists():
        raise ConfigError(
            f"a probe must be given, got none, and {path} is not there; give --probe FILE (mir probe --save writes "
            "one), or --images and --texts as the run was given them"
        )
    return Probe.load(path)
