# SPDX-License-Identifier: Apache-2.0
"""Five kinds of training code as users write them, each on one process and under DDP, ZeRO-2, ZeRO-3, FSDP2 and FSDP1.

Each trains the same tiny LLaVA and is watched or not. What they return is all that must not depend on that.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.tracking import GeneralTracker
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from mir_callback import MIRMonitor, Probe, attach_mir
from mir_callback.integrations.lightning import MIRLightningCallback
from tests import tiny_models
from tests.samples import pairs
from tests.training.runs import Pairs, collator

STEPS, ACCUMULATION, BATCH, RATE = 2, 2, 2, 3e-3
PROBE = Probe.from_pairs(pairs(7))  # odd: the last rank comes out one short and repeats a sample
LAYERS_NAMED = ("LlamaDecoderLayer", "CLIPEncoderLayer")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
)


def watching(setup: str) -> dict[str, Any]:
    """Options of MIR. One sample a forward where padding moves the last digits of hidden states."""
    return {"every": 1, "batch_size": 1 if "bfloat16" in setup else 2, "keep_best": setup == "fsdp2"}


@dataclass
class Run:
    """What a run leaves."""

    model: nn.Module  # as it trained, wrapped
    optimizer: Any
    history: list[Any]
    rows: list[dict[str, Any]] = field(default_factory=list)  # all that anybody logs, ours among them


def make_model(setup: str) -> tuple[Any, Any]:
    """The model and its processor, the same at each call."""
    random.seed(4)
    np.random.seed(4)
    model, processor = tiny_models.llava(dropout=0.2)
    processor.chat_template = CHAT_TEMPLATE
    model.model.vision_tower.requires_grad_(False)  # as LLaVA's is; DDP takes no weights that no loss depends on
    if "LoRA" in setup:
        adapters = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, adapters)
    return model, processor


def deepspeed_config(layout: str) -> dict[str, Any] | None:
    """As users write it, with a threshold small enough that the tiny weights are really sharded."""
    if not layout.startswith("zero"):
        return None
    small = {"stage3_param_persistence_threshold": 0} if layout == "zero3" else {}
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": int(layout[-1]), **small},
        "zero_force_ds_cpu_optimizer": False,
    }


def fsdp_config(setup: str) -> dict[str, Any]:
    """As users write it for the Trainer."""
    if not setup.startswith("fsdp"):
        return {}
    version = {"version": 1, "sync_module_states": False} if setup.startswith("fsdp1") else {"version": 2}
    saving = {"state_dict_type": "SHARDED_STATE_DICT"} if "saving" in setup else {}
    return {"fsdp": True, "fsdp_config": {**version, **saving, "transformer_layer_cls_to_wrap": list(LAYERS_NAMED)}}


def tell_accelerate_of_a_mesh() -> None:
    """Accelerate shards on accelerators only; FSDP itself works on the CPU too."""
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}


def shard(model: Any, setup: str) -> Any:
    """The model under `fully_shard` or FSDP1, layer by layer, as a plain loop does it."""
    layers = [module for module in model.modules() if type(module).__name__ in LAYERS_NAMED]
    if setup.startswith("fsdp1"):
        policy = ModuleWrapPolicy({type(layer) for layer in layers})
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)
    options: dict[str, Any] = {}
    if "bfloat16" in setup:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if "offload" in setup:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if "HSDP" in setup:
        options["mesh"] = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def seed() -> None:
    """Ranks draw different dropout."""
    torch.manual_seed(5 + (dist.get_rank() if dist.is_initialized() else 0))


def loader_of(processor: Any) -> DataLoader:
    """Batches of this rank."""
    data = Pairs(64)
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    sampler = DistributedSampler(data, ranks, rank, shuffle=False)
    return DataLoader(data, BATCH, sampler=sampler, collate_fn=collator(processor), generator=torch.Generator())


class Recorder(TrainerCallback):
    """Takes the rows that trackers would get."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append({"at": state.global_step, **logs})


def arguments_of(setup: str, folder: Path) -> dict[str, Any]:
    """Of a Trainer, HF's or TRL's."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": RATE,
        "logging_steps": 2,  # so that an average over steps can be damaged by a row in between
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "steps" if "saving" in setup else "no",
        "save_steps": 1,
        "disable_tqdm": True,
        "seed": 5,
        "ddp_backend": "gloo" if dist.is_initialized() else None,
        "deepspeed": deepspeed_config(setup),
        **fsdp_config(setup),
    }


def train(trainer: Trainer, watch: dict[str, Any] | None) -> Run:
    """Attach, train."""
    recorder = Recorder()
    trainer.add_callback(recorder)
    callback = None if watch is None else attach_mir(trainer, PROBE, **watch)
    trainer.train()
    rows = [*trainer.state.log_history, *recorder.rows]
    return Run(trainer.model_wrapped, trainer.optimizer, callback.history if callback else [], rows)


def huggingface(setup: str, folder: Path, watch: dict[str, Any] | None) -> Run:
    """The stock Trainer."""
    model, processor = make_model(setup)  # first: afterwards transformers would make it in shards of ZeRO-3
    args = TrainingArguments(**arguments_of(setup, folder), remove_unused_columns=False)
    if setup.startswith("fsdp"):
        tell_accelerate_of_a_mesh()
    data = {"train_dataset": Pairs(), "data_collator": collator(processor)}
    return train(Trainer(model=model, args=args, processing_class=processor, **data), watch)


def trl(setup: str, folder: Path, watch: dict[str, Any] | None) -> Run:
    """TRL's SFTTrainer, on conversations about images."""
    model, processor = make_model(setup)  # first: afterwards transformers would make it in shards of ZeRO-3
    args = SFTConfig(**arguments_of(setup, folder), max_length=None, bf16=False, gradient_checkpointing=False)
    if setup.startswith("fsdp"):
        tell_accelerate_of_a_mesh()
    said = [{"user": "Which one?", "assistant": text} for _, text in pairs(64, seed=9)]
    rows = [
        {
            "images": [image],
            "messages": [{"role": who, "content": text} for who, text in each.items()],
        }
        for (image, _), each in zip(pairs(64, seed=9), said, strict=True)
    ]
    data = datasets.Dataset.from_list(rows)
    return train(SFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor), watch)


class Tracker(GeneralTracker):
    """Accelerate's, which keeps what it gets."""

    name, requires_logging_directory, main_process_only = "rows", False, False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    @property
    def tracker(self) -> Any:
        return self.rows

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append({"at": step, **values})


class Nobody:
    """A monitor that does nothing."""

    history: tuple[()] = ()

    def step(self, *given: Any, **named: Any) -> None:
        pass

    def close(self) -> None:
        pass


def monitor_of(watch: dict[str, Any] | None, *given: Any, **named: Any) -> Any:
    """What the loops call."""
    return Nobody() if watch is None else MIRMonitor(*given, PROBE, total_steps=STEPS, **named, **watch)


def accelerate(setup: str, folder: Path, watch: dict[str, Any] | None) -> Run:
    """Accelerate with a tracker of its own."""
    model, processor = make_model(setup)
    options: dict[str, Any] = {"cpu": True}
    if setup.startswith("zero"):
        options = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=deepspeed_config(setup))}
    elif setup.startswith("fsdp"):
        PartialState(cpu=True)
        tell_accelerate_of_a_mesh()
        names = {"transformer_cls_names_to_wrap": list(LAYERS_NAMED), "auto_wrap_policy": "transformer_based_wrap"}
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=1 if setup.startswith("fsdp1") else 2,
            cpu_ram_efficient_loading=False,
            sync_module_states=False,
            use_orig_params=True,
            **names,
        )
    tracker = Tracker()
    accelerator = Accelerator(**options, gradient_accumulation_steps=ACCUMULATION, log_with=[tracker])
    accelerator.init_trackers("matrix")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    named = {"processor": processor, "optimizer": optimizer, "output_dir": folder, "log": accelerator}
    seed()
    monitor = monitor_of(watch, model, **named)
    step = 0
    model.train()
    for batch in loader_of(processor):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        accelerator.log({"loss": loss.item()}, step=step)
        monitor.step(step, loss=loss)
        if step == STEPS:
            break
    monitor.close()
    return Run(model, optimizer, list(monitor.history), tracker.rows)


def plain(setup: str, folder: Path, watch: dict[str, Any] | None) -> Run:
    """A loop of one's own."""
    model, processor = make_model(setup)
    engine = None
    if setup == "ddp":
        model = DistributedDataParallel(model)
    elif setup.startswith("fsdp"):
        model = shard(model, setup)
    optimizer: Any = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    if setup.startswith("zero"):
        import deepspeed

        engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(setup))
        model = engine
    rows: list[dict[str, Any]] = []
    named = {"processor": processor, "optimizer": optimizer, "output_dir": folder}
    seed()
    monitor = monitor_of(watch, model, log=lambda values, step: rows.append({"at": step, **values}), **named)
    model.train()
    for number, batch in enumerate(loader_of(processor), start=1):
        is_last, step = number % ACCUMULATION == 0, number // ACCUMULATION
        with nullcontext() if is_last or setup != "ddp" else model.no_sync():
            loss = model(**batch).loss
            engine.backward(loss) if engine else (loss / ACCUMULATION).backward()
        if engine:
            engine.step()
        elif is_last:
            optimizer.step()
            optimizer.zero_grad()
        if not is_last:
            continue
        rows.append({"at": step, "loss": loss.item()})
        monitor.step(step, loss=loss)
        if step == STEPS:
            break
    monitor.close()
    return Run(model, optimizer, list(monitor.history), rows)


class Rows(Logger):
    """Lightning's logger, which keeps what it gets."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def log_hyperparams(self, *given: Any, **named: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.append({"at": step, **metrics})


class Module(pl.LightningModule):
    """A LLaVA in a LightningModule."""

    def __init__(self, setup: str) -> None:
        super().__init__()
        self.setup_name = setup
        self.vlm, self.processor = make_model(setup)

    def configure_model(self) -> None:
        if self.setup_name.startswith("fsdp2") and not hasattr(self.vlm, "unshard"):
            self.vlm = shard(self.vlm, self.setup_name)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.vlm(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=RATE)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "one": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "zero2": lambda: DeepSpeedStrategy(stage=2),
    "zero3": lambda: DeepSpeedStrategy(stage=3),
    "fsdp2": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=True, process_group_backend="gloo"),
}


def lightning(setup: str, folder: Path, watch: dict[str, Any] | None) -> Run:
    """Lightning's Trainer."""
    saving, strategy, logger = "saving" in setup, STRATEGIES[setup.split()[0]](), Rows()
    saver = [ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=-1)] if saving else []
    module = Module(setup)
    callback = None if watch is None else MIRLightningCallback(PROBE, **watch)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 1,
        strategy=strategy,
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATION,
        default_root_dir=folder,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[*saver, *([callback] if callback else [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=saving,
        use_distributed_sampler=False,
    )
    seed()
    trainer.fit(module, loader_of(module.processor))
    return Run(module.vlm, trainer.optimizers[0], callback.history if callback else [], logger.rows)


CLIENTS = {
    "trl": trl,
    "huggingface": huggingface,
    "accelerate": accelerate,
    "lightning": lightning,
    "plain": plain,
}


def forget() -> None:
    """Take back what accelerate and transformers keep for the whole process."""
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()
