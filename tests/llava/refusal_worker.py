# SPDX-License-Identifier: Apache-2.0
"""What one of two ranks is told about models and samples that do not fit: `refusal_worker FOLDER ASSETS`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from llava.model.language_model.llava_mpt import LlavaMptConfig, LlavaMptForCausalLM
from PIL import Image

from llava_integration import OriginalLlavaAdapter, attach_mir
from mir_callback import Probe, evaluate_mir
from tests.distributed.launch import write_rank
from tests.llava.value_worker import make_model
from tests.samples import pairs


def told(action: Callable[[], Any]) -> str:
    """The error of an action as a user reads it."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def make_mpt(assets: Path) -> Any:
    """A tiny MPT LLaVA with its vision tower in place."""
    model = LlavaMptForCausalLM(LlavaMptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=320))
    arguments = SimpleNamespace(
        vision_tower=str((assets / "tiny-clip-vit").absolute()),
        mm_vision_select_layer=-2,
        pretrain_mm_mlp_adapter=None,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="flat",
    )
    model.get_model().initialize_vision_modules(arguments)
    return model.eval()


def models(assets: Path) -> dict[str, str]:
    """Refusals of models, and what published MPT code does without us."""
    whole, tokenizer = make_model(assets, {})
    # As a checkpoint is loaded: the configuration names the tower, its weights wait for load_model().
    delayed = type(whole)(whole.config)
    bare = type(whole).from_pretrained(assets / "tiny-vicuna")
    mpt = make_mpt(assets)
    ids, pixels = torch.tensor([[1, -200, 5, 6]]), torch.zeros(1, 3, 32, 32)
    return {
        "delayed": told(lambda: OriginalLlavaAdapter(delayed, tokenizer)),
        "no tower": told(lambda: OriginalLlavaAdapter(bare, tokenizer)),
        "mpt": told(lambda: OriginalLlavaAdapter(mpt, tokenizer)),
        "mpt by itself": told(lambda: mpt(ids, attention_mask=torch.ones_like(ids), images=pixels)),
    }


def samples(assets: Path) -> dict[str, str]:
    """Refusals of samples; the bad one belongs to rank 1."""
    model, tokenizer = make_model(assets, {})
    good, thin = pairs(1)[0], Image.new("RGB", (40, 1))

    def bad(image: Any, text: str, **overrides: Any) -> str:
        for name, value in overrides.items():
            setattr(model.config, name, value)
        adapter = OriginalLlavaAdapter(model, tokenizer, prompt="plain")
        probe = Probe.from_pairs([good, (image, text), good])
        return told(lambda: evaluate_mir(model, probe, adapter=adapter, progress=False))

    found = {word: bad(good[0], f"a {word} b") for word in ("<image>", "<im_patch>", "<im_start>", "</s>", "<s>")}
    found["unknown character"] = bad(good[0], "a <unk> b")
    found["one pixel high"] = bad(thin, "text")
    found["one pixel high, padded"] = bad(thin, "text", image_aspect_ratio="pad")
    found["no pinpoints"] = bad(good[0], "text", image_aspect_ratio="anyres", image_grid_pinpoints=None)
    return found


def truncated(assets: Path) -> str:
    """What is said when truncation leaves no image."""
    model, tokenizer = make_model(assets, {"tokenizer_model_max_length": 24})
    adapter = OriginalLlavaAdapter(model, tokenizer, prompt="v1")
    return told(lambda: evaluate_mir(model, Probe.from_pairs(pairs(3)), adapter=adapter, progress=False))


def missing_folder(assets: Path) -> str:
    """What both ranks are told where rank 1 alone lacks the images."""
    model, tokenizer = make_model(assets, {})
    trainer = SimpleNamespace(model=model, tokenizer=tokenizer, callback_handler=SimpleNamespace(callbacks=[]))
    images = assets / "probe" / ("images" if dist.get_rank() == 0 else "elsewhere")
    return told(lambda: attach_mir(trainer, images=images, texts=assets / "probe" / "texts", num_samples=4))


def main(folder: str, assets: str) -> None:
    """Collect everything this rank is told."""
    dist.init_process_group("gloo")
    where = Path(assets)
    everything = {**models(where), **samples(where), "truncated": truncated(where), "folder": missing_folder(where)}
    write_rank(folder, dist.get_rank(), everything)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
