# SPDX-License-Identifier: Apache-2.0
"""The recipes of the study: what is changed, one or two things at a time, from one base recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

SEEDS = (0, 1, 2)
STOP_SEEDS = (0, 1)  # whose scored runs are measured often enough for a stop rule
FIXED_SEED = 0  # whose honest runs also go through stage 2 from three quarters of their steps


@dataclass(frozen=True)
class Recipe:
    """How stage 1 trains: the projector, and with `unfrozen` a part of the language model.

    Attributes:
        name: short and unique.
        kind: what it changes: learning rate, length, data, architecture, plain tower, language model, mixed, sabotage;
            base for the base.
        rate: highest learning rate of the projector; warm-up over 3 % of the steps, then a cosine.
        steps: optimizer steps.
        batch: samples in each of them.
        samples: different samples; they are repeated in new orders. 0 for new ones throughout.
        captions: short, long (a sentence of prose follows), detailed (place by place), partial (the upper row only).
        shuffled: share of captions that belong to another scene.
        blank: show grey images.
        projector: mlp, linear, norm (of its input), norm_out (of its output).
        gain: factor on the projector's output.
        shrink: factor on the projector's output that comes in gradually over the second half of the run.
        tower: trained, undertrained, plain (without massive dimensions).
        layer: of the tower, as in `vision_feature_layer`.
        pooled: 2 x 2 patches are averaged to one image token.
        unfrozen: decoder layers trained from the last one on, with a tenth of the rate.
        scored: go through stage 2. Of the sabotaged recipes only one of a kind does; all are there to be noticed.
    """

    name: str
    kind: str = "base"
    rate: float = 3e-3
    steps: int = 160
    batch: int = 16
    samples: int = 0
    captions: str = "short"
    shuffled: float = 0.0
    blank: bool = False
    projector: str = "mlp"
    gain: float = 1.0
    shrink: float = 1.0
    tower: str = "trained"
    layer: int = -2
    pooled: bool = False
    unfrozen: int = 0
    scored: bool = True


BASE = Recipe("base")


def _vary(kind: str, **changes: dict[str, Any]) -> list[Recipe]:
    return [replace(BASE, name=name, kind=kind, **change) for name, change in changes.items()]


RECIPES = (
    BASE,
    *_vary("learning rate", **{f"rate {rate:g}": {"rate": rate} for rate in (3e-4, 1e-3, 1e-2, 3e-2)}),
    *_vary(
        "length",
        **{f"{steps} steps": {"steps": steps} for steps in (40, 80, 320)},
        **{"batch 4": {"batch": 4}, "batch 64": {"batch": 64, "steps": 80}},
    ),
    *_vary(
        "data",
        **{"64 samples": {"samples": 64}},
        **{f"{captions} captions": {"captions": captions} for captions in ("long", "detailed", "partial")},
        **{"a quarter shuffled": {"shuffled": 0.25}, "half shuffled": {"shuffled": 0.5}},
    ),
    *_vary(
        "architecture",
        **{
            "linear": {"projector": "linear"},
            "norm before": {"projector": "norm"},
            "norm after": {"projector": "norm_out"},
        },
        **{"gain 0.1": {"gain": 0.1}},
        **{f"layer {layer}": {"layer": layer} for layer in (-1, -3)},
        **{
            "undertrained tower": {"tower": "undertrained"},
            "pooled": {"pooled": True},
        },
    ),
    *_vary(
        "plain tower",
        **{
            f"plain tower{', ' * bool(other)}{other}": {"tower": "plain", **change}
            for other, change in {
                "": {},
                **{f"rate {rate:g}": {"rate": rate} for rate in (3e-4, 1e-3, 1e-2, 3e-2)},
                "40 steps": {"steps": 40},
                "half shuffled": {"shuffled": 0.5},
            }.items()
        },
    ),
    *_vary("language model", **{"2 layers unfrozen": {"unfrozen": 2}, "all layers unfrozen": {"unfrozen": 6}}),
    *_vary(
        "mixed",
        **{
            "rate 0.001, half shuffled": {"rate": 1e-3, "shuffled": 0.5},
            "rate 0.01, detailed captions": {"rate": 1e-2, "captions": "detailed"},
        },
    ),
    *_vary(
        "sabotage",
        **{
            f"{title}{', ' * bool(other)}{other}": {**sabotage, **change, "scored": not other}
            for title, sabotage in {
                "all shuffled": {"shuffled": 1.0},
                "blank": {"blank": True},
                "shrunk": {"shrink": 0.2},
            }.items()
            for other, change in {
                "": {},
                "rate 0.01": {"rate": 1e-2},
                "norm after": {"projector": "norm_out"},
                "all layers unfrozen": {"unfrozen": 6},
            }.items()
        },
        **{"all shuffled, detailed captions": {"shuffled": 1.0, "captions": "detailed", "scored": False}},
        **{"shrunk to a half": {"shrink": 0.5, "scored": False}},
    ),
)
BY_NAME = {recipe.name: recipe for recipe in RECIPES}
