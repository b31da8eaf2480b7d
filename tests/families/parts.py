# SPDX-License-Identifier: Apache-2.0
"""What tiny models of several families share."""

from __future__ import annotations

from typing import Any

import torch


def ids(tok: Any, **tokens: str) -> dict[str, int]:
    """The ids of tokens, under the names of a configuration's fields."""
    return {field: tok.convert_tokens_to_ids(token) for field, token in tokens.items()}


@torch.no_grad()
def varied(model: Any) -> Any:
    """The model with norms that scale each channel differently, as trained ones do.

    After a last norm of ones all rows are equally long to about 1e-6, and rounding decides which of them are outliers.
    """
    for name, weight in model.named_parameters():
        if "norm" in name and weight.ndim == 1:
            weight += 0.3 * torch.rand_like(weight)
    return model
