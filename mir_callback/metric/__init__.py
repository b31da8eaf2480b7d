# SPDX-License-Identifier: Apache-2.0
"""The metric. Imports torch and numpy only, knows neither models nor ranks."""
