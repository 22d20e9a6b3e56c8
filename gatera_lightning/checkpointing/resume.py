"""Going on from a checkpoint whose steps were cut into other micro-batches, or that was written at an epoch's end."""

from typing import Any


def recount_batches(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let the loops of a checkpoint count as many micro-batches to a step as this run has, in place.

    Lightning keeps the position in an epoch in micro-batches of one process; another number of processes or micro-batches makes
    the same optimizer step another count.
    """
    states = (state for state in checkpoint.values() if isinstance(state, dict))
    positions = [state["train_position"] for state in states if "train_position" in state]
    if not positions or positions[0]["accumulate"] == accumulate:
        return
    before = positions[0]["accumulate"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"] // before * accumulate
        counts |= {
            name: ready - (counts["ready"] - count) for name, count in counts.items()
        }  # open ones stay open


def begin_next_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint written at the end of an epoch be one of the start of the next, in place.

    Under max_steps, Lightning otherwise takes that epoch for one that is still to be ended, counts it twice, and, where there
    are max_epochs as well, ends the run an epoch early.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]
    if epochs["total"]["completed"] == epochs["total"]["processed"]:
        return  # in the middle of an epoch
    for counts in (epochs["total"], epochs["current"]):
        counts["completed"] = counts["processed"]
    batches = loops["epoch_loop.batch_progress"]
    batches["current"] |= dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
