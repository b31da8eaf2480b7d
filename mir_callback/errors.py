# SPDX-License-Identifier: Apache-2.0
"""The errors a user can meet. A message says what is wrong, with the offending value, and what to do."""

from __future__ import annotations


class MIRError(ValueError):
    """Base class of every error that this package raises on purpose.

    Example:
        >>> from mir_callback import MIRError, Probe
        >>> try:
        ...     Probe.from_pairs([])
        ... except MIRError as error:
        ...     print(type(error).__name__)
        ProbeError
    """


class ConfigError(MIRError):
    """An option or argument has an invalid value, or two of them contradict each other."""


class ProbeError(MIRError):
    """A probe cannot be built, read, or turned into inputs for this model."""


class UnsupportedModelError(MIRError):
    """MIR cannot be measured on this model: its decoder layers or vision tokens cannot be found, or behave oddly."""


class ForwardError(MIRError):
    """The model's own forward failed on a batch of the probe; the original error is its ``__cause__``."""


class NumericsError(MIRError):
    """MIR of these hidden states is undefined: NaN, infinity, too few tokens, or a mean text norm of zero."""


class HistoryError(MIRError):
    """A history file cannot be continued: other probe, other definition, not readable, or in use by another run."""


class RemoteError(MIRError):
    """Another rank failed with an error that is not one of these; this rank stops too instead of hanging."""
