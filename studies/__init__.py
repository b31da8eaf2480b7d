# SPDX-License-Identifier: Apache-2.0
"""Studies: long experiments whose raw values are kept, and the pages that are made from them."""
