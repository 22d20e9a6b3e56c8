"""An optimizer step is one large batch, however it is divided into micro-batches, ranks and shards."""

import math

import pytest
from fits import assert_same, fit, read, save_tuned_adapter

from gatera_lightning.adapters.serialization import read_adapter_config


@pytest.fixture(scope="module")
def large_batch(tiny_backbone, tmp_path_factory):
    """8 examples in one forward pass on one process; four uneven steps in each of three epochs."""
    out = tmp_path_factory.mktemp("large_batch")
    fit(tiny_backbone, out, epochs=3)
    return out


@pytest.fixture(scope="module")
def large_batch_clipped(tiny_backbone, tmp_path_factory, large_batch):
    out = tmp_path_factory.mktemp("large_batch_clipped")
    clip = min(read(large_batch)[1]) / 2
    fit(tiny_backbone, out, epochs=3, clip=clip)
    assert any(
        not math.isclose(a, b) for a, b in zip(read(out)[0][1:], read(large_batch)[0][1:], strict=True)
    )
    return out, clip


def test_reference_run_learns(large_batch):
    losses, _, _ = read(large_batch)
    assert len(losses) == 12
    assert sum(losses[8:]) < sum(losses[:4])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_micro_batches_equal_large_batch(tiny_backbone, tmp_path, large_batch, accumulate):
    fit(tiny_backbone, tmp_path, epochs=3, accumulate=accumulate)
    assert_same(tmp_path, large_batch)


def test_gradient_checkpointing_equals_large_batch(tiny_backbone, tmp_path, large_batch):
    fit(tiny_backbone, tmp_path, epochs=3, checkpointing=True)
    assert_same(tmp_path, large_batch)


@pytest.mark.slow
def test_ddp_equals_large_batch(tiny_backbone, tmp_path, large_batch):
    fit(tiny_backbone, tmp_path, epochs=3, strategy="ddp", accumulate=2)
    assert_same(tmp_path, large_batch)


@pytest.mark.slow
def test_ddp_with_checkpointing_and_clipping_equals_large_batch(tiny_backbone, tmp_path, large_batch_clipped):
    reference, clip = large_batch_clipped
    fit(tiny_backbone, tmp_path, epochs=3, strategy="ddp", accumulate=2, checkpointing=True, clip=clip)
    assert_same(tmp_path, reference)


@pytest.mark.slow
def test_fsdp2_with_checkpointing_and_clipping_equals_large_batch(
    tiny_backbone, tmp_path, large_batch_clipped
):
    reference, clip = large_batch_clipped
    fit(tiny_backbone, tmp_path, epochs=3, strategy="fsdp", accumulate=2, checkpointing=True, clip=clip)
    assert_same(tmp_path, reference)


@pytest.mark.slow
def test_draft_rows_on_two_ranks_equal_large_batch(tiny_backbone, tmp_path):
    job = {"update": "lora", "gate": "position", "adapter": {"alpha": 8.0}, "epochs": 2}
    fit(tiny_backbone, tmp_path / "one", **job)
    fit(tiny_backbone, tmp_path / "two", strategy="fsdp", accumulate=2, **job)
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_drafts_for_a_tuned_model_on_two_ranks_equal_large_batch(tiny_backbone, tmp_path):
    tuned = save_tuned_adapter(tiny_backbone, tmp_path / "tuned")
    job = {"update": "lora", "gate": "position", "adapter": {"alpha": 8.0}, "tuned": tuned}
    fit(tiny_backbone, tmp_path / "one", **job)
    fit(tiny_backbone, tmp_path / "two", strategy="fsdp", accumulate=2, **job)
    assert_same(tmp_path / "two", tmp_path / "one")
    digests = [
        read_adapter_config(tmp_path / name / "adapter")[1]["adapter_sha256"] for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_layers_on_two_ranks_equal_large_batch(tiny_backbone, tmp_path, large_batch, strategy):
    job = {"accumulate": 2, "checkpointing": strategy == "fsdp", "backend": "aot_eager"}
    fit(tiny_backbone, tmp_path, epochs=3, strategy=strategy, **job)
    assert_same(tmp_path, large_batch)


@pytest.mark.slow
def test_non_finite_loss_ends_all_ranks_and_names_the_example(tiny_backbone, tmp_path):
    done = fit(tiny_backbone, tmp_path, check=False, strategy="ddp", accumulate=2, poison=7)
    assert done.returncode != 0
    assert "NonFiniteLossError" in done.stderr
    assert "7" in done.stderr.split("micro-batches concerned: [")[1].split("]")[0]
