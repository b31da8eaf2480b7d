# SPDX-License-Identifier: Apache-2.0
"""Parts of the demo ../tiny_llava_pretrain.py: its data, its backbones and its closing summary."""
