"""Adjust a checkpoint's position in the data before Lightning's loops restore it."""

from typing import Any


def recount_batches(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let a run resume from a checkpoint that used a different number of micro-batches per step.

    Lightning stores the position in an epoch as a number of micro-batches per rank. With another number of
    ranks or of micro-batches per step, the same optimizer step is at another position.

    Args:
        checkpoint: The checkpoint; its loop counters are changed in place.
        accumulate: Micro-batches per optimizer step and rank in this run.
    """
    states = (state for state in checkpoint.values() if isinstance(state, dict))
    positions = [state["train_position"] for state in states if "train_position" in state]
    if not positions or positions[0]["accumulate"] == accumulate:
        return
    before = positions[0]["accumulate"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"] // before * accumulate
        # A batch that was started and not completed stays so.
        counts |= {name: ready - (counts["ready"] - count) for name, count in counts.items()}


def begin_next_epoch(checkpoint: dict[str, Any]) -> None:
    """Turn a checkpoint written at the end of an epoch into one at the start of the next epoch.

    Under ``max_steps``, Lightning would otherwise run the end of that epoch again and count it twice. With
    ``max_epochs`` as well, the run would end one epoch early.

    Args:
        checkpoint: The checkpoint; its loop counters are changed in place. One from the middle of an epoch is
            left as it is.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]
    if epochs["total"]["completed"] == epochs["total"]["processed"]:
        return
    for counts in (epochs["total"], epochs["current"]):
        counts["completed"] = counts["processed"]
    batches = loops["epoch_loop.batch_progress"]
    batches["current"] |= dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
