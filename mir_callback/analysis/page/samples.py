# SPDX-License-Identifier: Apache-2.0
"""The probe on the page: small pictures, beginnings of the texts, and how much each sample moves the number."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import ImageOps

from mir_callback.analysis.page.views import RunView
from mir_callback.probe.samples import Probe, Sample
from mir_callback.training.history import Record

_THUMBNAIL = (240, 180)  # twice as large as it is shown, for fine screens
_QUALITY = 72
_CHARACTERS = 220


@dataclass(frozen=True)
class Card:
    """One sample.

    Attributes:
        index: in the probe.
        name: where it came from.
        text: its beginning.
        picture: address of a JPEG that holds the picture itself; "" without the probe.
        effect: what the sample adds to MIR at ``Sheet.record``, about, in log10 units; or None.
    """

    index: int
    name: str
    text: str
    picture: str
    effect: float | None


@dataclass(frozen=True)
class Sheet:
    """The samples of a probe.

    Attributes:
        heading: which probe.
        cards: in the probe's order.
        run: name of the run the influences are of.
        record: the evaluation the influences are of, or None.
    """

    heading: str
    cards: list[Card]
    run: str
    record: Record | None


def sheet_of(runs: Sequence[RunView], probe: Probe | None) -> Sheet | None:
    """The samples of the probe and, at the last evaluation that has them, their influences; None if neither is known.

    Influences of another probe than the given one are left out.
    """
    known = [
        (run, record)
        for run in runs
        for record in reversed(run.measured)
        if record.get("influences")
        and (
            probe is None
            or (record.get("probe_fingerprint"), len(record["influences"])) == (probe.fingerprint, len(probe))
        )
    ]
    run, record = known[0] if known else (None, None)
    count = len(record["influences"]) if record else 0
    # An influence is the derivative of MIR by a sample's weight; a sample has one part in `count` of the weight.
    effects: list[float | None] = [influence / count for influence in record["influences"]] if record else []
    if probe is not None:
        effects = effects or [None] * len(probe)
        cards = [
            Card(index, sample.name, _beginning(sample.text), _picture(sample), effect)
            for index, (sample, effect) in enumerate(zip(probe.samples, effects, strict=True))
        ]
        heading = f"probe {probe.fingerprint}: {len(probe)} samples, texts cut to {probe.max_text_tokens} tokens"
    elif record:
        cards = [Card(index, "", "", "", effect) for index, effect in enumerate(effects)]
        heading = f"probe {record.get('probe_fingerprint') or 'unknown'}: {len(cards)} samples"
    else:
        return None
    return Sheet(heading, cards, run.name if run else "", record)


def _picture(sample: Sample) -> str:
    file = io.BytesIO()
    ImageOps.contain(sample.open_image(), _THUMBNAIL).save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _beginning(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _CHARACTERS else words[:_CHARACTERS].rstrip() + " ..."
