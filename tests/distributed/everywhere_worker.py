# SPDX-License-Identifier: Apache-2.0
"""One rank of a group in which some ranks do not come: `everywhere_worker FOLDER`."""

from __future__ import annotations

import sys

import torch.distributed as dist

from mir_callback.distributed import require_everywhere
from mir_callback.errors import ConfigError
from tests.distributed.launch import write_rank


def main(folder: str) -> None:
    """All come; then rank 0 alone; then all again."""
    dist.init_process_group("gloo")
    require_everywhere("first", "")
    said = ""
    if dist.get_rank() == 0:
        try:
            require_everywhere("second", "Come.", seconds=0.5)
        except ConfigError as error:
            said = str(error)
    require_everywhere("third", "")
    write_rank(folder, dist.get_rank(), said)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
