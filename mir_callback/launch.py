# SPDX-License-Identifier: Apache-2.0
"""`python -m mir_callback.launch`: another name for `llava_integration.launch`, which is found when it runs."""

import runpy

if __name__ == "__main__":
    runpy.run_module("llava_integration.launch", run_name="__main__")
