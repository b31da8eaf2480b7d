# SPDX-License-Identifier: Apache-2.0
"""All communication between ranks; the only module that imports torch.distributed. No-ops on a single process.

All functions are collective (every rank must call them, in the same order) except `rank`, `world_size`, `is_main`,
`describe`, `is_shared`, `ranks_of`, `replicated_like`, `finish`, `tensors_of` and `read_checkpoint`; of
:class:`SideChannel` only the constructor is.
"""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mir_callback.errors import ConfigError, MIRError, RemoteError

T = TypeVar("T")

_SHARED = "_known_to_all_ranks"  # attribute of an error that the other ranks have been told of
_LEAVE_SECONDS = 0.1  # between looks at how many ranks have left their forwards


def world_size() -> int:
    """Number of ranks; 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if _active() else 1


def rank() -> int:
    """This process's rank; 0 when torch.distributed is not initialised."""
    return dist.get_rank() if _active() else 0


def is_main() -> bool:
    """Whether this process is rank 0, which writes files and prints."""
    return rank() == 0


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The ranks of a process group, of all ranks' numbering."""
    return tuple(dist.get_process_group_ranks(group))


def whole(tensor: Tensor) -> Tensor:
    """A tensor as each rank of its mesh would have it alone; itself, unless it is a DTensor.

    Ranks: collective over the DTensor's mesh.
    """
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def finish(outputs: Any) -> None:
    """Wait for the tensors in a model's outputs that are still being gathered; nobody may ever read them."""
    for value in outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else ():
        if isinstance(value, Tensor) and hasattr(value, "trigger_wait"):
            value.trigger_wait()


def replicated_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that ranks have alike, as a DTensor on the mesh of ``other`` if that is one."""
    if not hasattr(other, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = other.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


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
    """Broadcast the tensor of rank ``source`` into ``tensor``, which has the same shape and dtype on every rank."""
    if world_size() > 1:
        dist.broadcast(tensor, src=source)
    return tensor


def gather_columns(part: Tensor) -> list[Tensor]:
    """Every rank's matrix (L, n_r), in rank order, on every rank; n_r may differ and may be 0.

    Concatenating them may run out of memory, so that is left to the caller's :func:`fail_together` block.
    """
    if world_size() == 1:
        return [part]
    widths = gather_objects(part.shape[1])
    with fail_together():
        padded, gathered = _room_for(part, widths)
    dist.all_gather(gathered, padded)
    return [block[:, :width] for block, width in zip(gathered, widths, strict=True)]


def sum_in_rounds(work: Callable[[Callable[[Tensor], Tensor]], T], rounds: int, like: Tensor) -> T:
    """Run ``work(add)``, where ``add`` sums a tensor over ranks; it succeeds on all ranks or fails on all.

    ``work`` must call ``add`` exactly ``rounds`` times, with tensors shaped like ``like``. If it fails on a rank, that
    rank joins the remaining sums with zeros, so that a single exchange of errors at the end is enough.
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
    """Every rank's value (small and picklable), in rank order, on every rank."""
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
    """Join the process group of torchrun's ranks inside the block; no-op on a single process or if already joined.

    With ``on_gpu`` every rank uses its current CUDA device.
    """
    if _active() or "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model under FSDP2 by their names without it, in host memory of rank 0; empty on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


def tensors_of(metadata: Any) -> dict[str, Any]:
    """Size, dtype and chunks of each tensor in a checkpoint's metadata, by its name. Ranks: pure."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return {
        name: each for name, each in metadata.state_dict_metadata.items() if isinstance(each, TensorStorageMetadata)
    }


def read_checkpoint(folder: Path, metadata: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint in the format of torch.distributed.checkpoint, on the CPU. Ranks: each by itself.

    Args:
        folder: of its shards.
        metadata: of it; that on disk is not read.
        names: of the tensors.

    Raises:
        ConfigError: the chunks of a tensor do not cover it.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        """Takes the metadata as given."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata

    known = {name: metadata.state_dict_metadata[name] for name in names}
    for name, each in known.items():
        if not _is_covered(each):
            raise ConfigError(
                f"{folder} has only a part of {name}: its {len(each.chunks)} chunks do not make up "
                f"{list(each.size)}. Use another checkpoint, or save this one again."
            )
    weights = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in known.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it reads in one process, as it is told to
        load(weights, storage_reader=Reader(folder), no_dist=True)
    return weights


def sync_errors(error: Exception | None, value: T | None = None) -> list[T]:
    """Raise on every rank if any rank has an error; otherwise return every rank's value, in rank order.

    A failed rank raises its own error. The others raise an MIRError with its rank and message, of the same class if it
    is one of this package's, else RemoteError. Values are small and picklable.
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
    """A block of local work, without collectives, that succeeds on all ranks or fails on all."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    sync_errors(error)


class SideChannel:
    """How ranks learn of a failure while they wait inside a forward, where no collective of ours can reach them.

    It goes through the store that the process group was made with. Without such a store (MPI), and on a single process,
    it does nothing.

    Ranks: only construction is collective.
    """

    def __init__(self) -> None:
        self._key = f"mir_callback/{broadcast_object(uuid.uuid4().hex)}"
        store: Any = dist.distributed_c10d._get_default_store() if world_size() > 1 else None
        while hasattr(store, "underlying_store"):  # without the prefix of the process group
            store = store.underlying_store
        self._store: Any = store
        self._reader: Any = None

    def post_failure(self, error: Exception) -> None:
        """Tell the other ranks of the first failure."""
        if self._store is not None and self._store.add(f"{self._key}/failures", 1) == 1:
            self._store.set(f"{self._key}/failure", f"rank {rank()} failed in its forward: {describe(error)}")

    def read_failure(self) -> str | None:
        """The first failure posted by any rank. May be called from another thread, whatever this one waits for."""
        if self._store is None:
            return None
        try:
            self._reader = self._reader or _another_client(self._store)
            key = f"{self._key}/failure"
            return self._reader.get(key).decode() if self._reader.check([key]) else None
        except RuntimeError:  # the process that has the store is gone
            return None

    def leave(self, *, wait: bool) -> None:
        """Note that this rank has left its forwards, and optionally wait until all have.

        A rank that failed waits: its next collective would meet one of a forward on the others.
        """
        if self._store is None:
            return
        left = self._store.add(f"{self._key}/left", 1)
        while wait and left < world_size():
            time.sleep(_LEAVE_SECONDS)
            left = self._store.add(f"{self._key}/left", 0)


def describe(error: BaseException) -> str:
    """Class and message of an error, even if its own __str__ fails. Ranks: pure."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__} (its message could not be read)"


def is_shared(error: Exception) -> bool:
    """Whether every rank has raised, so that they can all go on after it.

    True after :func:`sync_errors`, for this package's errors (raised by it, or from values equal on all ranks), and on
    a single process.
    """
    return world_size() == 1 or isinstance(error, MIRError) or getattr(error, _SHARED, False)


def require_everywhere(what: str, remedy: str, *, seconds: float = 600.0) -> None:
    """Return once every rank has called this, or raise ConfigError on those that have after ``seconds``.

    For what some ranks may never come to: a collective would wait for them until the process group's own timeout, or
    meet another one of theirs. ``what`` is different for each call.
    """
    if world_size() == 1:
        return
    store: Any = dist.distributed_c10d._get_default_store()
    if store is None:  # MPI
        return
    if store.add(what, 1) == world_size():
        store.set(f"{what}: all", "")
    try:
        store.wait([f"{what}: all"], timedelta(seconds=seconds))
    except RuntimeError as error:  # of stores: a timeout; the class has changed
        came = store.add(what, 0)
        raise ConfigError(f"{what} on {came} of {world_size()} ranks after {seconds:g} s. {remedy}") from error


def require_same(**options: object) -> None:
    """Raise ConfigError on every rank if an option differs between ranks, which would make them hang later."""
    everyone = gather_objects(options)
    for name in options:
        values = [other[name] for other in everyone]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"{name} differs between ranks: {values} on ranks 0 to {len(values) - 1}. Use the same files and "
                "arguments on every rank."
            )


def _is_covered(tensor: Any) -> bool:
    """Whether a tensor's chunks lie within it and leave nothing out; torch leaves the rest uninitialised."""
    boxes = [[*zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)] for chunk in tensor.chunks]
    if any(not 0 <= start <= start + length <= end for box in boxes for start, length, end in box):
        return False
    if any(all(length == end for _, length, end in box) for box in boxes):
        return True
    seen = torch.zeros(tensor.size, dtype=torch.bool)
    for box in boxes:
        seen[tuple(slice(start, start + length) for start, length, _ in box)] = True
    return bool(seen.all())


def _another_client(store: Any) -> Any:
    """A client of the same store for another thread: a TCPStore lets one thread in at a time, also while it waits."""
    kind: Any = dist.TCPStore  # type: ignore[attr-defined]
    if not isinstance(store, kind):
        return store
    return kind(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def _room_for(part: Tensor, widths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """``part`` padded to the largest width, and buffers for those of all ranks."""
    padded = part.new_zeros(part.shape[0], max(widths))
    padded[:, : part.shape[1]] = part
    return padded, [torch.empty_like(padded) for _ in widths]


def _kind_elsewhere(error: Exception) -> type[MIRError]:
    """The class other ranks raise: one of errors.py, as others may not unpickle or import there, which would hang."""
    ours = (kind for kind in type(error).__mro__ if kind.__module__ == MIRError.__module__)
    return next(ours, RemoteError)
