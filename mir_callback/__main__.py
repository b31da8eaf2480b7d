# SPDX-License-Identifier: Apache-2.0
"""`python -m mir_callback` is the `mir` command."""

import sys

from mir_callback.cli import main

if __name__ == "__main__":
    sys.exit(main())
