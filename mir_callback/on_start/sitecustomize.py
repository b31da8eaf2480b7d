# SPDX-License-Identifier: Apache-2.0
"""Attach MIR to the Trainer of a launched run, in whichever process it trains.

`mir_callback.launch` puts this folder on the PYTHONPATH of what it runs, so Python imports this file at its start, and
the launcher's flags into an environment variable. Processes that import no Trainer get one finder more, and nothing
else: a Trainer that does not train is left alone, and so are the processes that a training starts while it lasts.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any
from weakref import WeakSet

# JSON of the flags ("arguments", as fields of MIRArguments), of folders in which training processes leave a note
# ("notes"), and of the host and process of the launcher ("launcher").
VARIABLE = "MIR_CALLBACK_LAUNCHED"
FOLDER = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(FOLDER))
_OURS = ("mir_callback", "llava_integration")
_TRAINER = "transformers.trainer"
_LAUNCHER = "python -m mir_callback.launch"
_attached: WeakSet[Any] = WeakSet()  # callbacks


def start(arguments: Mapping[str, Any], notes: str | Path) -> None:
    """Attach MIR to the Trainers of this process, and of those it starts from now on.

    Args:
        arguments: fields of MIRArguments; plain values, paths absolute.
        notes: an existing folder; each process that trains leaves a file there, with a line for each training that
            could not be measured.
    """
    users = os.environ.get("PYTHONPATH")
    paths = [FOLDER, *(users.split(os.pathsep) if users else [])]  # an empty one among them is the working directory
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    outer = json.loads(os.environ.get(VARIABLE) or "{}").get("notes", [])  # of a launcher that has started this one
    launched = {"arguments": dict(arguments), "notes": [*outer, str(notes)], "launcher": _this_process()}
    os.environ[VARIABLE] = json.dumps(launched)
    _watch_imports()


class _Finder:
    """Finds this package where the launcher has it, and the Trainer's module, whose class is then changed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in _OURS:
            return PathFinder.find_spec(name, [_ROOT])
        spec = PathFinder.find_spec(name, path) if name == _TRAINER else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: Any) -> None:
                execute(module)
                _change(module.Trainer)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def _watch_imports() -> None:
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if _TRAINER in sys.modules:
        _change(sys.modules[_TRAINER].Trainer)


def _change(trainer_class: Any) -> None:
    """Make `train` attach MIR first, in each process to whatever it trains, but not to what is trained meanwhile."""
    if hasattr(trainer_class.train, "_mir_launched"):
        return
    original, count = trainer_class.train, 0

    @functools.wraps(original)
    def train(trainer: Any, *args: Any, **keywords: Any) -> Any:
        nonlocal count
        # Taken out, so that jobs which the run starts meanwhile (evaluations, workers) are not taken for the run.
        known, is_kept = os.environ.pop(VARIABLE, ""), True
        if not known:
            return original(trainer, *args, **keywords)
        count += 1
        try:
            is_kept = _attach(trainer, json.loads(known), count)
            return original(trainer, *args, **keywords)
        finally:
            if is_kept:
                os.environ[VARIABLE] = known

    train._mir_launched = True  # type: ignore[attr-defined]
    trainer_class.train = train


def _attach(trainer: Any, launched: Mapping[str, Any], count: int) -> bool:
    """Attach MIR, or warn; False if no later training of this process can be measured either."""
    if _has_ended(*launched["launcher"]):
        _warn(f"no MIR in this training: the launcher that started process {os.getpid()} has ended")
        return False
    _note(launched["notes"])
    try:
        from mir_callback import distributed
        from mir_callback.config import MIRArguments
        from mir_callback.console import log
        from mir_callback.errors import UnsupportedModelError
        from mir_callback.integrations.huggingface import MIRCallback, attach_mir, callbacks_of
    except Exception as error:  # in another Python than the launcher's, which may lack packages or be too old
        reason = f"{sys.executable} can't import mir_callback: {type(error).__name__}: {error}. Install it there"
        _warn(f"no MIR in this training: {reason}")
        _note(launched["notes"], reason)
        return False

    remedy = f"Start {_LAUNCHER} on every node, and leave PYTHONPATH and {VARIABLE} as it sets them."
    seconds = max(600.0, getattr(trainer.args, "ddp_timeout", 0))  # as long as its own collectives wait
    distributed.require_everywhere(f"MIR was attached to training {count}", remedy, seconds=seconds)
    arguments = MIRArguments(**launched["arguments"])
    present = [each for each in callbacks_of(trainer) if isinstance(each, MIRCallback)]
    if present:
        if distributed.is_main() and not any(each in _attached for each in present):
            log.warning("training %d has MIR attached by its script: the launcher's flags have no effect on it", count)
        return True
    try:
        _attached.add(attach_mir(trainer, **vars(arguments.probe_source()), **arguments.options()))
    except UnsupportedModelError as error:
        if count == 1 and launched["launcher"] == _this_process():
            raise  # what the launcher is for; a process that is started may train something else before
        log.warning("no MIR in training %d of this process: %s", count, error)
        _note(launched["notes"], str(error))
    return True


def _note(folders: Iterable[str], line: str = "") -> None:
    host, process = _this_process()
    for folder in folders:
        with suppress(OSError):  # on another node than the launcher's there is no such folder
            with open(os.path.join(folder, f"{host}-{process}"), "a") as opened:
                opened.write(" ".join(line.split()) + "\n" if line else "")


def _warn(text: str) -> None:
    """Without the package, which may not be importable here."""
    print(f"[mir] WARNING: {text}", file=sys.stderr, flush=True)


def _this_process() -> list[Any]:
    return [os.uname().nodename, os.getpid()]


def _has_ended(host: str, process: int) -> bool:
    """Whether a process of this host is gone; False on other hosts."""
    if host != os.uname().nodename:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user
        pass
    return False


def _import_the_users() -> None:
    """Import the sitecustomize that this one hides, if there is one."""
    ours = sys.modules.pop(__name__)
    sys.path[:] = [each for each in sys.path if os.path.abspath(each) != FOLDER]
    try:
        import_module(__name__)
    except ModuleNotFoundError as error:
        if error.name != __name__:
            raise
    finally:
        sys.modules.setdefault(__name__, ours)


if __name__ == "sitecustomize":
    if VARIABLE in os.environ:
        _watch_imports()
    _import_the_users()
