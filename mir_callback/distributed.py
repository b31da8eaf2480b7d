# SPDX-License-Identifier: Apache-2.0
"""Everything this package says to other ranks. The only importer of torch.distributed; all no-ops on one process.

Every function here is collective, all ranks must call it in the same order, but for `rank`, `world_size`, `is_main`,
`describe` and `is_shared`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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


def copy_from_rank(tensor: Tensor, source: int) -> Tensor:
    """The tensor of rank ``source``, on every rank; shape and dtype are alike, and other ranks' are overwritten."""
    if world_size() > 1:
        dist.broadcast(tensor, src=source)
    return tensor


def gather_columns(part: Tensor) -> list[Tensor]:
    """All ranks' matrices (L, n_r), in rank order, on every rank; n_r may differ and may be 0.

    They are not joined: that may fail, and is the caller's to do where a failure of one rank becomes one of all.
    """
    if world_size() == 1:
        return [part]
    widths = gather_objects(part.shape[1])
    with fail_together():
        padded, gathered = _room_for(part, widths)
    dist.all_gather(gathered, padded)
    return [block[:, :width] for block, width in zip(gathered, widths, strict=True)]


def sum_in_rounds(work: Callable[[Callable[[Tensor], Tensor]], T], rounds: int, like: Tensor) -> T:
    """What local work returns that sums tensors over ranks in rounds; it succeeds on all ranks or fails on all.

    The work is called with the sum over ranks, which it must call exactly ``rounds`` times, with tensors like ``like``.
    A rank whose work fails takes part with zeros until the last round, so that one exchange of errors does for all.
    """
    done = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal done
        done += 1
        return sum_over_ranks(tensor)

    with fail_together():
        spare = torch.empty_like(like)
    error: Exception | None = None
    try:
        result = work(add)
    except Exception as caught:
        error = caught
    for _ in range(done, rounds):
        sum_over_ranks(spare.zero_())
    sync_errors(error)
    return result


def gather_objects(value: T) -> list[T]:
    """Every rank's (small, picklable) value, in rank order, on every rank."""
    values: list[T] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's (picklable) value, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def joined(*, on_gpu: bool) -> Iterator[None]:
    """While open, be one of the ranks that torchrun has started; nothing on a single process or in a group already.

    With ``on_gpu`` every rank works on a GPU, which it has made its current device.
    """
    if _active() or "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def sync_errors(error: Exception | None, value: T | None = None) -> list[T]:
    """End a phase on all ranks alike: if any rank failed, every rank raises, else every rank's value in rank order.

    A rank that failed raises its own error; elsewhere it is an MIRError, of the failing rank's kind if that is one of
    ours (RemoteError otherwise), with its rank and message. Values are small and picklable.
    """
    everyone = gather_objects((None if error is None else (_kind_elsewhere(error), describe(error)), value))
    if error is not None:
        setattr(error, _SHARED, True)
        raise error
    for failed_rank, (failure, _) in enumerate(everyone):
        if failure is not None:
            kind, message = failure
            raise kind(f"rank {failed_rank} failed: {message}")
    return [each for _, each in everyone]  # type: ignore[misc]  # None only where none was given


@contextmanager
def fail_together() -> Iterator[None]:
    """A block of local work (no collectives in it) that succeeds on all ranks or fails on all."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    sync_errors(error)


def describe(error: BaseException) -> str:
    """Class and message of an error; never fails, whatever the error's own code does. Ranks: pure."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}, whose message cannot be shown"


def is_shared(error: Exception) -> bool:
    """Whether every rank has this failure, so that going on after it leaves the ranks in step.

    True for what :func:`sync_errors` raised, for this package's own errors, which are raised through it or from values
    all ranks share, and for anything on one process.
    """
    return world_size() == 1 or isinstance(error, MIRError) or getattr(error, _SHARED, False)


def require_same(**options: object) -> None:
    """Raise ConfigError on every rank if an option differs between them, who would sooner or later wait for ever."""
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


def _room_for(part: Tensor, widths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """``part`` filled up to the widest, and room for everyone's."""
    padded = part.new_zeros(part.shape[0], max(widths))
    padded[:, : part.shape[1]] = part
    return padded, [torch.empty_like(padded) for _ in widths]


def _kind_elsewhere(error: Exception) -> type[MIRError]:
    """As what other ranks raise this failure.

    Only the classes of our errors.py travel: a failure that cannot be pickled here, or imported there, would leave the
    others waiting.
    """
    ours = (kind for kind in type(error).__mro__ if kind.__module__ == MIRError.__module__)
    return next(ours, RemoteError)
