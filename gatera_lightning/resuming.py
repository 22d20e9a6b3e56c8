"""Going on from a checkpoint whose steps were cut into other micro-batches."""

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
        counts |= {name: ready - (counts["ready"] - count) for name, count in counts.items()}  # open ones stay open
