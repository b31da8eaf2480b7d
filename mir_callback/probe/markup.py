# SPDX-License-Identifier: Apache-2.0
"""How a family writes an image or a video into a prompt, found by trial on blank ones; no list of families.

Processors differ in the token that stands for an image, in whether they put the family's start and end tokens around
its features or leave that to the prompt, in how they take images, and in what they return only on request.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.model.modality import write_ids
from mir_callback.probe.prompt import TEXT

# Of kosmos-2 and its like, whose image features have no token id of their own: where they are.
POSITION_MASK = "image_embeds_position_mask"
Kind = Literal["image", "video"]
# Attributes of processors, best first.
_PLACEHOLDERS = {"image": ("image_placeholder_token", "image_token", "boi_token"), "video": ("video_token",)}
_BORDERS = {
    "image": (
        ("vision_start_token", "vision_end_token"),
        ("image_start_token", "image_end_token"),
        ("image_bos_token", "image_eos_token"),
        ("start_image_token", "end_image_token"),
        ("img_start_token", "img_end_token"),
        ("boi_token", "eoi_token"),
    ),
    "video": (("video_start_token", "video_end_token"), ("vision_start_token", "vision_end_token")),
}
# What some processors need for a video whose frames have no times; all frames are taken where they can be asked for.
_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "image": ({},),
    "video": (
        {"do_sample_frames": False},
        {},
        {"do_sample_frames": False, "return_metadata": True},
        {"return_metadata": True},
    ),
}
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")
_BLANK = Image.new("RGB", (64, 48), (127, 127, 127))


@dataclass(frozen=True)
class Markup:
    """How an image, or a video, is written.

    Attributes:
        written: what stands for it in the text that goes to the processor; empty if that places images itself.
        token: the part of it that the processor replaces by the image's tokens.
        nested: whether the processor takes a list of images for each text, or one flat list.
        options: keyword arguments for what the processor returns only on request.
    """

    written: str
    token: str
    nested: bool
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def pieces(self) -> list[str]:
        """The tokens that it brings along: the placeholder, and what stands before and after it."""
        around = self.written.partition(self.token) if self.token else ()
        return [each for each in around if each]

    def arrange(self, each: list[list[Any]]) -> list[Any]:
        """The images, or videos, of each sample as the processor takes them."""
        return each if self.nested else [one for own in each for one in own]


def find_markup(
    processor: Any, tokenizer: Any, config: Any, vision_ids: tuple[int, ...], kind: Kind = "image"
) -> Markup:
    """How this processor's family writes an image, or a video.

    Args:
        processor: of images and text.
        tokenizer: its tokenizer.
        config: of the model.
        vision_ids: ids of vision tokens; empty if the model names none.
        kind: of what.

    Raises:
        ConfigError: the processor takes an image, or video, in none of the ways known.
        UnsupportedModelError: no position of its output is an image's.

    Ranks: pure, but for the processor.
    """
    trial = _Trial(processor, vision_ids, kind)
    itself = trial.run("")
    tokens = _placeholders(processor, tokenizer, config, kind)
    tried = [(token, trial.run(token)) for token in tokens]
    # Those that need the family's marks around them last: within them another token may be the placeholder.
    for token, bare in sorted(tried, key=lambda each: each[1] is None):
        # One that places images itself takes a placeholder for words, or for another image.
        if bare is not None and itself is not None and bare.ids != itself.ids:
            continue
        written = _bordered(token, bare, trial, tokenizer, config)
        if written is not None:
            return written
    if itself is not None:
        return Markup("", "", itself.nested, itself.options)
    name = type(processor).__name__
    if trial.saw_none and not vision_ids:
        raise UnsupportedModelError(
            f"The model has no vision tokens: its configuration names no ids of them, and {name} does not say where "
            "images are in its sequence. MIR compares vision tokens with text tokens of one sequence. If they are "
            "in it all the same, write an adapter and pass adapter=..."
        )
    if trial.saw_none:
        why = f"it gave none of the model's image tokens ({write_ids(vision_ids)}) for a blank {kind}"
    else:
        why = f"it failed on a blank {kind} and a word: {trial.errors.get(next(iter(tokens), ''))}"
    names = ", ".join(map(repr, tokens)) or f"none, as it names no {kind}_token"
    raise ConfigError(
        f"The processor {name} can't be used with this model: {why} ({kind} tokens tried: {names}). Check that it "
        "belongs to this model, or write an adapter and pass adapter=..."
    )


@dataclass(frozen=True)
class _Outcome:
    """What the processor made of one image and one word."""

    ids: list[int]
    count: int  # vision tokens
    nested: bool
    options: dict[str, Any]


class _Trial:
    """Runs the processor on a blank image, or video, and a word."""

    def __init__(self, processor: Any, vision_ids: tuple[int, ...], kind: Kind) -> None:
        self.processor, self.kind, self._vision_ids = processor, kind, vision_ids
        self.errors: dict[str, str] = {}
        self.saw_none = False

    def run(self, written: str) -> _Outcome | None:
        """The outcome with this text before the word; None if the processor fails or no token is the image's."""
        for nested, known in itertools.product((True, False), _OPTIONS[self.kind]):
            call = self._caller(f"{written}{TEXT}", nested)
            try:
                encoded, options = call(known), known
                more = known | {name: True for name in self._on_request(encoded)}
                if more != known and call(more).keys() > encoded.keys():
                    encoded, options = call(more), more
                ids, *others = encoded["input_ids"]
                if others:
                    raise ValueError(f"it makes {1 + len(others)} texts of one")
                count = int(vision_of(encoded, self._vision_ids)[0].sum())
            except Exception as error:  # of anybody's processor: any kind
                self.errors.setdefault(written, f"{type(error).__name__}: {error}"[:300])
                continue
            # A token that stays as it was, beside nothing of the image, is no placeholder.
            is_dropped = count == 1 and not encoded.keys() - set(_OF_TEXT)
            if count and not is_dropped:
                return _Outcome(ids.tolist(), count, nested, options)
            self.saw_none = True
        return None

    def _caller(self, text: str, nested: bool) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
        blank = _BLANK if self.kind == "image" else as_frames([_BLANK] * 4)
        given = {f"{self.kind}s": [[blank]] if nested else [blank]}
        return lambda options: self.processor(text=[text], return_tensors="pt", **given, **options)

    def _on_request(self, encoded: Mapping[str, Any]) -> Iterator[str]:
        for name in getattr(self.processor, "model_input_names", None) or ():
            if name.endswith("token_type_ids") and name not in encoded:
                yield f"return_{name}"


def vision_of(encoded: Mapping[str, Any], vision_ids: tuple[int, ...]) -> Tensor:
    """Which positions (B, S) of a processor's output are an image's. Ranks: pure."""
    ids: Tensor = encoded["input_ids"]
    if POSITION_MASK in encoded:
        return torch.as_tensor(encoded[POSITION_MASK]) == 1  # -1: the tokens around an image
    return torch.isin(ids, torch.tensor(vision_ids, dtype=ids.dtype))


def as_frames(images: list[Image.Image]) -> Any:
    """A video as processors take it: (T, H, W, 3) uint8."""
    return np.stack([np.asarray(image) for image in images])


def _placeholders(processor: Any, tokenizer: Any, config: Any, kind: Kind) -> list[str]:
    """Tokens that may stand for one, best first: those that the processor names, then the model's own."""
    named = [str(each) for name in _PLACEHOLDERS[kind] if (each := getattr(processor, name, None))]
    known = (getattr(config, name, None) for name in (f"{kind}_token_id", f"{kind}_token_index"))
    ids = [each for each in known if isinstance(each, int)]
    own = [each for each in tokenizer.convert_ids_to_tokens(ids) if isinstance(each, str)]
    return list(dict.fromkeys([*named, *own]))


def _bordered(token: str, bare: _Outcome | None, trial: _Trial, tokenizer: Any, config: Any) -> Markup | None:
    """The placeholder with what the family has around it, unless its processor adds that itself; None if none works."""
    from_template = _from_chat_template(trial.processor, tokenizer, token, trial.kind)
    around = list(_borders(trial.processor, tokenizer, config, trial.kind))
    candidates = []
    for start, end in around:
        # Within the family's own pair a template may know more; one beyond it goes on to another message.
        if from_template is not None and from_template.startswith(start) and from_template.endswith(end or token):
            candidates.append(from_template)
        candidates.append(f"{start}{token}{end}")
    if from_template is not None and not around:
        candidates.append(from_template)
    marks = tokenizer.convert_tokens_to_ids([each for pair in around for each in pair if each])
    if bare is not None and set(marks) & set(bare.ids):
        candidates = []
    for written in candidates:
        found, listed = trial.run(written), written.count(token)
        if found is not None and (bare is None or found.count == (bare.count if listed == 1 else listed)):
            return Markup(written, token, found.nested, found.options)
    return None if bare is None else Markup(token, token, bare.nested, bare.options)


def _borders(processor: Any, tokenizer: Any, config: Any, kind: Kind) -> Iterator[tuple[str, str]]:
    """Pairs of tokens that may have to stand around it: of the configuration, then of the processor; no words."""
    known = tokenizer.get_added_vocab()
    for pair in _BORDERS[kind]:
        start, end = (getattr(config, f"{name}_id", None) for name in pair)
        ids = [each for each in (start, end) if isinstance(each, int)] if isinstance(start, int) else []
        named = tokenizer.convert_ids_to_tokens(ids)
        if ids and all(each in known for each in named):
            yield named[0], "".join(named[1:])
    for pair in _BORDERS[kind]:
        tokens = [getattr(processor, name, None) for name in pair]
        if all(str(each) in known for each in tokens):
            yield str(tokens[0]), str(tokens[1])


def _from_chat_template(processor: Any, tokenizer: Any, token: str, kind: Kind) -> str | None:
    """What the chat template writes for one, if special tokens stand around the placeholder; else None."""
    image, text = {"type": kind}, {"type": "text", "text": TEXT}
    if getattr(processor, "chat_template", None) is None:
        return None
    try:
        whole, without = (
            str(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
            for content in ([image, text], [text])
        )
    except Exception:  # of Jinja and of the template itself: any kind
        return None
    marks = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    places = [mark.span() for mark in re.finditer("|".join(map(re.escape, marks)), whole)]
    begin = len(commonprefix([whole, without]))
    begin = next((start for start, end in places if start < begin < end), begin)  # two may begin alike
    end = len(whole) - len(commonprefix([whole[begin:][::-1], without[begin:][::-1]]))
    end = next((stop for start, stop in places if start < end < stop), end)
    written = whole[begin:end].strip()
    ends = {token, *(getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad"))}  # of texts
    special = tuple(each for each in marks if each not in ends)
    is_bordered = written.startswith(special) and written.endswith(special)
    run = token * written.count(token)  # some write one for each of the image's tokens
    return written if is_bordered and run and run in written else None
