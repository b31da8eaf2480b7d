# SPDX-License-Identifier: Apache-2.0
"""`mir eval`: MIR of saved models, and of every checkpoint of a run."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from mir_callback import distributed
from mir_callback.checkpoints.discover import Checkpoint, find_checkpoints, select_checkpoints
from mir_callback.checkpoints.evaluate import EvalOptions, LiveValues, evaluate_checkpoint, find_record
from mir_callback.checkpoints.load import AUTO, DTYPES, LoadOptions, fetch_folder, is_local, shorten_message
from mir_callback.checkpoints.results import RESULTS_NAME, Results
from mir_callback.cli.encoding import ENCODING, add_encoding_flags
from mir_callback.config import MIRConfig
from mir_callback.errors import ConfigError, MIRError
from mir_callback.fs import printable
from mir_callback.metric.frechet import ROOTS
from mir_callback.probe.probe import Probe, ProbeSource
from mir_callback.probe.storage import RUN_PROBE
from mir_callback.record import EvalRecord

EPILOG = f"""\
Of a run (a Trainer's output folder) every checkpoint-N is measured, and the weights in the folder itself if they are
known to be of another step. Values go to {RESULTS_NAME} in the run's folder.
With several GPUs: torchrun --nproc_per_node 4 -m mir_callback eval ...

example:
  mir eval checkpoints/llava-pretrain --probe probe.zip
"""


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this subcommand."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a run, a checkpoint, a model folder or a hub name")
    which = parser.add_argument_group("which checkpoints")
    which.add_argument("--steps", type=_steps, metavar="N,N,...", help="only these steps")
    which.add_argument("--every", type=int, metavar="N", help="only steps that are multiples of N")
    which.add_argument("--again", action="store_true", help="measure again what has been measured already")
    probe = parser.add_argument_group("the probe")
    probe.add_argument("--probe", metavar="PATH", help=f"a saved probe (default: {RUN_PROBE} in the run's folder)")
    probe.add_argument("--images", metavar="DIR", help="or draw it from this folder of images")
    probe.add_argument("--texts", metavar="DIR", help="and this folder of texts")
    probe.add_argument("--num-samples", type=int, metavar="N", help="image and text pairs to draw (default: 100)")
    probe.add_argument("--seed", type=int, metavar="N", help="seed of the draw (default: 0)")
    opening = parser.add_argument_group("loading")
    opening.add_argument(
        "--base", metavar="NAME", help="base model of partial checkpoints (default: the one they name)"
    )
    opening.add_argument("--processor", metavar="NAME", help="(default: the one saved with the model)")
    add_encoding_flags(
        opening,
        "plain, chat, a format string with {image} and {text}, or the name of a conversation of LLaVA (default: that "
        "of the run's history; without one plain, for whole models of LLaVA their own)",
        "as in the run",
    )
    opening.add_argument("--dtype", choices=[AUTO, *DTYPES], default=AUTO, help="(default: that of the weights)")
    opening.add_argument(
        "--vision-dtype", choices=[AUTO, *DTYPES], default=AUTO, help="(default: as in LLaVA's training)"
    )
    opening.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="run code in its files, as pickles and remote code may have: for checkpoints of people you trust",
    )
    opening.add_argument("--autocast", choices=["bfloat16", "float16"], help="as in training with --bf16 or --fp16")
    opening.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    opening.add_argument(
        "--batch-size", type=int, default=MIRConfig.batch_size, metavar="N", help="samples per forward"
    )
    opening.add_argument("--root", choices=ROOTS, default=ROOTS[0], help="(default: %(default)s)")
    opening.add_argument(
        "--vision-gain",
        action="store_true",
        help="also measure loss and vision gain on the probe's texts, which have to belong to its images",
    )
    result = parser.add_argument_group("output")
    result.add_argument("--history", metavar="FILE", help=f"(default: {RESULTS_NAME} in the run's folder)")
    result.add_argument("--json", action="store_true", help="print records, one JSON object per line")


def run(options: Namespace) -> None:
    """Measure all checkpoints, and print why one could not be measured.

    Raises:
        MIRError: a flag is invalid; or, at the end, a checkpoint could not be measured.
        SystemExit: the same on other ranks than rank 0, without a message.

    Ranks: collective.
    """
    transformers_logging.disable_progress_bar()  # one per checkpoint and rank otherwise
    transformers_logging.set_verbosity_error()  # what it warns of is an error here
    device = _find_device(options.device)
    with distributed.joined(on_gpu=device.type == "cuda"):
        try:
            _check_flags(options)
            source = ProbeSource(**{each.name: getattr(options, each.name) for each in fields(ProbeSource)})
            loading = LoadOptions(**_given(options, [each.name for each in fields(LoadOptions)]))
            config = MIRConfig(**_given(options, ("root", "batch_size", "vision_gain", *ENCODING)))
            failed = _evaluate_models(options, source, EvalOptions(loading, device, options.autocast, config))
            if failed:
                raise ConfigError(f"{len(failed)} could not be measured (see above): {', '.join(failed)}")
        except MIRError:
            if distributed.is_main():
                raise
            raise SystemExit(2) from None


def _evaluate_models(options: Namespace, source: ProbeSource, how: EvalOptions) -> list[str]:
    """Evaluate one run after the other; returns the names of what failed."""
    failed: list[str] = []
    for name in options.models:
        try:
            with distributed.fail_together():
                found = find_checkpoints(fetch_folder(name))
                run = found.checkpoints[0].run
                if found.error is not None and options.steps is None and options.every is None:
                    failed.append(_print_failure(str(run), found.error))  # all checkpoints were asked for
                elif found.error is not None or found.note is not None:
                    _note(options, f"NOTE: {found.error or found.note}")
                chosen = select_checkpoints(found.checkpoints, options.steps, options.every)
                probe = _load_probe(source, run)
            distributed.require_same(checkpoints=[checkpoint.name for checkpoint in chosen])
            results = Results(_choose_file(options, name, run), run)
            results.require_same_definition({"probe_fingerprint": probe.fingerprint, "root": how.config.root})
        except MIRError as error:
            if len(options.models) == 1:
                raise
            failed.append(_print_failure(name, error))
        else:
            failed += _evaluate_run(chosen, probe, how, results, options)
    return failed


def _evaluate_run(
    chosen: list[Checkpoint], probe: Probe, how: EvalOptions, results: Results, options: Namespace
) -> list[str]:
    """Evaluate the checkpoints of a run that are not known yet; returns the folders that failed. Collective."""
    run, failed = chosen[0].run, []
    live = LiveValues(run)
    _note(options, f"{run}: probe {probe.fingerprint} ({len(probe)} samples), writing to {results.path}")
    of_run = {name: value for name, value in live.options.items() if getattr(options, name) is None}
    how = how.with_options(of_run)
    if "prompt" in of_run:
        _note(options, f"  the run's prompt: {of_run['prompt']}")
    if live.problem:
        _note(options, f"  NOTE: {live.problem}")
    problem: str | None = None
    for checkpoint in tqdm(chosen, desc="checkpoints", disable=None if distributed.is_main() else True, leave=False):
        record = None if options.again else find_record(checkpoint, probe, how, results)
        known = record is not None
        try:
            record = record or evaluate_checkpoint(checkpoint, probe, how, results)
        except Exception as error:
            if not distributed.is_shared(error):
                raise
            failed.append(_print_failure(str(checkpoint.folder), error))
            continue
        if results.problem != problem:
            problem = results.problem
            _note(options, f"  NOTE: {problem}")
        _print(record, known, live, options, step_known=checkpoint.step_known)
        if record.mir is None:
            failed.append(str(checkpoint.folder))
    return failed


def _given(options: Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Flags that were given, or have a default, of these."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _load_probe(source: ProbeSource, run: Path) -> Probe:
    """The probe of the flags, else the one in the run's folder."""
    if source.is_given:
        return source.load()
    if not (run / RUN_PROBE).exists():
        raise ConfigError(f"There is no {run / RUN_PROBE}. Pass --probe (see mir probe), or --images and --texts.")
    return Probe.load(run / RUN_PROBE)


def _choose_file(options: Namespace, name: str, run: Path) -> Path:
    """The file to write: --history, else in the run's folder, or for a hub name in the current one."""
    if options.history is not None:
        return Path(os.path.expanduser(options.history)).resolve()
    if is_local(name):
        return run / RESULTS_NAME
    return Path(RESULTS_NAME).with_suffix(f".{name.replace('/', '--')}.jsonl").resolve()


def _print(record: EvalRecord, known: bool, live: LiveValues, options: Namespace, *, step_known: bool) -> None:
    """Print one record, as text or JSON."""
    if options.json:
        _write(record.to_line().rstrip("\n"), sys.stdout)
        sys.stdout.flush()  # for a program that reads along
        return
    value, notes = live.find(record, step_known=step_known)
    for note in notes:
        _note(options, f"  NOTE: {note}")
    shown = f"MIR {record.mir:.4f}" if record.mir is not None else f"failed: {record.error}"
    beside = (
        f"  in training {value:.4f} ({record.mir - value:+.1e})" if value is not None and record.mir is not None else ""
    )
    gain = "" if record.vision_gain is None else f"  vision gain {record.vision_gain:.4g}"
    cost = "cached" if known else f"{(record.load_seconds or 0.0) + (record.seconds or 0.0):.1f} s"
    step = record.step if step_known else "unknown"
    _write(f"  step {step:>7}  {shown}{beside}{gain}  {cost}  {record.checkpoint}", sys.stdout)


def _print_failure(name: str, error: Exception) -> str:
    """Print why something could not be measured; returns its name."""
    why = str(error) if isinstance(error, MIRError) else f"unexpected {shorten_message(error)}. Please report this."
    _write(f"mir eval: {why if name in why else f'{name}: {why}'}", sys.stderr)
    return name


def _note(options: Namespace, line: str) -> None:
    """Print something that is not part of the JSON output."""
    _write(line, sys.stderr if options.json else sys.stdout)


def _write(line: str, stream: Any) -> None:
    """Print a line above the progress bar, on rank 0."""
    if distributed.is_main():
        tqdm.write(printable(line), file=stream)


def _check_flags(options: Namespace) -> None:
    """ConfigError if flags are invalid or contradict each other."""
    for name, value in vars(options).items():
        if value == "" or (name == "models" and "" in value):
            flag = "MODEL" if name == "models" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is empty. Is a shell variable unset?")
    if options.every is not None and options.every < 1:
        raise ConfigError(f"--every must be at least 1, got {options.every}. Leave it out for all checkpoints.")
    if options.steps is not None and options.every is not None:
        raise ConfigError("--steps and --every exclude each other. Leave one out.")
    if options.images is None and (options.num_samples is not None or options.seed is not None):
        raise ConfigError("--num-samples and --seed need --images and --texts to draw from. Leave them out.")
    if options.history is not None and len(options.models) > 1:
        raise ConfigError(f"--history is for a single run, got {len(options.models)}. Leave it out.")


def _find_device(name: str | None) -> torch.device:
    """The device of this rank: --device, else its GPU, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            own = int(os.environ.get("LOCAL_RANK", "0"))
            device = torch.device("cuda", own if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # of PyTorch, for unknown and missing devices
        raise ConfigError(
            f"Could not use --device {name or 'cuda'}: {shorten_message(error)}. Use cpu, cuda or cuda:0, and no more "
            "ranks than there are GPUs."
        ) from error
    return device


def _steps(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"takes integers separated by commas, got {text!r}") from None
