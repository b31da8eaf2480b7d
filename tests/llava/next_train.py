# SPDX-License-Identifier: Apache-2.0
"""The real `llava/train/train.py` of LLaVA-NeXT on a machine without a GPU, for a check by hand.

Helped as in train_worker, and seeded, because the script makes its projector before it sets a seed. Since June 2025 its
trainer has a copy of the loop of transformers whose imports were left out; those names are put in from transformers.
"""

from __future__ import annotations

import torch

from tests.llava.train_worker import help_on_cpu


def complete_the_trainer() -> None:
    """Give llava.train.llava_trainer the names its training loop uses and does not import."""
    from llava.train import llava_trainer
    from transformers import trainer

    for name, value in vars(trainer).items():
        vars(llava_trainer).setdefault(name, value)
    vars(llava_trainer).setdefault("plot_graphs_based_on_log_history", lambda *_, **__: None)


if __name__ == "__main__":
    help_on_cpu()
    torch.manual_seed(3)
    complete_the_trainer()
    from llava.train.train import train

    train()
