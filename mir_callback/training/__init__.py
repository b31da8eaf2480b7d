# SPDX-License-Identifier: Apache-2.0
"""What happens inside a Trainer: when to evaluate, what to write down, when to stop. No maths of the metric."""
