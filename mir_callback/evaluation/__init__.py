# SPDX-License-Identifier: Apache-2.0
"""One evaluation of MIR."""
