"""One optimizer step is one large batch, however it is cut up: micro-batches, processes, shards, recomputation."""

import math

import pytest
from fits import assert_same, fit, read


@pytest.fixture(scope="module")
def large_batch(tiny_backbone, tmp_path_factory):
    """8 rows in one forward of one process, four uneven steps in each of three epochs."""
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


def test_twelve_steps_that_move(large_batch):
    losses, _, _ = read(large_batch)
    assert len(losses) == 12
    assert sum(losses[8:]) < sum(losses[:4])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_micro_batches_equal_one_large_batch(tiny_backbone, tmp_path, large_batch, accumulate):
    fit(tiny_backbone, tmp_path, epochs=3, accumulate=accumulate)
    assert_same(tmp_path, large_batch)


def test_gradient_checkpointing_changes_nothing(tiny_backbone, tmp_path, large_batch):
    fit(tiny_backbone, tmp_path, epochs=3, checkpointing=True)
    assert_same(tmp_path, large_batch)


@pytest.mark.slow
def test_two_ddp_processes_equal_one(tiny_backbone, tmp_path, large_batch):
    fit(tiny_backbone, tmp_path, epochs=3, strategy="ddp", accumulate=2)
    assert_same(tmp_path, large_batch)


@pytest.mark.slow
def test_two_ddp_processes_with_checkpointing_and_clipping_equal_one(
    tiny_backbone, tmp_path, large_batch_clipped
):
    reference, clip = large_batch_clipped
    fit(tiny_backbone, tmp_path, epochs=3, strategy="ddp", accumulate=2, checkpointing=True, clip=clip)
    assert_same(tmp_path, reference)


def test_two_fsdp2_processes_with_checkpointing_and_clipping_equal_one(
    tiny_backbone, tmp_path, large_batch_clipped
):
    reference, clip = large_batch_clipped
    fit(tiny_backbone, tmp_path, epochs=3, strategy="fsdp", accumulate=2, checkpointing=True, clip=clip)
    assert_same(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_with_compiled_layers_equal_one_without(tiny_backbone, tmp_path, large_batch, strategy):
    job = {"accumulate": 2, "checkpointing": strategy == "fsdp", "backend": "aot_eager"}
    fit(tiny_backbone, tmp_path, epochs=3, strategy=strategy, **job)
    assert_same(tmp_path, large_batch)


@pytest.mark.slow
def test_a_non_finite_loss_ends_every_process_and_names_the_example(tiny_backbone, tmp_path):
    done = fit(tiny_backbone, tmp_path, check=False, strategy="ddp", accumulate=2, poison=7)
    assert done.returncode != 0
    assert "NonFiniteLossError" in done.stderr
    assert "7" in done.stderr.split("micro-batches concerned: [")[1].split("]")[0]
