"""A checkpoint's position in the data is converted to another number of micro-batches per step."""

import pytest

from gatera_lightning.checkpointing.data_position import recount_batches


def checkpoint_with(accumulate, total, current):
    def counts(ready, completed):
        return {"ready": ready, "started": ready, "processed": ready, "completed": completed}

    return {
        "global_step": 5,
        "Rows": {"train_position": {"accumulate": accumulate, "step": 3}},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": {
            "total": counts(*total), "current": counts(*current), "is_last_batch": False
        }}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "total", "current", "accumulate", "new_total", "new_current"),
    [
        (2, (10, 10), (6, 6), 1, (5, 5), (3, 3)),
        (2, (10, 9), (6, 5), 4, (20, 19), (12, 11)),
        (1, (5, 5), (3, 3), 8, (40, 40), (24, 24)),
        (4, (20, 19), (0, 0), 2, (10, 9), (0, 0)),
        (2, (10, 9), (6, 5), 2, (10, 9), (6, 5)),
    ],
    ids=["fewer", "more, one incomplete", "many", "start of epoch", "as many"],
)
def test_recount_batches_converts_positions(before, total, current, accumulate, new_total, new_current):
    checkpoint = checkpoint_with(before, total, current)
    recount_batches(checkpoint, accumulate)
    assert checkpoint == checkpoint_with(before, new_total, new_current)


def test_recount_batches_ignores_checkpoint_without_position():
    checkpoint = checkpoint_with(2, (10, 10), (6, 6))
    del checkpoint["Rows"]
    recount_batches(checkpoint, 4)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["total"] == {"ready": 10, "started": 10, "processed": 10, "completed": 10}
    assert checkpoint["global_step"] == 5
