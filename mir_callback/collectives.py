# SPDX-License-Identifier: Apache-2.0
"""Everything this package says to other ranks. The only importer of torch.distributed; all no-ops on one process.

Every function here but `rank`, `world_size` and `is_main` is collective: all ranks must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mir_callback.errors import ConfigError, MIRError, RemoteError

T = TypeVar("T")

_SHARED = "_known_to_all_ranks"  # marks a failure of this rank that the others know of


def world_size() -> int:
    """Number of ranks; 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if _active() else 1


def rank() -> int:
    """This process's rank; 0 when torch.distributed is not initialised."""
    return dist.get_rank() if _active() else 0


def is_main() -> bool:
    """Whether this process is rank 0, the one that writes files and prints."""
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of every rank's tensor, on every rank; ``tensor`` itself is overwritten with it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_to_rank(tensor: Tensor, destination: int) -> Tensor:
    """Sum of every rank's tensor, valid on ``destination`` only; the argument is overwritten."""
    if world_size() > 1:
        dist.reduce(tensor, dst=destination)
    return tensor


def gather_columns(part: Tensor) -> Tensor:
    """All ranks' matrices (L, n_r) side by side, (L, sum n_r), on every rank; n_r may differ and may be 0."""
    if world_size() == 1:
        return part
    widths = _widths(part.shape[1], part.device)
    padded = part.new_zeros(part.shape[0], max(widths))
    padded[:, : part.shape[1]] = part
    gathered = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(gathered, padded)
    return torch.cat([block[:, :width] for block, width in zip(gathered, widths, strict=True)], dim=1)


def gather_objects(value: T) -> list[T]:
    """Every rank's (small, picklable) value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's (picklable) value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agree(error: Exception | None) -> None:
    """End a phase on all ranks alike: if any rank failed, every rank raises.

    Args:
        error: this rank's failure in the phase, or None.

    Raises:
        Exception: this rank's own error where it failed.
        MIRError: elsewhere, of the failing rank's kind if that is one of ours (RemoteError otherwise), with its rank
            and message.
    """
    failure = None
    if error is not None:
        # Only our own classes travel: others may not be importable, or not picklable, elsewhere.
        kind = type(error) if isinstance(error, MIRError) else RemoteError
        failure = kind, f"{type(error).__name__}: {error}"
    failures = gather_objects(failure)
    if error is not None:
        setattr(error, _SHARED, True)
        raise error
    for failed_rank, told in enumerate(failures):
        if told is not None:
            raise told[0](f"rank {failed_rank} failed: {told[1]}")


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block of local work (no collectives in it) that succeeds on all ranks or fails on all, see :func:`agree`."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(error)


def is_shared(error: Exception) -> bool:
    """Whether every rank has this failure, so that going on after it leaves the ranks in step.

    True for what :func:`agree` raised and for this package's own errors, which are raised from values all ranks share
    or through `agree`; true for anything on one process.
    """
    return world_size() == 1 or isinstance(error, MIRError) or getattr(error, _SHARED, False)


def require_same(**options: object) -> None:
    """Refuse options that differ between ranks, which would sooner or later wait for each other for ever.

    Args:
        **options: (small, picklable, comparable) values by name.

    Raises:
        ConfigError: some option is not the same on every rank; on every rank.
    """
    everyone = gather_objects(options)
    for name in options:
        values = [other[name] for other in everyone]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"{name} must be the same on every rank, got {values} on ranks 0 to {len(values) - 1}; "
                "build it from the same files and arguments everywhere"
            )


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def _widths(width: int, device: torch.device) -> list[int]:
    mine = torch.tensor([width], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(gathered, mine)
    return [int(item) for item in torch.cat(gathered)]
