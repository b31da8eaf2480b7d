# SPDX-License-Identifier: Apache-2.0
"""A run's probe, kept beside its history for those who measure or look at the run later."""

from __future__ import annotations

import warnings
from pathlib import Path

from mir_callback.errors import ProbeError
from mir_callback.probe.samples import Probe
from mir_callback.probe.storage import RUN_PROBE


def keep_probe(probe: Probe, folder: str | Path) -> None:
    """Save the probe in a run's output folder, or say why it is not there: training does not depend on it.

    Ranks: rank 0 only.
    """
    try:
        probe.save(Path(folder) / RUN_PROBE)
    except ProbeError as error:
        warnings.warn(f"the probe is not kept beside the run: {error}", stacklevel=2)
