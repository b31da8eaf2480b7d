# SPDX-License-Identifier: Apache-2.0
"""What the logger `mir_callback` says."""

import logging
import re
from contextlib import contextmanager


@contextmanager
def logged_here(level=logging.WARNING):
    """The messages of the block, at least of this level."""
    logger, found = logging.getLogger("mir_callback"), []
    handler = logging.Handler(level)
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


@contextmanager
def logged(pattern=None):
    """The warnings of the block; one of them must match ``pattern``, or there must be none if that is None."""
    with logged_here() as found:
        yield found
    if pattern is None:
        assert found == []
    else:
        assert any(re.search(pattern, message) for message in found), found
