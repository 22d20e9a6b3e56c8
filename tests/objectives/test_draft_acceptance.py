import torch

from gatera_lightning.objectives.draft_acceptance import acceptance
from gatera_lightning.objectives.draft_layout import DraftLayout

NONE = -100


def test_acceptance_by_depth_and_sequence_equals_counting():
    torch.manual_seed(0)
    size, labels = 3, torch.ones(5, 17, dtype=torch.long)
    labels[:, :2] = labels[1, 9:11] = labels[2] = labels[3, 14:] = NONE
    layout = DraftLayout.of(labels, size, torch.zeros(5, dtype=torch.long))
    agrees = torch.rand(int(layout.is_draft.sum())) < 0.6
    blocks, values = {}, iter(agrees.tolist())
    for row, start in zip(*torch.where(layout.is_draft), strict=True):
        key = int(row), int(layout.starts[row, start])
        blocks.setdefault(key, []).append(next(values))
    names = [*(f"acceptance_{depth}" for depth in range(1, size + 1)), "tokens_per_cycle"]
    totals, counts = ({name: [0] * 5 for name in names} for _ in range(2))
    for (row, _), block in blocks.items():
        for depth in range(1, len(block) + 1):
            totals[f"acceptance_{depth}"][row] += all(block[:depth])
            counts[f"acceptance_{depth}"][row] += 1
        if len(block) == size:
            totals["tokens_per_cycle"][row] += 2 + sum(all(block[:depth]) for depth in range(1, size + 1))
            counts["tokens_per_cycle"][row] += 1
    found = acceptance(layout, agrees, size)
    assert len(blocks) > sum(counts["tokens_per_cycle"]) > 8
    assert {name: mean.total.tolist() for name, mean in found.items()} == totals
    assert {name: mean.count.tolist() for name, mean in found.items()} == counts


def test_text_without_supervised_tokens_has_no_elements():
    layout = DraftLayout.of(torch.full((2, 6), NONE), 2, torch.zeros(2, dtype=torch.long))
    assert layout.is_draft.tolist() == [[False], [False]]
    assert not any(
        mean.count.any() for mean in acceptance(layout, torch.zeros(0, dtype=torch.bool), 2).values()
    )
