"""Rank adapted modules by the share of tokens that their gates skip (TS-PEFT, arXiv 2511.16147)."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from gatera_lightning.gate_analysis.probing import GateProfile
from gatera_lightning.gate_analysis.statistics import CLOSED_BELOW
from gatera_lightning.terminal.printing import SafeConsole


@dataclass(frozen=True)
class Ranked:
    """One module, or all modules of one projection type."""

    name: str
    """Path of the module, or name of the projection type."""

    skipped: float
    """Share of the tokens that are skipped."""

    mean: float
    """Mean gate."""


@dataclass(frozen=True)
class ModuleRanking:
    """Modules and projection types in the order of the share of tokens that they skip, smallest first."""

    modules: list[Ranked]
    projections: list[Ranked]
    tokens: int
    """Number of tokens of the texts."""

    rule: str
    """Which gates count as skipped."""

    @property
    def suggested_targets(self) -> list[str]:
        """The projection types that skip no larger share than the mean of all modules."""
        mean = np.mean([module.skipped for module in self.modules])
        return [found.name for found in self.projections if found.skipped <= mean + 1e-9]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"suggested_targets": self.suggested_targets}


def rank_modules(profile: GateProfile, *, decides: bool) -> ModuleRanking:
    """Rank the modules of a gate profile by the share of tokens that they skip.

    Args:
        profile: The gates of one adapter on some texts.
        decides: Whether the gates decide: they then skip every token with ``σ(z) ≤ ½``. Other gates skip no
            token exactly, and those below 0.1 count.
    """
    gates = np.concatenate(profile.gates, axis=1)  # (modules, tokens)
    skipped = gates <= 0.5 if decides else gates < CLOSED_BELOW
    names = np.array([module.projection for module in profile.modules])
    groups = {name: names == name for name in dict.fromkeys(names.tolist())}
    return ModuleRanking(
        modules=_sorted(
            Ranked(module.path, float(skipped[i].mean()), float(gates[i].mean(dtype=float)))
            for i, module in enumerate(profile.modules)
        ),
        projections=_sorted(
            Ranked(name, float(skipped[members].mean()), float(gates[members].mean(dtype=float)))
            for name, members in groups.items()
        ),
        tokens=gates.shape[1],
        rule="σ(z) <= 1/2" if decides else f"g < {CLOSED_BELOW}",
    )


def _sorted(ranked: Iterable[Ranked]) -> list[Ranked]:
    return sorted(ranked, key=lambda found: (found.skipped, -found.mean))


def print_ranking(ranking: ModuleRanking, adapter: str) -> None:
    """Print both rankings as tables, and the setting that adapts the modules that skip few tokens.

    Args:
        ranking: What to print.
        adapter: Name of the adapter, for the title.
    """
    console = SafeConsole(highlight=False, soft_wrap=True)
    for kind, found in (("projection type", ranking.projections), ("module", ranking.modules)):
        title = f"{adapter}: share of {ranking.tokens:,} tokens that are skipped ({ranking.rule})"
        table = Table(Column(kind, overflow="fold"), "skipped", "mean gate", title=Text(title))
        for row in found:
            table.add_row(Text(row.name), f"{row.skipped:.1%}", f"{row.mean:.3f}")
        console.print(table)
    targets = ", ".join(ranking.suggested_targets)
    console.print(
        Text(
            "projection types that skip no more than the mean module: --model.adapter.target_modules "
            f"'[{targets}]'"
        )
    )
