import torch

from gatera_lightning.objectives.draft_acceptance import acceptance
from gatera_lightning.objectives.draft_layout import DraftLayout

NONE = -100


def test_acceptance_by_depth_equals_counting():
    torch.manual_seed(0)
    size, labels = 3, torch.ones(5, 17, dtype=torch.long)
    labels[:, :2] = labels[1, 9:11] = labels[2] = labels[3, 14:] = NONE
    layout = DraftLayout.of(labels, size, torch.zeros(5, dtype=torch.long))
    agrees = torch.rand(int(layout.is_draft.sum())) < 0.6
    blocks, values = {}, iter(agrees.tolist())
    for row, start in zip(*torch.where(layout.is_draft), strict=True):
        key = int(row), int(layout.starts[row, start])
        blocks.setdefault(key, []).append(next(values))
    accepted = {depth: [] for depth in range(1, size + 1)}
    cycles = []
    for block in blocks.values():
        for depth in range(1, len(block) + 1):
            accepted[depth].append(all(block[:depth]))
        if len(block) == size:
            cycles.append(2 + sum(all(block[:depth]) for depth in range(1, size + 1)))
    found = acceptance(layout, agrees, size)
    assert len(blocks) > len(cycles) > 8
    for depth, values in accepted.items():
        mean = found[f"acceptance_{depth}"]
        assert (int(mean.total), mean.count) == (sum(values), len(values))
    assert (int(found["tokens_per_cycle"].total), found["tokens_per_cycle"].count) == (
        sum(cycles),
        len(cycles),
    )


def test_text_without_supervised_tokens_has_no_elements():
    layout = DraftLayout.of(torch.full((2, 6), NONE), 2, torch.zeros(2, dtype=torch.long))
    assert layout.is_draft.tolist() == [[False], [False]]
    assert all(mean.count == 0 for mean in acceptance(layout, torch.zeros(0, dtype=torch.bool), 2).values())
