"""Settings of drafting."""

from dataclasses import dataclass
from typing import Literal, get_args

from gatera_lightning.errors import type_problems, unknown_value

DraftCycle = Literal["one_forward", "two_forwards"]


@dataclass
class DraftConfig:
    """How tokens are drafted and verified; no setting changes the text."""

    block: int = 4
    """Tokens per block: one that the model itself chooses, and ``block - 1`` drafts."""

    cycle: DraftCycle = "two_forwards"
    """With two_forwards, passes draft and verify in turn. With one_forward, a pass that verifies drafts also
    drafts the next ones, which are lost unless it accepts all: fewer passes of more rows."""

    only_if_faster: bool = True
    """Measure both, and decode without drafts from then on if they do not pay."""

    def problems(self) -> list[str]:
        """Describe every value that is not valid; empty if all are."""
        found = type_problems("draft", self)
        if "block" not in found and self.block < 2:
            found["block"] = f"draft.block: {self.block}; accepted: an integer of at least 2"
        if self.cycle not in get_args(DraftCycle):
            found["cycle"] = unknown_value("draft.cycle", self.cycle, get_args(DraftCycle))
        return list(found.values())
