# SPDX-License-Identifier: Apache-2.0
"""MIR and its errors of rows in memory, on one rank, by the steps of an evaluation that follow the forwards."""

import math

import torch
from tqdm import tqdm

from mir_callback.evaluation.memory import PeakMemory
from mir_callback.evaluation.report import find_errors
from mir_callback.evaluation.solve import solve_layers
from mir_callback.evaluation.token_statistics import SampleRows, clean_rows


def evaluate_rows(vision, text):
    """MIR and the fields of a report on its error; ``vision`` and ``text`` have the rows (n_i, d) of each sample."""
    counts = torch.tensor([[len(images), len(words)] for images, words in zip(vision, text, strict=True)])
    samples = SampleRows([counts], [torch.arange(len(counts))])
    layers = clean_rows([(torch.cat(list(vision)), torch.cat(list(text)))], samples, 0, errors=True)
    peak = PeakMemory(torch.device("cpu"))
    results = solve_layers(layers, samples, 0, "exact", True, tqdm(disable=True), peak)
    return math.log10(results[0].distance), find_errors(results)
