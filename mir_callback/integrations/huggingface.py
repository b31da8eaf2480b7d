# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Trainers and all that derive from them: Trainer events become calls of a MIRMonitor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mir_callback import distributed
from mir_callback.best_model import FOLDER_NAME, WeightSaver, without_compilers
from mir_callback.config import MIRConfig, with_options
from mir_callback.console import log
from mir_callback.errors import ConfigError
from mir_callback.history import FILE_NAME, close_earlier
from mir_callback.integrations.counting import epochs_of, samples_a_step, samples_before
from mir_callback.loggers import Loggers, active_wandb_run
from mir_callback.monitor import MIRMonitor
from mir_callback.probe.adapters import Adapter, LiveMasks, find_adapter
from mir_callback.probe.probe import Probe, ProbeSource
from mir_callback.record import EvalRecord

# The name of MIR among the metrics of a Trainer's own evaluation.
EVAL_METRIC = "eval_mir"

_PRINTERS = (PrinterCallback, ProgressCallback)


@runtime_checkable
class OffersSaver(Protocol):
    """An adapter for models that save their weights otherwise than `Trainer.save_model` does."""

    def weight_saver(self, trainer: Any) -> WeightSaver | None:
        """The saver for this Trainer, or None if the Trainer's own is right."""
        ...


class MIRCallback(TrainerCallback):
    """Compute MIR while a Trainer trains, log it beside the loss, and stop on its plateau.

    It evaluates before the first step, every ``every`` optimizer steps and at the end. Training does not change: losses
    and weights are the same to the last bit. A resumed run evaluates at the steps of an uninterrupted one. For the
    logged values see :func:`mir_callback.loggers.log_values`.

    Args:
        probe: the fixed samples; the same on every rank.
        processor: the model's processor, or a folder or name to load it from; by default the one that the Trainer
            keeps, or that lies in the model's folder (:func:`mir_callback.probe.processors.search_processor`).
        adapter: for models that no registered adapter knows.
        **options: of :class:`MIRConfig`; ``keep_best`` needs :meth:`attach`.

    Raises:
        ConfigError: an option is unknown or out of range.

    Ranks: construct it on every rank with the same arguments.

    Example:
        ```
        callback = MIRCallback(probe, every=50, stop=PlateauRule()).attach(trainer)
        trainer.train()
        print(callback.history[-1].mir)
        ```
    """

    def __init__(self, probe: Probe, *, processor: Any = None, adapter: Adapter | None = None, **options: Any) -> None:
        if not isinstance(probe, Probe):
            raise ConfigError(f"probe={probe!r:.60} is not a Probe: make one with Probe.from_folders or Probe.load")
        self.config = MIRConfig.from_options(options)
        self.probe = probe
        self._options = options
        self._processor = processor
        self._adapter = adapter
        self._trainer: Any = None
        self._monitor: MIRMonitor | None = None  # of the run that trains or has trained last
        self._is_training = False
        self._start = 0, 0  # step that training started at, samples seen by then

    @property
    def history(self) -> list[EvalRecord]:
        """Records of the evaluations so far, newest last; the lines of `<output_dir>/mir_history.jsonl`."""
        return [] if self._monitor is None else self._monitor.history

    def attach(self, trainer: Any) -> MIRCallback:
        """Add this callback to a Trainer and log through it.

        Args:
            trainer: a transformers Trainer, before `train()`.

        Returns:
            This callback.

        Raises:
            ConfigError: not a Trainer, it has a MIRCallback already, or its processor can't handle images.
            UnsupportedModelError: no adapter fits its model.

        Ranks: every rank.
        """
        others = [other for other in callbacks_of(trainer) if isinstance(other, MIRCallback) and other is not self]
        if others:
            raise ConfigError(
                "this Trainer has a MIRCallback already, and two would write the same history file; remove the other "
                "with trainer.remove_callback"
            )
        if self._trainer not in (None, trainer):
            raise ConfigError("this MIRCallback is attached to another Trainer; make one for each Trainer")
        if isinstance(getattr(trainer, "model", None), nn.Module):  # else it is made when training begins
            self._adapter_for(trainer.model, trainer, trainer)
        if self not in callbacks_of(trainer):
            trainer.add_callback(self)
        self._trainer = trainer
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything, open the history and evaluate before the first step. Errors here end the run."""
        _claim(state, self)
        self._is_training, self._monitor = False, None
        trainer = self._trainer
        if trainer is None and self.config.keep_best:
            raise ConfigError(
                "keep_best needs the Trainer to save its model: use MIRCallback(..., keep_best=True).attach(trainer)"
            )
        if trainer is None:
            log.info(
                "not attached to the Trainer: values go to the history file and an active wandb run; to send them to "
                "every tracker use MIRCallback(...).attach(trainer)"
            )
        elif not _has_tracker(trainer):
            log.info(
                'the Trainer reports to no tracker (report_to="none"): values go to %s and the console. To see them in '
                'wandb beside the loss, pass report_to="wandb", or --report_to wandb',
                Path(run_folder(trainer, args)) / FILE_NAME,
            )
        _check_best_metric(args)
        with distributed.fail_together():
            processor = kwargs.get("processing_class") or kwargs.get("tokenizer")
            keeper = SimpleNamespace(processing_class=processor) if trainer is None else trainer
            adapter = self._adapter_for(kwargs["model"], trainer, keeper)
        folder = run_folder(trainer, args)
        before = samples_before(folder, state.global_step, samples_a_step(args, state, trainer))
        self._start = state.global_step, before
        close_earlier(folder)  # a Trainer is in one run at a time: one before ended in an error
        self._monitor = MIRMonitor(
            kwargs["model"],
            self.probe,
            adapter=adapter,
            optimizer=kwargs.get("optimizer"),
            lr_scheduler=kwargs.get("lr_scheduler"),
            output_dir=folder,
            total_steps=state.max_steps if state.max_steps > 0 else None,
            total_epochs=epochs_of(state.max_steps, kwargs.get("train_dataloader"), args),
            start_step=state.global_step,
            start_status=self._status(args, state),
            log=self._loggers(),
            seed=args.seed,
            data_seed=args.data_seed,
            save_weights=_saver_of(trainer, adapter) if self.config.keep_best else None,
            **{**self._options, "prompt": None},  # the adapter has it
        )
        self._is_training = True
        control.should_training_stop = control.should_training_stop or self._monitor.should_stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate if due, and stop training if the rule says so."""
        monitor = self._running()
        monitor.step(state.global_step, **self._status(args, state))
        if control.should_training_stop and "end" in self.config.also_on:
            monitor.evaluate()
        control.should_training_stop = control.should_training_stop or monitor.should_stop
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Add `eval_mir` to the metrics of the Trainer's own evaluation, so that it can choose checkpoints by it.

        Evaluates the weights, unless this step has a value, if that was asked for or the Trainer chooses by MIR. If the
        evaluation fails `eval_mir` is NaN, which is never best.
        """
        if not self._is_training:
            return control
        metrics, is_chosen = kwargs.get("metrics"), _chooses_by_mir(args)
        if is_chosen or "evaluate" in self.config.also_on:
            self._evaluate(control)
        newest = self.history[-1] if self.history and self.history[-1].step == state.global_step else None
        value = None if newest is None else newest.mir
        if metrics is not None and (value is not None or is_chosen):
            metrics[EVAL_METRIC] = math.nan if value is None else value
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate at a checkpoint, if asked to."""
        if self._is_training and "save" in self.config.also_on:
            self._evaluate(control)
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the final weights, unless this step has a value or other weights were loaded meanwhile."""
        if self._is_training:
            self._running().close(evaluate=not args.load_best_model_at_end)
        self._is_training = False

    def _status(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """How far training has come, as keyword arguments of :meth:`MIRMonitor.step`.

        The loss is the last one logged, usually of an earlier step, because the Trainer logs after its callbacks.
        Tokens are known if the Trainer counts them (`include_num_input_tokens_seen`).
        """
        is_counted = getattr(args, "include_num_input_tokens_seen", False) not in (False, "no")
        newest = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
        (start, before), now = self._start, state.global_step
        return {
            "epoch": state.epoch or 0.0,
            "loss": newest.get("loss"),
            "loss_step": newest.get("step"),
            "samples_seen": before + (now - start) * samples_a_step(args, state, self._trainer),
            "tokens_seen": int(state.num_input_tokens_seen) if is_counted else None,
        }

    def _adapter_for(self, model: nn.Module, trainer: Any, keeper: Any) -> Adapter:
        """The adapter that encodes the probe for a model: as given, or as registered for its family."""
        options = {"adapter": self._adapter, "trainer": trainer, "keeper": keeper, **self.config.encoding}
        return _without_template_hook(find_adapter(model, self._processor, **options), trainer)

    def _running(self) -> MIRMonitor:
        if self._monitor is None:
            raise ConfigError("this MIRCallback was added during training; add it before trainer.train()")
        return self._monitor

    def _evaluate(self, control: TrainerControl) -> None:
        monitor = self._running()
        monitor.evaluate()
        control.should_training_stop = control.should_training_stop or monitor.should_stop

    def _loggers(self) -> Loggers:
        trainer, options = self._trainer, self.config.for_trackers()
        if trainer is None:
            return Loggers(options=options, commit=True)
        through = _log_through(trainer, self.config.log_layers)
        return Loggers(through=through, reporters=lambda: callbacks_of(trainer), options=options, commit=True)


MIRCallback.__init__ = with_options(MIRCallback.__init__)  # type: ignore[method-assign]


def attach_mir(
    trainer: Any,
    probe: Probe | str | Path | None = None,
    *,
    images: str | Path | None = None,
    texts: str | Path | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    processor: Any = None,
    adapter: Adapter | None = None,
    **options: Any,
) -> MIRCallback:
    """Add MIR to a Trainer, whatever its model: LLaVA's code bases, Hugging Face's models, registered adapters.

    Args:
        trainer: a transformers Trainer or one derived from it, before `train()`.
        probe: a probe, or the path of a saved one; or instead
        images: a folder of probe images, and
        texts: a folder of probe texts.
        num_samples: image and text pairs drawn from the folders, 100 by default.
        seed: of the draw, 0 by default.
        processor: the model's, or a folder or name to load it from; by default the one that the Trainer keeps, or that
            lies in the model's folder.
        adapter: encodes the probe; by default the one registered for the model.
        **options: of :class:`MIRConfig`.

    Returns:
        The attached callback.

    Raises:
        ConfigError, ProbeError: something is missing or unreadable.
        UnsupportedModelError: no adapter fits the model.

    Ranks: collective, with the same arguments; an error on one rank is raised on all.

    Example:
        ```
        attach_mir(trainer, images="textvqa/val", texts="cnn/stories", every=50, stop="plateau")
        trainer.train()
        ```
    """
    with distributed.fail_together():
        callbacks_of(trainer)  # refuse what is not a Trainer, or has no known model, before anything is read
        config = MIRConfig.from_options(options)
        if isinstance(getattr(trainer, "model", None), nn.Module):
            find_adapter(trainer.model, processor, adapter=adapter, trainer=trainer, **config.encoding)
        source = ProbeSource(probe=probe, images=images, texts=texts, num_samples=num_samples, seed=seed)
        samples = source.load()
    return MIRCallback(samples, processor=processor, adapter=adapter, **options).attach(trainer)


attach_mir = with_options(attach_mir)


def callbacks_of(trainer: Any) -> list[Any]:
    """The callbacks of a Trainer; ConfigError if it is none."""
    handler = getattr(trainer, "callback_handler", None)
    if handler is None:
        raise ConfigError(
            f"{type(trainer).__name__} is not a transformers Trainer; in a loop of your own use MIRMonitor"
        )
    callbacks: list[Any] = handler.callbacks
    return callbacks


def run_folder(trainer: Any, args: TrainingArguments) -> str:
    """Where the run that begins now writes: its `output_dir`, or in a hyperparameter search the trial's folder."""
    trial = getattr(trainer, "_trial", None)
    return str((args.output_dir if trial is None else trainer._get_output_dir(trial)) or ".")


class TrainerSaver:
    """Saves with `Trainer.save_model`: whole weights, or DeepSpeed's shards if it may not consolidate them.

    Under FSDP with SHARDED_STATE_DICT, with which `save_model` writes nothing, rank 0 gathers the whole weights.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        engine = getattr(trainer, "deepspeed", None)
        if getattr(engine, "autotp_size", int)() > 1:
            raise ConfigError(
                "keep_best can't save this model: DeepSpeed's tensor parallelism has split its weights, and writes "
                "shards that nothing reads but the run itself. Set keep_best=False"
            )
        if engine is None or engine.zero_optimization_stage() != 3 or engine.zero_gather_16bit_weights_on_model_save():
            return
        log.info(
            "%s will hold DeepSpeed shards with the optimizer's state, like the Trainer's own checkpoints; its "
            "zero_to_fp32.py converts them. For whole weights set stage3_gather_16bit_weights_on_model_save to true in "
            "the DeepSpeed configuration",
            FOLDER_NAME,
        )

    def __call__(self, folder: Path) -> None:
        """See :class:`WeightSaver`."""
        trainer = self._trainer
        plugin = getattr(getattr(getattr(trainer, "accelerator", None), "state", None), "fsdp_plugin", None)
        alone = plugin is None and getattr(trainer, "deepspeed", None) is None
        weights = without_compilers(trainer.model.state_dict()) if alone else {}
        if not weights and (plugin is None or "FULL_STATE_DICT" in str(plugin.state_dict_type)):
            trainer.save_model(str(folder), _internal_call=True)  # internal: nothing is pushed to a hub
            return
        weights = weights or trainer.accelerator.get_state_dict(trainer.model)
        if trainer.args.should_save:
            trainer._save(str(folder), state_dict=weights)


def _saver_of(trainer: Any, adapter: Any) -> WeightSaver:
    """The adapter's own saver for this Trainer if it has one, else the Trainer's."""
    offered = adapter.weight_saver(trainer) if isinstance(adapter, OffersSaver) else None
    return offered or TrainerSaver(trainer)


def _without_template_hook(adapter: Adapter, trainer: Any) -> Adapter:
    """The adapter; under ms-swift its forwards are as in swift's own generation, without the hook of its template.

    In training that hook replaces `input_ids` by embeddings. Swift's own batches bring their positions along; a probe's
    would get those of text, where Qwen-VL's are two-dimensional over an image.
    """
    context, live_masks = getattr(getattr(trainer, "template", None), "generate_context", None), adapter.live_masks
    if context is None:
        return adapter

    @contextmanager
    def without_hook(model: nn.Module) -> Iterator[LiveMasks | None]:
        with context(), live_masks(model) as live:
            yield live

    wrapped = copy.copy(adapter)  # a user's own may be used elsewhere
    wrapped.live_masks = without_hook  # type: ignore[method-assign]
    return wrapped


def _has_tracker(trainer: Any) -> bool:
    """Whether a tracker gets what is logged; other callbacks may do anything with it."""
    trackers = tuple(INTEGRATION_TO_CALLBACK.values())
    return active_wandb_run() is not None or any(isinstance(each, trackers) for each in callbacks_of(trainer))


def _without_layers(on_log: Callable[..., Any]) -> Callable[..., Any]:
    def on_brief_log(args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        brief = {name: value for name, value in (logs or {}).items() if not name.startswith("mir_layer/")}
        return on_log(args, state, control, logs=brief, **kwargs)

    return on_brief_log


def _log_through(trainer: Any, log_layers: bool) -> Callable[[dict[str, float], EvalRecord], None]:
    """Log through `Trainer.log`, which reaches every tracker and `state.log_history`, on all ranks.

    Callbacks that print get the values without those of the layers, unless ``log_layers``. Logging clears
    `control.should_log`, which would swallow the loss of the same step: it is restored. An override of `log` is not
    called: TRL's would move its averages since the last row (entropy, token accuracy) into the row at hand.
    """

    def write(values: dict[str, float], record: EvalRecord) -> None:
        should_log = trainer.control.should_log
        printers = [] if log_layers else [each for each in callbacks_of(trainer) if isinstance(each, _PRINTERS)]
        own = [vars(printer).get("on_log") for printer in printers]
        try:
            for printer in printers:
                printer.on_log = _without_layers(printer.on_log)  # type: ignore[method-assign]
            Trainer.log(trainer, values)
        finally:
            for printer, on_log in zip(printers, own, strict=True):
                if on_log is None:
                    del printer.on_log
                else:
                    printer.on_log = on_log  # type: ignore[method-assign]
            trainer.control.should_log = should_log

    return write


def _chooses_by_mir(args: TrainingArguments) -> bool:
    """Whether the Trainer chooses its best checkpoint by MIR."""
    return getattr(args, "metric_for_best_model", None) in (EVAL_METRIC, EVAL_METRIC.removeprefix("eval_"))


def _check_best_metric(args: TrainingArguments) -> None:
    """Refuse a Trainer that would keep the checkpoint with the highest MIR."""
    if _chooses_by_mir(args) and args.greater_is_better is not False:
        raise ConfigError(
            f"metric_for_best_model={args.metric_for_best_model!r} with greater_is_better={args.greater_is_better}, "
            "the default of transformers, keeps the highest MIR; lower is better: pass greater_is_better=False"
        )


def _claim(state: TrainerState, callback: MIRCallback) -> None:
    """Refuse a second MIRCallback in one run: both get the same state, a new one for each run.

    An attribute that is not a field of the state is not saved with it.
    """
    if vars(state).setdefault("_mir_callback", id(callback)) != id(callback):
        raise ConfigError(
            "this Trainer has two MIRCallbacks, which would write the same history file; remove one of them with "
            "trainer.remove_callback"
        )
