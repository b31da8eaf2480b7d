# SPDX-License-Identifier: Apache-2.0
"""When an evaluation is due."""

import pytest

from mir_callback.errors import ConfigError
from mir_callback.training.schedule import check_every, is_due


def test_due_every_n_steps_and_at_the_end():
    assert [step for step in range(1, 11) if is_due(step, 3, ending=step == 10)] == [3, 6, 9, 10]


@pytest.mark.parametrize("every", [0, -5, 2.0, "50", True, None])
def test_error_when_every_is_no_positive_integer(every):
    with pytest.raises(ConfigError, match="every must be an integer of at least 1 optimizer step, got"):
        check_every(every)
