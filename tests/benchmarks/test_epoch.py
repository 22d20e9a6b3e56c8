"""benchmarks/epoch.py compares loops over the same rows: both see each row once, and train by the same loss."""

import os
from collections import Counter
from pathlib import Path

import pytest


@pytest.mark.skipif(
    "GATERA_DATA" not in os.environ, reason="GATERA_DATA is unset: it names the folder with the real rows"
)
def test_loops_see_the_same_rows_and_take_the_same_loss(tiny_backbone, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which training sets, and other tests may not find
    from epoch import held_out, rows_of, same_loss
    from loops import LOOPS, Settings
    from watch import Watch

    settings = Settings(str(tiny_backbone), "float32", rows=22, held_out=4, batch_size=4, rank=2)
    seen = {}
    for name in ("gatera", "hf_lora"):
        data = rows_of(settings, seed=0)
        loop, batch = LOOPS[name](data, settings, 0), held_out(data)[0]
        first = same_loss(loop, batch, settings)
        rows = seen[name] = Counter()

        def note(_, args, given, rows=rows):
            if (
                "attention_mask" not in given
            ):  # two tokens by which our module learns what its model's head does
                return
            ids, real = given["input_ids"], given["attention_mask"].bool()
            rows.update(tuple(ids[line][real[line]].tolist()) for line in range(len(ids)))

        handle = loop.model.register_forward_pre_hook(note, with_kwargs=True)
        watch = Watch(loop.model)
        assert loop.train(watch) == 6
        handle.remove()
        assert same_loss(loop, batch, settings) != first  # it has learned, and still takes the plain loss
        targets = sum(label != -100 for row in data.token_rows() for label in row["labels"])
        assert watch.head_positions == (targets if name == "gatera" else watch.positions)
    assert seen["gatera"] == seen["hf_lora"] == Counter(tuple(row["input_ids"]) for row in data.token_rows())
