# SPDX-License-Identifier: Apache-2.0
"""`mir eval`: the value of finished models, and of every checkpoint of a run."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from mir_callback import distributed as collectives
from mir_callback.checkpoints.discover import Checkpoint, Found, checkpoints_in, select
from mir_callback.checkpoints.evaluate import LiveValues, MeasureOptions, known_record, measure, probe_of_run
from mir_callback.checkpoints.load import AUTO, DTYPES, LoadOptions, folder_of, is_local, one_line, release
from mir_callback.checkpoints.results import RESULTS_NAME, Results
from mir_callback.errors import ConfigError, MIRError
from mir_callback.evaluation.evaluate import DEFAULT_BATCH_SIZE
from mir_callback.history import Record
from mir_callback.metric.frechet import ROOTS
from mir_callback.probe.batches import check_batch_size
from mir_callback.probe.probe import Probe
from mir_callback.probe.storage import RUN_PROBE

HELP = "measure finished models, or every checkpoint of a run"
EPILOG = f"""\
a run is a Trainer's output folder: each checkpoint-N in it is measured, and the weights in the folder itself if
something there tells that they are of another step. Values go to {RESULTS_NAME} in it, and what that holds already is
not measured again.

examples:
  mir eval checkpoints/llava-pretrain --probe probe.zip
  mir eval llava-hf/llava-1.5-7b-hf --probe probe.zip --dtype bfloat16
  mir eval checkpoints/llava-pretrain --base lmsys/vicuna-7b-v1.5 --images textvqa/val --texts cnn/stories
  torchrun --nproc_per_node 4 -m mir_callback eval checkpoints/llava-pretrain --probe probe.zip --every 500
"""


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this subcommand."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a run, a checkpoint, a model folder, a hub name")
    which = parser.add_argument_group("which checkpoints")
    which.add_argument("--steps", type=_steps, metavar="N,N,...", help="only those of these steps")
    which.add_argument("--every", type=int, metavar="N", help="only those of steps that are multiples of N")
    which.add_argument("--again", action="store_true", help="measure also what has been measured already")
    probe = parser.add_argument_group("the probe")
    probe.add_argument("--probe", metavar="PATH", help=f"a saved probe (default: {RUN_PROBE} in the run's folder)")
    probe.add_argument("--images", metavar="DIR", help="or draw it from this folder of images")
    probe.add_argument("--texts", metavar="DIR", help="and this folder of texts")
    probe.add_argument("--num-samples", type=int, metavar="N", help="of the draw (default: 100)")
    probe.add_argument("--seed", type=int, metavar="N", help="of the draw (default: 0)")
    opening = parser.add_argument_group("how models are opened")
    opening.add_argument("--base", metavar="NAME", help="base model of partial checkpoints, if not the one they name")
    opening.add_argument("--processor", metavar="NAME", help="if not the one saved with the model")
    opening.add_argument("--conversation", metavar="NAME", help="LLaVA's template (default: plain for projectors)")
    opening.add_argument("--dtype", choices=[AUTO, *DTYPES], default=AUTO, help="(default: that of the weights)")
    opening.add_argument(
        "--vision-dtype", choices=[AUTO, *DTYPES], default=AUTO, help="of LLaVA's tower (default: as its train.py)"
    )
    opening.add_argument("--autocast", choices=["bfloat16", "float16"], help="as runs with --bf16 or --fp16 train")
    opening.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    opening.add_argument("--batch-size", type=int, default=DEFAULT_BATCH_SIZE, metavar="N", help="samples a forward")
    opening.add_argument("--root", choices=ROOTS, default=ROOTS[0], help="(default: %(default)s)")
    result = parser.add_argument_group("what becomes of the values")
    result.add_argument("--history", metavar="FILE", help=f"(default: {RESULTS_NAME} in the run's folder)")
    result.add_argument("--json", action="store_true", help="print records, one JSON object a line")


def run(options: Namespace) -> None:
    """Measure everything that can be measured, and say of the rest why not.

    Raises:
        MIRError: a flag breaks its rule, or at the end, if anything could not be measured.
        SystemExit: likewise on other ranks than the first, which does the talking.

    Ranks: collective.
    """
    device = _device(options.device)
    with _quiet(), collectives.joined(on_gpu=device.type == "cuda"):
        main = collectives.is_main()
        try:
            _check(options)
            failed = _measure_all(options, _options(options, device))
            if failed:
                raise ConfigError(f"{len(failed)} could not be measured: {', '.join(failed)}; see above")
        except MIRError:
            if not main:
                raise SystemExit(2) from None
            raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a bar of transformers for every checkpoint on every rank, and its warnings of what we refuse anyway."""
    before = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()


def _measure_all(options: Namespace, how: MeasureOptions) -> list[str]:
    """Measure one run after the other; names of what could not be."""
    failed: list[str] = []
    for name in options.models:
        try:
            with collectives.all_or_none():
                found = checkpoints_in(folder_of(name))
                _tell_left_out(found, options, failed)
                chosen = select(found.checkpoints, options.steps, options.every)
                probe = _probe(options, found.run)
            collectives.require_same(checkpoints=[checkpoint.name for checkpoint in chosen])
            results = Results(_history_of(options, name, found.run), found.run)
            results.require_same_definition(probe_fingerprint=probe.fingerprint, root=how.root)
        except MIRError as error:
            if len(options.models) == 1:
                raise
            _fail(failed, name, error)
            continue
        _measure_run(chosen, probe, how, results, options, failed)
    return failed


def _tell_left_out(found: Found, options: Namespace, failed: list[str]) -> None:
    """Say why weights in a run's own folder are not measured: a failure if all there is was asked for."""
    if found.error is not None and options.steps is None and options.every is None:
        _fail(failed, str(found.run), found.error)
    elif found.error is not None or found.note is not None:
        _tell(options, f"NOTE: {found.error or found.note}")


def _measure_run(
    chosen: list[Checkpoint],
    probe: Probe,
    how: MeasureOptions,
    results: Results,
    options: Namespace,
    failed: list[str],
) -> None:
    """Every checkpoint of one run: measured, or known, or told why not. Collective."""
    run = chosen[0].run
    _tell(options, f"{run}: probe {probe.fingerprint} of {len(probe)} samples, values go to {results.path}")
    live = LiveValues(run)
    if live.problem:
        _tell(options, f"  NOTE: {live.problem}")
    told: str | None = None
    bar = tqdm(chosen, desc="checkpoints", disable=None if collectives.is_main() else True, leave=False)
    for checkpoint in bar:
        record = None if options.again else known_record(checkpoint, probe, how, results)
        known = record is not None
        if record is None:
            try:
                record = measure(checkpoint, probe, how, results)
            except Exception as error:
                if not collectives.is_shared(error):
                    raise
                _fail(failed, str(checkpoint.folder), error)
            release()
        if results.problem != told:
            told = results.problem
            _tell(options, f"  NOTE: {told}")
        if record is not None:
            _print(record, known, live, options, step_known=checkpoint.step_known)
            if record["mir"] is None:
                failed.append(str(checkpoint.folder))


def _print(record: Record, known: bool, live: LiveValues, options: Namespace, *, step_known: bool) -> None:
    """One record, as a line for people or for programs."""
    if options.json:
        _write(json.dumps(record, allow_nan=False))
        sys.stdout.flush()  # a program that reads along has each as soon as it is there
        return
    value, notes = live.beside(record, step_known=step_known)
    for note in notes:
        _tell(options, f"  NOTE: {note}")
    shown = f"MIR {record['mir']:.4f}" if record["mir"] is not None else f"no MIR: {record['error']}"
    beside = f"  live {value:.4f} ({record['mir'] - value:+.1e})" if value is not None else ""
    cost = "measured before" if known else f"{record['load_seconds'] + record['seconds']:.1f} s"
    _write(f"  step {record['step']:>7}  {shown}{beside}  {cost}  {record['checkpoint']}")


def _fail(failed: list[str], name: str, error: Exception) -> None:
    failed.append(name)
    told = str(error)
    if not isinstance(error, MIRError):  # one that nobody has foreseen
        told = f"it must be measured and recorded, got {type(error).__name__}: {one_line(error)}; please report this"
    _write(f"mir eval: {told if name in told else f'{name}: {told}'}", sys.stderr)


def _tell(options: Namespace, line: str) -> None:
    """Something for people only."""
    _write(line, sys.stderr if options.json else sys.stdout)


def _write(line: str, stream: Any = None) -> None:
    """A line past the progress bar, said once for all ranks."""
    if collectives.is_main():
        tqdm.write(line, file=stream or sys.stdout)


def _history_of(options: Namespace, name: str, run: Path) -> Path:
    if options.history is not None:
        return Path(os.path.expanduser(options.history)).resolve()
    if is_local(name):
        return run / RESULTS_NAME
    return Path(RESULTS_NAME).with_suffix(f".{name.replace('/', '--')}.jsonl").resolve()


def _probe(options: Namespace, run: Path) -> Probe:
    if options.probe is not None:
        return Probe.load(options.probe)
    if options.images is None:
        return probe_of_run(run)
    draw = {"num_samples": options.num_samples, "seed": options.seed}
    given = {name: value for name, value in draw.items() if value is not None}
    return Probe.from_folders(options.images, options.texts, **given)


def _check(options: Namespace) -> None:
    """Refuse flags that break their rules or contradict each other."""
    for name, value in vars(options).items():
        if value == "" or (name == "models" and "" in value):
            flag = "MODEL" if name == "models" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} must not be empty, got ''; is a shell variable unset?")
    check_batch_size(options.batch_size)
    if options.every is not None and options.every < 1:
        raise ConfigError(f"--every must be at least 1, got {options.every}; leave it out for all checkpoints")
    if options.steps is not None and options.every is not None:
        raise ConfigError("only one of --steps and --every can choose checkpoints, got both; leave one out")
    if (options.images is None) != (options.texts is None):
        raise ConfigError("--images and --texts must be given together, got one; a text is drawn for every image")
    if options.probe is not None and options.images is not None:
        raise ConfigError("only one of --probe and --images can be the probe, got both; leave one out")
    if options.images is None and (options.num_samples is not None or options.seed is not None):
        raise ConfigError("--num-samples and --seed are of a draw, got one without --images and --texts; leave it out")
    if options.history is not None and len(options.models) > 1:
        raise ConfigError(
            f"--history must be given with one model, got {len(options.models)}; a history file is of one run: leave "
            "it out, and each has its own"
        )


def _options(options: Namespace, device: torch.device) -> MeasureOptions:
    names = ("dtype", "vision_dtype", "base", "processor", "conversation")
    loading = LoadOptions(**{name: getattr(options, name) for name in names})
    return MeasureOptions(loading, device, options.autocast, options.batch_size, options.root)


def _device(name: str | None) -> torch.device:
    """The device of this rank: the one named, else its own GPU, else the CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # how PyTorch refuses names and absent devices
        raise ConfigError(
            f"--device must be a device of this machine, got {name or 'none'}: {one_line(error)}; "
            "use cpu, cuda or cuda:0, and no more ranks than there are GPUs"
        ) from error
    return device


def _steps(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"must be whole numbers with commas between them, got {text!r}") from None
