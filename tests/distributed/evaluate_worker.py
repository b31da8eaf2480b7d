# SPDX-License-Identifier: Apache-2.0
"""One rank of a plain process group that evaluates good and bad cases: `evaluate_worker FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mir_callback import Probe, evaluate_mir
from mir_callback.errors import ConfigError
from mir_callback.probe.adapters import HuggingFaceAdapter
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.layouts import mixed
from tests.samples import pairs

GOOD = {
    "seven samples": {"count": 7},
    "one sample": {"count": 1},
    "few tokens": {"count": 2, "max_text_tokens": 6},
    "paper_fast": {"count": 5, "root": "paper_fast"},
    "bfloat16": {"count": 6, "dtype": torch.bfloat16},
    "layouts": {"count": 7, "adapter": HuggingFaceAdapter, "text_only": "count"},
    "qwen": {"count": 5, "build": tiny_models.qwen2_5_vl, "vision_gain": True},
}


def good_value(
    count: int,
    max_text_tokens: int = 99,
    dtype: Any = None,
    build: Any = tiny_models.llava,
    adapter: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """One evaluation, also called by the test itself on a single process; with an ``adapter`` on samples of layouts."""
    model, processor = build()
    samples = pairs(count) if adapter is None else mixed(count)
    probe = Probe.from_samples(samples, matched=True, max_text_tokens=max_text_tokens)
    own = {"processor": processor} if adapter is None else {"adapter": adapter(model, processor)}
    report = evaluate_mir(model.to(dtype or torch.float32), probe, batch_size=2, **own, **options)
    return report.to_fields()


def different_probe(rank: int) -> None:
    """Every rank brings another probe."""
    model, processor = tiny_models.llava()
    evaluate_mir(model, Probe.from_pairs(pairs(4, seed=rank)), processor=processor)


def different_batch_size(rank: int) -> None:
    """Ranks would run different numbers of forwards."""
    model, processor = tiny_models.llava()
    evaluate_mir(model, Probe.from_pairs(pairs(4)), processor=processor, batch_size=1 + rank)


def unmatched_on_rank_1(rank: int) -> None:
    """Only one rank's probe may be asked for its vision gain."""
    model, processor = tiny_models.llava()
    probe = Probe.from_pairs(pairs(4), matched=rank != 1)
    evaluate_mir(model, probe, processor=processor, vision_gain=True)


def processor_fails_on_rank_1(rank: int) -> None:
    """Encoding fails on one rank only."""
    model, processor = tiny_models.llava()
    if rank == 1:
        processor.image_processor = None
    evaluate_mir(model, Probe.from_pairs(pairs(4)), processor=processor)


def memory_runs_out_on_rank_1(rank: int) -> None:
    """One rank runs out of memory, even with single samples."""
    forward_fails_on_rank_1(rank, "out of memory")


def forward_fails_on_rank_1(rank: int, message: str = "shapes do not match") -> None:
    """The forward fails on one rank only."""
    model, processor = tiny_models.llava()

    def fail(*_: Any) -> None:
        raise RuntimeError(message)

    if rank == 1:
        model.lm_head.register_forward_hook(fail)
    evaluate_mir(model, Probe.from_pairs(pairs(4)), processor=processor)


def nan_on_rank_1(rank: int) -> None:
    """Hidden states are not finite on one rank only."""
    model, processor = tiny_models.llava()
    if rank == 1:
        with torch.no_grad():
            model.model.language_model.layers[2].mlp.down_proj.weight.fill_(torch.nan)
    evaluate_mir(model, Probe.from_pairs(pairs(4)), processor=processor)


class LocalProbe(Probe):
    """A probe that fails with an error of a class that other ranks can't import."""

    @property
    def fingerprint(self) -> str:
        """Fails."""

        class LocalError(ConfigError):
            """Ours by descent only, and not picklable."""

        raise LocalError("nobody knows this class")


def fails_with_an_error_of_its_own_on_rank_1(rank: int) -> None:
    """The error can't travel to the other ranks as it is."""
    model, processor = tiny_models.llava()
    kind = LocalProbe if rank == 1 else Probe
    evaluate_mir(model, kind.from_pairs(pairs(4)), processor=processor)


BAD: dict[str, Callable[[int], None]] = {
    case.__name__: case
    for case in (
        different_probe,
        different_batch_size,
        unmatched_on_rank_1,
        processor_fails_on_rank_1,
        memory_runs_out_on_rank_1,
        forward_fails_on_rank_1,
        nan_on_rank_1,
        fails_with_an_error_of_its_own_on_rank_1,
    )
}


def outcome(case: Callable[[int], None], rank: int) -> str:
    """The error a case ended with."""
    try:
        case(rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(folder: str) -> None:
    """Run every case; after a bad one the ranks must still be in step for the next."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    bad = {name: outcome(case, rank) for name, case in BAD.items()}
    good = {name: good_value(**options) for name, options in GOOD.items()}
    write_rank(folder, rank, {"good": good, "bad": bad})


if __name__ == "__main__":
    main(*sys.argv[1:])
