# SPDX-License-Identifier: Apache-2.0
"""The errors a user can meet. Each message names the field, the rule, the value and the remedy."""

from __future__ import annotations


class MIRError(ValueError):
    """Base class of every error this package raises on purpose."""


class ConfigError(MIRError):
    """An option or argument breaks its rule."""


class ProbeError(MIRError):
    """A probe cannot be built, read, or turned into inputs for this model."""


class UnsupportedModelError(MIRError):
    """The model's decoder or its vision tokens cannot be observed faithfully."""


class NumericsError(MIRError):
    """The hidden states do not define a MIR (NaN, infinity, too few tokens, zero text norm)."""


class HistoryError(MIRError):
    """A history file cannot be continued: other probe, other definition, or not readable."""


class RemoteError(MIRError):
    """Another rank failed; this rank stops with it instead of waiting for ever."""
