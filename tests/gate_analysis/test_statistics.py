"""Tests of gate statistics: counts and sums against numpy, groups of modules, and which tokens count."""

import numpy as np
import pytest
import torch
from gate_counts import batch_of, count_gates, entropy

from gatera_lightning.datamodules.batching.collate import TokenSequence, collate
from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.statistics import (
    BINS,
    PHASES,
    GateStatistics,
    counted_tokens,
    mean_by_layer,
    module_groups,
    sum_over_groups,
)


def test_statistics_match_hand_computed_counts():
    """Two modules. The end of row 0 is padding and row 1 is a dummy example, so neither counts."""
    batch = batch_of([[1, 1, 1, 0], [1, 1, 1, 1]], [[0, 1, 1, 1], [0, 0, 1, 1]], [5, -1])
    z = torch.zeros(2, 2, 4)
    z[:, 0] = torch.tensor([[0.0, 100.0, -100.0, 3.0], [1.0, 0.0, 0.0, 3.0]])
    statistics = GateStatistics(2)
    for _ in range(2):
        statistics.update(z, counted_tokens(batch), batch["response_mask"])
    bins = statistics.bins  # (phases, modules, 50)
    nonzero = {(phase, m, b): int(bins[phase, m, b]) for phase, m, b in bins.nonzero().tolist()}
    # g = 0.5 is the lower edge of bin 25 of 50; g(100) = 1 falls into the last bin, g(-100) = 0 into the
    # first, and g(1) = 0.731 into bin 36.
    assert nonzero == {(0, 0, 25): 2, (1, 0, 49): 2, (1, 0, 0): 2, (0, 1, 36): 2, (1, 1, 25): 4}
    assert statistics.sums[0].flatten().tolist() == pytest.approx([1.0, 2 * 0.7310586, 2.0, 2.0])
    assert statistics.sums[1].flatten().tolist() == pytest.approx(
        [2 * np.log(2), 2 * 0.5822034, 0.0, 4 * np.log(2)], abs=1e-6
    )
    assert statistics.sums[2].flatten().tolist() == pytest.approx([0.5, 2 * 0.7310586**2, 2.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_match_numpy(dtype):
    generator = torch.Generator().manual_seed(0)
    statistics, expected = GateStatistics(3), {phase: 0 for phase in PHASES}
    for _ in range(2):
        lengths = torch.randint(1, 9, (5,), generator=generator)
        mask = (torch.arange(8) < lengths[:, None]).long()
        batch = batch_of(
            mask.tolist(), (torch.rand(5, 8, generator=generator) < 0.5).tolist(), [0, -1, 7, 3, -1]
        )
        z = (4 * torch.randn(3, 5, 8, generator=generator)).to(dtype)
        statistics.update(z, counted_tokens(batch), batch["response_mask"])
        for phase, (bins, g) in count_gates(z, batch).items():
            sums = [[f(x).sum() for x in g] for f in (lambda x: x, entropy, np.square)]
            expected[phase] = expected[phase] + np.concatenate([bins.T, sums])
    for phase, name in enumerate(PHASES):
        np.testing.assert_array_equal(statistics.bins[phase].T, expected[name][:BINS])
        np.testing.assert_allclose(statistics.sums[:, phase], expected[name][BINS:], rtol=1e-6, atol=1e-6)


def test_statistics_of_packed_sequence_match_hand_computed_counts():
    """One packed sequence of two examples, and one with a single example and padding."""
    batch = batch_of(
        [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], [[0, 1, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]], [4, 0, 9, 2]
    )
    batch["position_ids"] = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 1, 0, 1, 2, 3]])
    z = torch.tensor([[[0.0, 1.0, 0.0, 100.0, 1.0, 7.0], [-100.0, 0.0, 7.0, 7.0, 7.0, 7.0]]])
    statistics = GateStatistics(1)
    statistics.update(z, counted_tokens(batch), batch["response_mask"])
    bins = statistics.bins[:, 0]  # (phases, 50)
    nonzero = {(phase, b): int(bins[phase, b]) for phase, b in bins.nonzero().tolist()}
    assert nonzero == {(0, 25): 2, (0, 0): 1, (1, 36): 2, (1, 49): 1, (1, 25): 1}
    assert statistics.sums[0].flatten().tolist() == pytest.approx([1.0, 2 * 0.7310586 + 1.5])


def test_packed_and_padded_examples_have_equal_statistics():
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, 2), (1, 1), (7, 3), (2, 5), (3, 1))  # tokens of prompt and answer
    examples = [
        TokenSequence([5] * prompt, [6] * answer, number) for number, (prompt, answer) in enumerate(sizes)
    ]
    values = [4 * torch.randn(3, example.length, generator=generator) for example in examples]
    found = {}
    for packed in (None, [[2, 1], [3, 0, 4]]):
        batch = collate(examples, pad_id=0, train_on="response", packs=packed)
        z = torch.full((3, *batch["input_ids"].shape), 9.0)  # 9 remains at padding
        for i, sequence in enumerate(packed or [[example] for example in range(5)]):
            joined = torch.cat([values[example] for example in sequence], 1)
            z[:, i, : joined.shape[1]] = joined
        found[packed is None] = GateStatistics(3)
        found[packed is None].update(z, counted_tokens(batch), batch["response_mask"])
    assert found[False].bins.sum((1, 2)).tolist() == [3 * 17, 3 * 12]
    assert torch.equal(found[False].bins, found[True].bins)
    torch.testing.assert_close(found[False].sums, found[True].sums)


def test_module_groups_collect_projections_and_layers():
    names = [f"model.layers.{layer}.mlp.{name}" for layer in (2, 101) for name in ("up_proj", "down_proj")]
    assert module_groups([*names, "lm_head"]) == {
        "gates": [0, 1, 2, 3, 4],
        "gate_families/up_proj": [0, 2],
        "gate_families/down_proj": [1, 3],
        "gate_families/lm_head": [4],
        "gate_layers/002": [0, 1],
        "gate_layers/101": [2, 3],
        **{f"gate_modules/{name}": [i] for i, name in enumerate([*names, "lm_head"])},
    }


def test_sum_over_groups_adds_modules():
    bins = torch.arange(2 * 3 * BINS).view(2, 3, BINS)
    sums = torch.arange(18.0, dtype=torch.double).view(3, 2, 3)
    group_bins, group_sums = sum_over_groups({"all": [0, 1, 2], "some": [0, 2]}, bins, sums)
    assert torch.equal(group_bins[:, 0], bins.sum(1).double())
    assert torch.equal(group_bins[:, 1], (bins[:, 0] + bins[:, 2]).double())
    assert torch.equal(group_sums, torch.stack([sums.sum(2), sums[..., 0] + sums[..., 2]], 2))


def test_mean_by_layer_averages_modules():
    modules = [
        GatedModule(f"model.layers.{layer}.mlp.{name}")
        for layer in (10, 2)
        for name in ("up_proj", "down_proj")
    ]
    layers, means = mean_by_layer(modules, np.array([[0.0, 1.0], [0.5, 0.5], [0.2, 0.2], [0.4, 0.0]]))
    assert layers == [2, 10]
    np.testing.assert_allclose(means, [[0.3, 0.1], [0.25, 0.75]])
