# SPDX-License-Identifier: Apache-2.0
"""Does MIR decide right? Many small pre-trainings, each scored after the same second stage: docs/evidence.md."""
