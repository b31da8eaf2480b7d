# SPDX-License-Identifier: Apache-2.0
"""MIR in Lightning's Trainer, a callback around MIRMonitor. Needs lightning or pytorch_lightning."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from mir_callback.config import MIRConfig, with_options
from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.history import close_earlier
from mir_callback.loggers import Loggers
from mir_callback.monitor import MIRMonitor
from mir_callback.probe.adapters import Adapter
from mir_callback.probe.probe import Probe
from mir_callback.record import EvalRecord

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    from pytorch_lightning.callbacks import Callback


class MIRLightningCallback(Callback):  # type: ignore[misc]  # mypy does not see its types
    """Measure MIR during training with a Lightning Trainer, send it to its loggers, and stop on its plateau.

    The events of ``also_on`` are "start", "end", "evaluate" (after each validation) and "save" (at each checkpoint).
    History and probe go to `trainer.default_root_dir`, where a resumed fit (`ckpt_path`) continues the history.

    Args:
        probe: the fixed samples; the same on every rank.
        processor: the model's processor; default: `processor` of the LightningModule.
        adapter: for models without a registered adapter.
        model: the vision-language model in the LightningModule, as an attribute ("student.vlm") or a function of the
            module; default: its only Hugging Face model.
        **options: of :class:`MIRConfig`.

    Raises:
        ConfigError: an option is invalid; or, when training starts, the module has no or several models.
        UnsupportedModelError: when training starts, with FSDPStrategy.

    Ranks: construct it on every rank, with the same arguments.

    Attributes:
        history: records of the evaluations so far, newest last.

    Example:
        ```
        callback = MIRLightningCallback(probe, every=50, stop=PlateauRule())
        Trainer(max_epochs=1, callbacks=[callback]).fit(module)
        ```
    """

    def __init__(
        self,
        probe: Probe,
        *,
        processor: Any = None,
        adapter: Adapter | None = None,
        model: str | Callable[[Any], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._config = MIRConfig.from_options(options)
        self._probe, self._processor, self._adapter, self._model = probe, processor, adapter, model
        self._options = options
        self._monitor: MIRMonitor | None = None  # while training
        self.history: list[EvalRecord] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the history and evaluate before the first step; errors end the run."""
        if type(trainer.strategy).__name__ == "FSDPStrategy":
            raise UnsupportedModelError(
                "FSDPStrategy wraps the whole LightningModule, so that MIR cannot call the model inside of it. Use "
                "DDPStrategy or ModelParallelStrategy."
            )
        planned, self._step = trainer.estimated_stepping_batches, trainer.global_step
        close_earlier(trainer.default_root_dir)  # a run before ended in an error
        with trainer.precision_plugin.forward_context():
            self._monitor = MIRMonitor(
                find_model(pl_module, self._model),
                self._probe,
                processor=self._processor or getattr(pl_module, "processor", None),
                adapter=self._adapter,
                optimizer=next(iter(trainer.optimizers), None),
                lr_scheduler=_scheduler_of(trainer),
                output_dir=trainer.default_root_dir,
                total_steps=int(planned) if 0 < planned < math.inf else None,
                total_epochs=trainer.max_epochs if (trainer.max_epochs or 0) > 0 else None,
                start_step=self._step,
                start_status={"epoch": _epoch(trainer)},
                log=Loggers(
                    through=_log_to(trainer),
                    reporters=lambda: trainer.loggers,
                    options=self._config.for_trackers(),
                    commit=True,
                ),
                seed=_seed(),
                **self._options,
            )
        self.history = self._monitor.history
        trainer.should_stop = trainer.should_stop or self._monitor.should_stop

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Evaluate if due after an optimizer step, and stop training if the stop rule fires."""
        if trainer.global_step == self._step:  # gradients accumulate
            return
        self._step = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches  # Lightning has divided it
        self._call(trainer, lambda monitor: monitor.step(self._step, loss=loss, epoch=_epoch(trainer)))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate if "evaluate" is in ``also_on``."""
        if "evaluate" in self._config.also_on:
            self._call(trainer, MIRMonitor.evaluate)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Evaluate if "save" is in ``also_on``."""
        if "save" in self._config.also_on:
            self._call(trainer, MIRMonitor.evaluate)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate the final weights, unless the last step was evaluated already."""
        self._call(trainer, MIRMonitor.close)
        self._monitor = None

    def _call(self, trainer: Any, method: Callable[[MIRMonitor], Any]) -> None:
        """Call the monitor in the same context as Lightning's forwards, e.g. under autocast."""
        if self._monitor is not None:
            with trainer.precision_plugin.forward_context():
                method(self._monitor)
            trainer.should_stop = trainer.should_stop or self._monitor.should_stop


MIRLightningCallback.__init__ = with_options(MIRLightningCallback.__init__)  # type: ignore[method-assign]


def find_model(module: nn.Module, where: str | Callable[[Any], nn.Module] | None) -> nn.Module:
    """The vision-language model of a LightningModule; ConfigError if not given and there is not exactly one."""
    if where is not None:
        found: nn.Module = attrgetter(where)(module) if isinstance(where, str) else where(module)
        return found
    names: list[str] = []  # outer modules come first; modules inside of one found are parts of it
    for name, child in module.named_modules():
        is_part = any(name.startswith(f"{outer}.") for outer in names)
        if name and not is_part and hasattr(child, "save_pretrained") and hasattr(child, "config"):
            names.append(name)
    if len(names) != 1:
        raise ConfigError(
            f"{type(module).__name__} has {len(names)} Hugging Face models ({', '.join(names) or 'none'}), MIR needs "
            "one. Name it: MIRLightningCallback(..., model='ATTRIBUTE')."
        )
    return module.get_submodule(names[0])


def _scheduler_of(trainer: Any) -> Any:
    """The learning-rate scheduler, if it steps with the optimizer."""
    found = [each.scheduler for each in trainer.lr_scheduler_configs if each.interval == "step" and each.frequency == 1]
    return next(iter(found), None)


def _seed() -> int | None:
    """The seed of `seed_everything`, which Lightning keeps in the environment; None without."""
    found = os.environ.get("PL_GLOBAL_SEED", "")
    return int(found) if found.isdecimal() else None


def _epoch(trainer: Any) -> float:
    """Epochs done, with fraction if the length of the data is known."""
    batches = trainer.num_training_batches
    return (trainer.fit_loop.total_batch_idx + 1) / batches if 0 < batches < math.inf else float(trainer.current_epoch)


def _log_to(trainer: Any) -> Callable[[dict[str, float], EvalRecord], None]:
    def write(values: dict[str, float], record: EvalRecord) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=record.step)

    return write
