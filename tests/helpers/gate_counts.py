"""Gate counts computed token by token with numpy, and batches to compute them on."""

import numpy as np
import torch

from gatera_lightning.gate_analysis.statistics import BINS, PHASES

EDGES = np.linspace(0, 1, BINS + 1)


def batch_of(mask, response, example_ids):
    """The parts of a batch that decide which gates count, and in which phase."""
    return {
        "attention_mask": torch.tensor(mask),
        "response_mask": torch.tensor(response, dtype=torch.bool),
        "example_ids": torch.tensor(example_ids),
    }


def count_gates(z, batch):
    """``{phase: (counts (modules, bins), g of each module)}`` of an unpacked batch, in float64.

    ``z`` are gate logits (modules, batch, tokens).
    """
    found = {}
    for phase in PHASES:
        values = [[] for _ in z]
        for row, example in enumerate(batch["example_ids"].tolist()):
            for token in range(z.shape[2]):
                counts = batch["attention_mask"][row, token] == 1 and example >= 0
                if counts and bool(batch["response_mask"][row, token]) == (phase == "response"):
                    for module in range(len(z)):
                        values[module].append(float(z[module, row, token]))
        g = [1 / (1 + np.exp(-np.array(v))) for v in values]
        found[phase] = np.stack([np.histogram(x, EDGES)[0] for x in g]), g
    return found


def entropy(g):
    """H(g) in nats."""
    return -sum(p * np.log(np.where(p > 0, p, 1)) for p in (g, 1 - g))
