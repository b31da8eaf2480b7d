# SPDX-License-Identifier: Apache-2.0
"""Prompts: how the image and the text of a sample are put together. Part of what a value means."""

from __future__ import annotations

from collections.abc import Iterable
from string import Formatter
from typing import Any

from torch import Tensor

from mir_callback.errors import ConfigError

PLAIN, CHAT = "plain", "chat"
PLAIN_FORMAT = "{image}{text}"
EXAMPLE = r"'USER: {image}\nASSISTANT: {text}</s>'"
# Stands for a sample's text where a template is turned into a format string; no template changes such a word.
TEXT = "PROBETEXT"


def check_prompt(prompt: object) -> None:
    """Raise ConfigError unless a prompt is None, a name, or a format string with {image} and then {text}. Ranks: pure.

    Example:
        >>> check_prompt("USER: {image} ASSISTANT: {text}</s>")
        >>> check_prompt("ASSISTANT: {text}")
        Traceback (most recent call last):
        mir_callback.errors.ConfigError: prompt='ASSISTANT: {text}' has no {image}. ...
    """
    why = _find_fault(prompt)
    if why is not None:
        raise ConfigError(
            f"prompt={prompt!r} {why}. Use plain, chat, the name of a conversation of LLaVA's code bases, or a format "
            f"string with {{image}} and then {{text}}, such as {EXAMPLE}; other braces are written twice."
        )


def is_format(prompt: str) -> bool:
    """Whether a prompt is a format string and not a name. Ranks: pure."""
    return "{" in prompt or "}" in prompt


def as_format(filled: str, image: str, text: str) -> str | None:
    """The format string that gives ``filled`` for this image placeholder and text; None if there is none. Ranks: pure.

    Example:
        >>> as_format("USER: <image> ASSISTANT: PROBETEXT</s>", "<image>", "PROBETEXT")
        'USER: {image} ASSISTANT: {text}</s>'
    """
    before, _, rest = filled.partition(image)
    between, found, after = rest.partition(text)
    if not found or image in rest:
        return None
    before, between, after = (part.replace("{", "{{").replace("}", "}}") for part in (before, between, after))
    return f"{before}{{image}}{between}{{text}}{after}"


def before_image(prompt: str) -> str:
    """What a format string has before the image. Ranks: pure."""
    return next(literal for literal, field, _, _ in _pieces(prompt) if field == "image")


def require_no_image_token(prompt: str, tokens: Iterable[str]) -> None:
    """Raise ConfigError if a format string has one of ``tokens``, which {image} brings along. Ranks: pure."""
    for token in tokens:
        if token in prompt:
            raise ConfigError(f"prompt={prompt!r} contains {token!r}, which {{image}} stands for. Leave it out.")


def require_single_ends(tokenizer: Any, ids: Tensor, prompt: str) -> None:
    """Raise ConfigError if a sample begins with BOS, or ends with EOS, twice: in the prompt and by the tokenizer.

    Args:
        tokenizer: of the model.
        ids: (n,) integers, token ids of one sample without padding.
        prompt: its prompt, as a format string.

    Ranks: pure.
    """
    for name, pair in (("bos_token", ids[:2]), ("eos_token", ids[-2:])):
        token = getattr(tokenizer, f"{name}_id", None)
        if token is not None and pair.tolist() == [token, token]:
            raise ConfigError(
                f"prompt={prompt!r} gives {getattr(tokenizer, name)!r} twice in a row, as the tokenizer adds it too. "
                "Leave it out of the prompt."
            )


def _find_fault(prompt: object) -> str | None:
    if prompt is None:
        return None
    if not isinstance(prompt, str) or not prompt.strip():
        return "names no prompt"
    if not is_format(prompt):
        return None
    try:
        places = [(field, conversion, spec) for _, field, spec, conversion in _pieces(prompt) if field is not None]
    except ValueError as error:
        return f"is no format string ({error})"
    fields = [field for field, _, _ in places]
    for field in fields:
        if field not in ("image", "text"):
            return f"has the unknown place {{{field}}}"
    for field in ("image", "text"):
        if fields.count(field) != 1:
            return f"has {f'no {{{field}}}' if field not in fields else f'more than one {{{field}}}'}"
    if fields != ["image", "text"]:
        return "has {text} before {image}, and MIR counts the text after the image"
    if any(conversion or spec for _, conversion, spec in places):
        return "formats a place; {image} and {text} stand as they are"
    return None


def _pieces(prompt: str) -> list[tuple[str, str | None, str | None, str | None]]:
    return list(Formatter().parse(prompt))
