"""The training loops that benchmarks/epoch.py compares see the same examples and train the same loss."""

import os
from collections import Counter
from pathlib import Path

import pytest


@pytest.mark.skipif(
    "GATERA_DATA" not in os.environ, reason="GATERA_DATA is unset: it names the folder with the real data"
)
def test_loops_train_same_examples_and_loss(tiny_backbone, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # training sets it, and other tests must not see it
    from benchmarks.epoch import check_loss, load_data, validation_batches
    from benchmarks.harness.monitoring import LoopMonitor
    from benchmarks.harness.training_loops import LOOPS, LoopSettings

    settings = LoopSettings(
        str(tiny_backbone), "float32", train_examples=22, validation_examples=4, batch_size=4, rank=2
    )
    seen = {}
    for name in ("gatera", "hf_lora"):
        data = load_data(settings, seed=0)
        loop, batch = LOOPS[name](data, settings, 0), validation_batches(data)[0]
        untrained = check_loss(loop, batch, settings)
        examples = seen[name] = Counter()

        def record(_, args, inputs, examples=examples):
            if "attention_mask" not in inputs:  # our module's probe of what the model's head returns
                return
            ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
            examples.update(tuple(ids[i][mask[i]].tolist()) for i in range(len(ids)))

        handle = loop.model.register_forward_pre_hook(record, with_kwargs=True)
        monitor = LoopMonitor(loop.model)
        assert loop.train(monitor) == 6
        handle.remove()
        assert check_loss(loop, batch, settings) != untrained
        supervised = sum(label != -100 for example in data.token_lists() for label in example["labels"])
        assert monitor.head_positions == (supervised if name == "gatera" else monitor.positions)
    expected = Counter(tuple(example["input_ids"]) for example in data.token_lists())
    assert seen["gatera"] == seen["hf_lora"] == expected
