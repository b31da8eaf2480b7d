# SPDX-License-Identifier: Apache-2.0
"""Runs to make pages of, and what a page holds once a parser has read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from html.parser import HTMLParser
from typing import Any

import numpy as np

from mir_callback.analysis.page import render_report
from mir_callback.analysis.page.views import RunView
from mir_callback.record import as_records

WRITTEN = datetime(2020, 2, 3, 4, 5, 6, tzinfo=timezone.utc)
COMPANIONS = ("mean_part", "covariance_part", "norm_ratio", "cosine", "vision_rank", "text_rank", "scale_free")
_EMPTY = {"meta", "link", "img", "input", "br", "path", "rect"}


def records(count: int, layers: int = 4, *, samples: int = 12, seed: int = 0, every: int = 10) -> list[dict[str, Any]]:
    """Evaluations with all fields, drawn from a seed; MIR is that of the layers."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        distances = np.exp(rng.normal(2 - 0.05 * number, 0.3, layers))
        influences = rng.normal(0, 0.4, samples)
        influences -= influences.mean()
        found.append(
            {
                "step": every * number,
                "epoch": number / 7,
                "mir": math.log10(distances.sum()),
                "mir_se": float(influences.std(ddof=1) / math.sqrt(samples)),
                "per_layer": distances.tolist(),
                "per_layer_se": (0.05 * distances).tolist(),
                "influences": influences.tolist(),
                "companions": {name: rng.uniform(0.5, 2, layers).tolist() for name in COMPANIONS},
                "root": "exact",
                "seconds": 1 + 0.1 * number,
                "num_samples": samples,
                "num_vision_tokens": 16 * samples,
                "num_text_tokens": 60 * samples,
                "probe_fingerprint": "d3d069cd243898ce",
                "prompt": "USER: {image}\n ASSISTANT: {text}</s>",
                "tokens_fingerprint": "4d49d6bb6949b59f",
                "dtype": "float32",
                "world_size": 2,
                "verdict": "going on" if number < count - 1 else "plateau",
                "reason": f"reason at {every * number}",
                "elapsed": 30.0 * number + 1,
                "train_seconds": 28.0 * number,
                "eval_seconds": 2.0 * number + 1,
                "loss": 3 / (1 + number),
                "samples_seen": 160 * number,
                "tokens_seen": 40_000 * number,
                "peak_memory_bytes": 3 * 2**29,
            }
        )
    return found


def view(name: str, history: Sequence[dict[str, Any]], losses: Any = (), **fields: Any) -> RunView:
    return RunView(name, as_records(history), losses, **fields)


def page_of(*runs: RunView, **options: Any) -> str:
    return render_report(runs, **{"written": WRITTEN, **options})


@dataclass
class Element:
    """An element of a page with what is in it."""

    tag: str
    attributes: dict[str, str]
    inside: list[Any] = field(default_factory=list)

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)

    @property
    def words(self) -> str:
        """The text with single spaces, also between elements."""
        return " ".join(" ".join(part if isinstance(part, str) else part.words for part in self.inside).split())

    def all(self, tag: str | None = None, css: str = "", **attributes: str) -> list[Element]:
        """Elements inside, at any depth, with this tag, all these classes and these attributes."""
        found = []
        for part in self.inside:
            if isinstance(part, Element):
                if (
                    tag in (None, part.tag)
                    and set(css.split()) <= part.classes
                    and all(part.attributes.get(name.replace("_", "-")) == value for name, value in attributes.items())
                ):
                    found.append(part)
                found += part.all(tag, css, **attributes)
        return found

    def one(self, tag: str | None = None, css: str = "", **attributes: str) -> Element:
        (found,) = self.all(tag, css, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, tag, attributes):
        element = Element(tag, {name: value or "" for name, value in attributes})
        self.open[-1].inside.append(element)
        if tag not in _EMPTY or tag == "rect":
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.open[-1].inside.append(Element(tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag):
        if self.open[-1].tag != tag:
            raise ValueError(f"</{tag}> in <{self.open[-1].tag}> at line {self.getpos()[0]}")
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].inside.append(data)


def parse(page: str) -> Element:
    """The page as a tree.

    Raises:
        ValueError: an element is not closed where it should be.
    """
    reader = _Reader()
    reader.feed(page)
    reader.close()
    (whole,) = reader.open
    return whole
