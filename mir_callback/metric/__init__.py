# SPDX-License-Identifier: Apache-2.0
"""The number itself. Imports torch and numpy only; knows no model, no Trainer and no ranks."""
