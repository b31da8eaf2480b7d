# SPDX-License-Identifier: Apache-2.0
"""Write docs/reference.md from the code, and the tables of what is supported from the list below. `make docs`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mir_callback.config import GROUPS, MIRArguments, MIRConfig
from mir_callback.early_stopping import PlateauRule
from mir_callback.probe.probe import ProbeSource
from mir_callback.record import FIELDS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference.md"
INTEGRATIONS = ROOT / "docs" / "integrations.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
HEAD = """\
# Reference: options, flags, fields

What `MIRMonitor`, `MIRCallback` and `attach_mir` take as keyword arguments, and what a line of `mir_history.jsonl`
holds. Every option is a flag too, for the launcher and for scripts that put `MIRArguments` beside their own dataclasses
in `HfArgumentParser`. This page is written by `make docs` from `mir_callback/config.py`,
`mir_callback/early_stopping.py` and `mir_callback/record.py`.
"""

Status = Literal["tested", "by hand", "not tested", "refused", "not supported"]


@dataclass(frozen=True)
class Support:
    """A trainer, model family or kind of parallelism: how well it is known to work, and what shows it."""

    name: str
    status: Status
    note: str  # how to attach, or what it means
    tests: tuple[str, ...] = ()  # a file below tests/, with ::name of a test in it
    by_hand: str = ""  # heading of benchmarks/notes/integrations.md
    ran: str = ""  # versions and modes
    limits: str = ""


SUPPORT: dict[str, tuple[Support, ...]] = {
    "Trainers and loops": (
        Support(
            "Hugging Face `Trainer`",
            "tested",
            "`attach_mir(trainer, probe)` before `trainer.train()`; a script that stays as it is, through the launcher",
            (
                "training/test_no_trace.py::test_training_is_the_same_to_the_last_bit",
                "test_launch.py::test_a_trainer_of_the_script_is_measured_once",
            ),
            ran="transformers 5.23.0: 1 process, DDP, ZeRO, FSDP2, FSDP1",
        ),
        Support(
            "TRL's `SFTTrainer`",
            "tested",
            "the same line, `examples/trl_sft.py`; `trl sft` through the launcher",
            (
                "matrix/test_matrix.py::test_training_is_the_same_and_measured_right",
                "loops/test_commands.py::test_trl_is_measured",
            ),
        ),
        Support(
            "TRL's `DPOTrainer`, `KTOTrainer`, `GRPOTrainer`, `RLOOTrainer`",
            "tested",
            "the same line",
            ("loops/test_trl.py::test_whole_rows_and_weights_are_those_of_a_run_without_mir",),
        ),
        Support(
            "LLaMA-Factory",
            "tested",
            "launcher before `llamafactory-cli train`, on one process and two",
            ("llamafactory/test_command_line.py::test_losses_and_weights_are_those_of_a_run_without_mir",),
        ),
        Support(
            "`torchrun`, `accelerate launch`, `deepspeed`",
            "tested",
            "launcher before them",
            ("loops/test_commands.py::test_two_processes_of_a_command_are_measured_as_one_run",),
        ),
        Support(
            "Lightning",
            "tested",
            "`Trainer(callbacks=[MIRLightningCallback(probe)])` of `mir_callback.integrations.lightning`: "
            "[example](../examples/lightning_module.py)",
            ("matrix/test_matrix.py::test_training_is_the_same_and_measured_right", "loops/test_lightning.py"),
            ran="2.6.6: 1 process, DDP, FSDP2 (`ModelParallelStrategy`)",
            limits="not with `FSDPStrategy`; with several models in the module `model=` names one",
        ),
        Support(
            "Accelerate",
            "tested",
            "`MIRMonitor(..., log=accelerator)`: [example](../examples/accelerate_loop.py)",
            (
                "loops/test_loops.py::test_training_is_the_same_to_the_last_bit",
                "matrix/test_matrix.py::test_training_is_the_same_and_measured_right",
            ),
            ran="1.15.0: 1 process, DDP, ZeRO-2, ZeRO-3, FSDP2; TensorBoard",
        ),
        Support(
            "plain PyTorch loop",
            "tested",
            "`MIRMonitor(..., log=writer)`: [example](../examples/plain_loop.py)",
            (
                "loops/test_loops.py::test_training_is_the_same_to_the_last_bit",
                "matrix/test_matrix.py::test_training_is_the_same_and_measured_right",
            ),
            ran="torch 2.13.0, DeepSpeed 0.19.8: 1 process, DDP, ZeRO-2, ZeRO-3, FSDP2",
        ),
        Support(
            "a Trainer class of your own, FSDP2",
            "tested",
            "`MIRMonitor` in `__init__`, `step` in the loop: [example](../examples/titan_loop.py), like torchtitan's",
            (
                "loops/test_loops.py::test_training_is_the_same_to_the_last_bit",
                "loops/test_loops.py::test_two_ranks_measure_the_same_and_stop_together",
            ),
            ran="torch 2.13.0: 1 process, FSDP2 on two CPU ranks",
        ),
        Support(
            "LLaVA's `train.py`",
            "tested",
            "launcher, or `attach_mir`",
            (
                "llava/test_original.py::test_trained_projector_is_identical_bit_by_bit",
                "llava/test_original.py::test_unmodified_script_runs_under_the_launcher",
            ),
        ),
        Support(
            "LLaVA-NeXT's `train.py`", "by hand", "launcher, or `attach_mir`", by_hand="LLaVA-NeXT and LLaVA-OneVision"
        ),
        Support(
            "TinyLLaVA Factory's `train.py`",
            "by hand",
            "launcher, or `attach_mir`",
            ("llava/test_tinyllava.py::test_training_is_bit_identical_with_the_line_added",),
            by_hand="TinyLLaVA Factory",
        ),
        Support(
            "nanoVLM",
            "by hand",
            "[ten lines and an adapter](../examples/nanovlm/README.md)",
            by_hand="nanoVLM",
            ran="commit 4e0c096, transformers 4.57.6: 1 process, wandb",
            limits="no `vision_gain`, no `probe_loss`; DDP (NCCL only there) and `compile` not tried",
        ),
        Support(
            "ms-swift",
            "by hand",
            "launcher before `swift sft`; or `--external_plugins mir_plugin.py --callbacks mir`: [plug-in](#ms-swift)",
            ("loops/test_plugins.py::test_swift_measures_what_its_template_does_not_touch",),
            by_hand="ms-swift",
            ran="4.6.0, transformers 5.16.1: `swift sft` on LLaVA (also LoRA) and Qwen2.5-VL, 1 process, DDP",
            limits="sequence parallelism, ZeRO, FSDP2 not tried; packing only as "
            "[replaced attention](#packed-sequences); Megatron-SWIFT below",
        ),
        Support(
            "axolotl",
            "by hand",
            "`plugins:` and `mir:` in the YAML file: [plug-in](#axolotl)",
            ("loops/test_plugins.py::test_axolotl_measures_with_the_options_of_its_yaml",),
            by_hand="axolotl",
            ran="0.19.0, transformers 5.16.1: `axolotl train` on LLaVA (also LoRA), 1 process",
            limits="several processes (which need GPUs there) and context parallelism not tried",
        ),
        Support(
            "Qwen-VL's `qwen-vl-finetune`",
            "not tested",
            "`attach_mir(trainer, probe, processor=processor)` before its `trainer.train()`",
            limits="its Trainer has the tokenizer only; `data_flatten` and `data_packing`: "
            "[one sample a batch](#packed-sequences)",
        ),
        Support(
            "unsloth",
            "not tested",
            "`attach_mir(trainer, probe, processor=processor)`",
            limits="it says that forwards before the first training step can spoil its cache: `also_on='end'`",
        ),
        Support(
            "lmms-engine",
            "not tested",
            "its Trainer of Hugging Face: `attach_mir(trainer, probe)`; its FSDP2 loop: `MIRMonitor`",
        ),
        Support(
            "InternVL, Eagle, VILA",
            "not tested",
            "`attach_mir(trainer, probe, adapter=...)` before `trainer.train()`",
            limits="model classes of their own: [write an adapter](#a-model-of-your-own)",
        ),
        Support(
            "torchtitan, VeOmni, XTuner V1, Molmo2, prismatic",
            "not tested",
            "`MIRMonitor(..., adapter=...)` where the optimizer steps: [lines](#a-loop-and-a-model-of-your-own)",
            limits="an adapter each; data-parallel ranks only",
        ),
        Support(
            "Megatron-SWIFT, Megatron-Bridge, LLaVA-OneVision-1.5, NeMo AutoModel",
            "not supported",
            "export a checkpoint to transformers and [evaluate it](evaluating.md)",
            limits="layers and samples are spread over ranks in ways that MIR does not follow",
        ),
    ),
    "Models": (
        Support(
            "84 of transformers' families, LLaVA, Qwen-VL, Gemma and InternVL among them",
            "tested",
            "each against the hidden states that its model itself returns: [models](models.md)",
            (
                "families/test_families.py::test_value_is_that_of_the_reference",
                "families/test_families.py::test_training_is_the_same_to_the_last_bit",
            ),
        ),
        Support(
            "PEFT adapters on them",
            "tested",
            "LoRA, DoRA, `modules_to_save`, QLoRA (bitsandbytes, nf4 and 8 bit)",
            (
                "model/test_capture.py::test_wrapped_models_are_found_below_their_wrappers",
                "training/test_no_trace.py::test_training_is_the_same_to_the_last_bit",
            ),
        ),
        Support(
            "`torch.compile` of a model or its parts",
            "tested",
            "evaluated uncompiled; with ZeRO-2 and FSDP2 too. Flex attention by hand, its value only",
            (
                "model/test_compile.py::test_a_compiled_model_is_measured_eagerly_and_trains_on_with_the_same_graphs",
                "distributed/test_training.py::test_training_is_the_same_to_the_last_bit",
            ),
        ),
        Support(
            "original LLaVA: Llama, Mistral",
            "tested",
            "against the procedure of MIR's authors",
            ("llava/test_original.py::test_value_equals_the_authors_procedure_at_every_batch_size",),
        ),
        Support(
            "LLaVA-NeXT and LLaVA-OneVision: LlavaLlama, LlavaQwen, LlavaMixtral",
            "by hand",
            "against the procedure of MIR's authors; a stand-in in `make test`",
            ("llava/test_next.py::test_value_equals_one_sample_at_a_time_at_every_batch_size",),
            by_hand="LLaVA-NeXT and LLaVA-OneVision",
        ),
        Support(
            "TinyLLaVA Factory: Llama, Phi",
            "by hand",
            "against its own data set, one sample at a time; a stand-in in `make test`",
            ("llava/test_tinyllava.py::test_value_equals_single_steps_through_training_data_at_every_batch_size",),
            by_hand="TinyLLaVA Factory",
        ),
        Support(
            "other transformers models with image features in the token stream",
            "not tested",
            "every forward is checked, and a model that does not fit is refused",
            ("model/test_capture.py::test_refused_when_a_layer_is_skipped_or_repeated",),
        ),
        Support(
            "encoder-decoders, cross-attention to images, several residual streams",
            "refused",
            "there are no vision tokens to measure, or their places are not known",
            (
                "families/test_families.py::test_refused_with_its_reason",
                "model/test_capture.py::test_refused_when_images_do_not_reach_the_stream",
                "model/test_capture.py::test_refused_when_the_stream_has_another_shape_than_input_ids",
            ),
        ),
    ),
    "Parallelism": (
        Support(
            "DDP and DeepSpeed ZeRO 0 to 3 on two CPU ranks",
            "tested",
            "ZeRO-2 and ZeRO-3 with offloading too; evaluation alone on up to four ranks",
            (
                "matrix/test_matrix.py::test_training_is_the_same_and_measured_right",
                "distributed/test_training.py::test_training_is_the_same_to_the_last_bit",
                "distributed/test_training.py::test_value_equals_that_of_one_process_with_the_same_weights",
                "distributed/test_evaluation.py::test_value_is_that_of_one_process",
            ),
        ),
        Support(
            "FSDP2 and HSDP on two CPU ranks",
            "tested",
            "CPU offload, `MixedPrecisionPolicy`, LoRA, `keep_best`; `mir eval` of their shards",
            (
                "matrix/test_matrix.py::test_training_is_the_same_and_measured_right",
                "model/test_fsdp.py::test_weights_are_in_their_shards_and_training_goes_on_as_without",
                "checkpoints/test_dcp.py",
            ),
        ),
        Support(
            "FSDP1 on two CPU ranks",
            "tested",
            "not `keep_best`: torch 2.13 ends the process where FSDP1 saves on a CPU, without MIR too",
            (
                "matrix/test_matrix.py::test_training_is_the_same_and_measured_right",
                "model/test_fsdp.py::test_weights_are_in_their_shards_and_training_goes_on_as_without",
            ),
        ),
        Support(
            "DDP, ZeRO-2 and ZeRO-3 on one GPU with NCCL",
            "tested",
            "`make test-gpu`; ZeRO-2 and ZeRO-3 also [at 7B size](performance.md#measured)",
            ("gpu/test_gpu.py::test_training_is_the_same_to_the_last_bit",),
        ),
        Support("several GPUs, several nodes", "not tested", "not tried; several CPU ranks run the same code"),
        Support(
            "Lightning's `FSDPStrategy`",
            "refused",
            "it shards the module as a whole",
            ("loops/test_lightning.py::test_what_cannot_be_watched_is_refused_before_the_first_forward",),
        ),
        Support(
            "tensor and expert parallelism: torch, transformers, DeepSpeed AutoTP",
            "tested",
            "found from the model, nothing to set; with FSDP2 on up to four CPU ranks; `keep_best` needs "
            "`save_weights=`",
            (
                "distributed/test_mesh.py::test_value_is_that_of_one_process",
                "distributed/test_mesh.py::test_training_is_the_same_to_the_last_bit",
            ),
        ),
        Support(
            "DeepSpeed Ulysses",
            "tested",
            "each rank forwards whole sequences with the attention that Ulysses has replaced; memory as without it",
            (
                "distributed/test_mesh.py::test_value_is_that_of_one_process",
                "distributed/test_mesh.py::test_training_is_the_same_to_the_last_bit",
            ),
        ),
        Support(
            "context parallelism of torch and accelerate",
            "not tested",
            "whole sequences, evaluated outside `context_parallel`; its training step needs GPUs",
            ("distributed/test_mesh.py::test_value_is_that_of_one_process",),
        ),
        Support(
            "pipeline parallelism, DeepSpeed's experts, other sequence parallelism",
            "refused",
            "by name, on every rank; `mir eval` measures the checkpoints",
            ("distributed/test_mesh.py::test_what_cannot_be_measured_is_refused_on_every_rank",),
        ),
    ),
}


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def _options(chosen: Iterable[Field[Any]], prefix: str) -> str:
    flags = {each.name: each for each in fields(MIRArguments)}
    rows = []
    for each in chosen:
        name = f"{prefix}{each.name}"
        default = "" if name not in flags else f"`--{name}`"
        rows.append((f"`{each.name}`", default, f"`{each.default!r}`", each.metadata["help"]))
    return _table(("option", "flag", "default", "meaning"), rows)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for group, title in GROUPS.items():
        chosen = [each for each in fields(MIRConfig) if each.metadata["group"] == group]
        parts.append(f"## Options: {title}\n\n{_options(chosen, 'mir_')}\n")
    parts.append(
        f"## Options of PlateauRule\n\n`stop=PlateauRule(...)`\n\n{_options(fields(PlateauRule), 'mir_stop_')}\n"
    )
    processor = next(each for each in fields(MIRArguments) if each.name == "mir_processor").metadata["help"]
    parts.append(
        f"## The probe of `attach_mir` and the launcher\n\n{_options(fields(ProbeSource), 'mir_')}\n\n"
        f"Beside it `processor`, `--mir_processor`: {processor}.\n"
    )
    rows = [
        (f"`{name}`", str(each.type).removesuffix(" | None"), each.metadata["unit"], each.metadata["help"])
        for name, each in FIELDS.items()
    ]
    parts.append(
        "## Fields of a line of `mir_history.jsonl`\n\nOne JSON object an evaluation; a field without a value is left "
        "out or null. Fields of other versions are kept when a run is continued.\n\n"
        f"{_table(('field', 'type', 'unit', 'meaning'), rows)}\n"
    )
    return "\n".join(parts)


def _shown_by(entry: Support) -> str:
    cells = [f"`tests/{test}`" for test in entry.tests]
    if entry.by_hand:
        anchor = entry.by_hand.lower().replace(" ", "-")
        cells.append(f"[note](../benchmarks/notes/integrations.md#{anchor})")
    return "; ".join(filter(None, (entry.ran, ", ".join(cells))))


def support_in_full() -> str:
    """One table a group of SUPPORT: of each row how to attach, its limits, what was run and the tests."""
    parts = []
    for group, entries in SUPPORT.items():
        is_limited = any(each.limits for each in entries)
        head = ("what", "status", "how", *(["limits"] if is_limited else []), "what was run")
        rows = [
            (each.name, each.status, each.note, *([each.limits] if is_limited else []), _shown_by(each))
            for each in entries
        ]
        parts.append(f"### {group}\n\n{_table(head, rows)}\n")
    return "\n".join(parts)


def support_in_short() -> str:
    """One table: a row a group of SUPPORT, a column a status."""
    columns: dict[str, tuple[Status, ...]] = {
        "tested": ("tested",),
        "checked by hand": ("by hand",),
        "not tested": ("not tested",),
        "refused or not supported": ("refused", "not supported"),
    }
    rows = []
    for group, entries in SUPPORT.items():
        cells = ("; ".join(each.name for each in entries if each.status in column) for column in columns.values())
        rows.append((group, *cells))
    return _table(("", *columns), rows) + "\n"


def between_markers(path: Path, content: str) -> str:
    """The text of a page with ``content`` between its markers."""
    text = path.read_text(encoding="utf-8")
    if not text.count(BEGIN) == text.count(END) == 1 or text.index(END) < text.index(BEGIN):
        raise SystemExit(f"{path.name} needs the lines {BEGIN} and {END}, once and in this order.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n{END}{rest.partition(END)[2]}"


def pages() -> dict[Path, str]:
    """What each page should hold."""
    return {
        PAGE: page(),
        INTEGRATIONS: between_markers(INTEGRATIONS, support_in_full()),
        README: between_markers(README, support_in_short()),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
