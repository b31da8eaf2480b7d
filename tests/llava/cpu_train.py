# SPDX-License-Identifier: Apache-2.0
"""The real `llava/train/train.py` on a machine without a GPU: helped as in train_worker, otherwise untouched."""

import torch.distributed as dist

from tests.llava.train_worker import help_on_cpu

if __name__ == "__main__":
    help_on_cpu()
    from llava.train.train import train

    train()
    if dist.is_initialized():  # left open, a group may abort the process at its exit
        dist.destroy_process_group()
