# SPDX-License-Identifier: Apache-2.0
"""How an evaluation says what it is doing: a progress bar for people, phases for the watchdog."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

_DELAY_SECONDS = 3.0

# Hears what this rank begins to do; called often, so it should be quick.
Tell = Callable[[str], None]


def nobody(_phase: str) -> None:
    """Hears, and says nothing."""


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[tqdm]:
    """A bar that shows itself only if the evaluation takes longer than a few seconds."""
    with tqdm(total=0, desc="MIR", unit="step", delay=_DELAY_SECONDS, disable=not shown, leave=False) as bar:
        yield bar
