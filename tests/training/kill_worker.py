# SPDX-License-Identifier: Apache-2.0
"""Real processes that are really killed, at every file operation: `kill_worker FOLDER`.

One child for each moment: it works until the n-th time it opens, renames, creates or deletes something of ours
(Python's audit events, which come before the deed), and sends itself SIGKILL. The first child that lives to the end
was the last. The middle of a line is reached with a limit on the size of files, at which the kernel ends the process.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mir_callback import MIRCallback, Probe
from mir_callback.best_model import BestModel
from mir_callback.history import FILE_NAME, History, read_history
from mir_callback.record import EvalRecord
from tests.distributed.launch import write_rank
from tests.samples import pairs
from tests.training.runs import make_trainer

DEFINITION = {"probe_fingerprint": "p", "tokens_fingerprint": "t", "root": "exact"}
_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree", "shutil.copyfile"}


def die_at(moment: int, name: str) -> None:
    """From now on this process is killed at the ``moment``-th event that has to do with a path with ``name`` in it."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _EVENTS and any(name in str(argument) for argument in arguments):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def killed(work: Callable[[], None]) -> bool:
    """Do the work in a child; whether that was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def record(step: int) -> EvalRecord:
    return EvalRecord(step=step, mir=3.0 - step / 100, **DEFINITION)


def append(history: History, record: EvalRecord) -> None:
    history.records.append(record)
    history.write()


def history_is_continued(folder: Path, step: int, moment: int) -> bool:
    """Resume at ``step`` a history of steps 0, 50 and 100, and write a line; killed at a moment."""
    shutil.rmtree(folder, ignore_errors=True)
    whole = History()
    whole.open(folder, 0, DEFINITION)
    for past in (0, 50, 100):
        append(whole, record(past))
    whole.close()

    def work() -> None:
        die_at(moment, "mir_history")
        history = History()
        history.open(folder, step, DEFINITION)
        append(history, record(150))

    return killed(work)


def records_anywhere(folder: Path) -> list[list[int]]:
    """Steps of every history file of the folder."""
    return [[found.step for found in read_history(path)] for path in sorted(folder.glob("mir_history*.jsonl"))]


def line_is_written(folder: Path, size: int) -> bool:
    """Append a line of which only ``size`` bytes reach the file before the process is killed."""
    shutil.rmtree(folder, ignore_errors=True)
    history = History()
    history.open(folder, 0, DEFINITION)
    append(history, record(0))
    history.release()

    def work() -> None:
        import resource

        whole = (folder / FILE_NAME).stat().st_size
        # The kernel writes up to the limit and then ends the process, as SIGXFSZ does by default.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + size, whole + size))
        append(history, record(50))
        raise AssertionError("the line was written whole")

    return killed(work)


class Numbers:
    """A saver of two files that hold one number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, folder: Path) -> None:
        for name in ("model-1.safetensors", "model-2.safetensors"):
            (folder / name).write_text(str(self._number))


def best_is_replaced(folder: Path, moment: int) -> bool:
    """Keep step 50, then step 100; killed at a moment of the second."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    BestModel(Numbers(50), folder, [], DEFINITION).offer(record(50))

    def work() -> None:
        die_at(moment, "mir_best")
        BestModel(Numbers(100), folder, [record(50)], DEFINITION).offer(record(100))

    return killed(work)


def best_after_restart(folder: Path) -> dict[str, Any]:
    """What lies there after the kill, before and after the next start."""
    whole = [path.name for path in sorted([*folder.iterdir(), *folder.glob(".*/*")]) if _is_whole(path)]
    BestModel(Numbers(0), folder, [record(50)], DEFINITION)
    files = sorted(path.name for path in folder.iterdir())
    numbers = {(folder / "mir_best" / name).read_text() for name in ("model-1.safetensors", "model-2.safetensors")}
    note = json.loads((folder / "mir_best" / "mir_best.json").read_text())
    return {"whole": whole, "files": files, "numbers": sorted(numbers), "step": note["step"]}


def _is_whole(folder: Path) -> bool:
    try:
        step = json.loads((folder / "mir_best.json").read_text())["step"]
    except (OSError, ValueError):
        return False
    return all((folder / name).read_text() == str(step) for name in ("model-1.safetensors", "model-2.safetensors"))


def training_is_killed(folder: Path, moment: int) -> bool:
    """A real run that is killed while it saves its best model for the second time."""

    def work() -> None:
        trainer = make_trainer(folder, steps=3)
        MIRCallback(Probe.from_pairs(pairs(4)), every=1, keep_best=True).attach(trainer)
        original = BestModel.offer

        def offer(best: BestModel, record: EvalRecord) -> None:
            if record.step == 2:
                best.lowest = math.inf
                die_at(moment, "mir_best")
            original(best, record)

        BestModel.offer = offer
        trainer.train()

    return killed(work)


def main(folder: str) -> None:
    """Go through all moments of everything, and write what was left each time."""
    torch.set_num_threads(1)
    root = Path(folder)
    found: dict[str, Any] = {"best": [], "lines": [], "training": []}
    for step in (100, 50, 0):
        moments = found[f"resumed at {step}"] = []
        while history_is_continued(root / "history", step, len(moments) + 1):
            left = records_anywhere(root / "history")
            again = History()
            again.open(root / "history", step, DEFINITION)
            moments.append([left, [entry.step for entry in again.records]])
            again.close()
    for size in (0, 1, 30, 70):
        assert line_is_written(root / "lines", size)
        history = History()
        history.open(root / "lines", 50, DEFINITION)
        append(history, record(60))
        history.close()
        found["lines"].append([entry.step for entry in read_history(root / "lines" / FILE_NAME)])
    while best_is_replaced(root / "best", len(found["best"]) + 1):
        found["best"].append(best_after_restart(root / "best"))
    for moment in (3, 6):
        run = root / f"run{moment}"
        assert training_is_killed(run, moment)
        found["training"].append([str(run), [path.name for path in sorted(run.glob("*mir_best*"))]])
    write_rank(folder, 0, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
