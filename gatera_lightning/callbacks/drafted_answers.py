"""A callback that generates the answers of `test` and `predict` with a draft adapter."""

import dataclasses
from typing import Any

import lightning as L
from rich.text import Text
from typing_extensions import override

from gatera_lightning.adapters.draft_adapter import draft_problem, load_draft_adapter
from gatera_lightning.adapters.serialization import read_adapter_config
from gatera_lightning.distributed.gather import gather_objects
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import AdapterFileError, ConfigError
from gatera_lightning.generation.drafting import DraftConfig, DraftCounts, Drafter
from gatera_lightning.generation.drafting.checks import block_problem, decoding_problems
from gatera_lightning.terminal.printing import SafeConsole


class DraftedAnswers(L.Callback):
    """Generate the answers of ``test`` and ``predict`` with a draft adapter: the same ones in fewer passes.

    Example:
        >>> trainer = Trainer(callbacks=[DraftedAnswers("runs/math_draft")])
    """

    def __init__(self, draft: str, block: int = DraftConfig.block) -> None:
        """Draft with an adapter.

        Args:
            draft: The folder of a draft adapter.
            block: Tokens per block: one that the model itself chooses, and ``block - 1`` drafts.
        """
        self.draft = draft
        self.config = DraftConfig(block=block)

    def problems(self, stage: str, module: Any, data: Any, strategy: Any) -> list[str]:
        """Describe every setting that cannot work; empty if there is none. Reads no weights.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
            module: The GateRAModule.
            data: The data module.
            strategy: The Trainer's strategy, or its name.
        """
        found = [problem.replace("draft.", "draft_", 1) for problem in self.config.problems()]
        evaluate_by = getattr(data, "evaluate_by", ["generation"])
        if stage not in ("test", "predict"):
            found.append(f"draft: {self.draft}, but {stage} generates no answers; accepted: null, or test")
        elif "generation" not in evaluate_by:
            found.append(
                f"draft: {self.draft}, but data.evaluate_by {list(evaluate_by)} generates no answers; "
                "accepted: null, or data.init_args.evaluate_by '[generation]'"
            )
        if isinstance(strategy, AdapterShardingStrategy):
            found.append(
                f"draft: {self.draft}, with sharded weights, whose ranks must run the same number of forward "
                "passes; accepted: null, or trainer.strategy auto or ddp"
            )
        found += [f"model.{problem}" for problem in decoding_problems(module.decoding)]
        try:
            config, _ = read_adapter_config(self.draft)
        except AdapterFileError as error:
            return [*found, f"draft: {error}"]
        if problem := draft_problem(config):
            found.append(f"draft: {self.draft}: {problem}")
        elif problem := block_problem(self.config.block, config):
            found.append(f"draft_block: {problem}")
        return found

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before weights are loaded."""
        data: Any = getattr(trainer, "datamodule", None)
        stage = getattr(stage, "value", stage)  # Lightning passes an enumeration
        if problems := self.problems(stage, pl_module, data, trainer.strategy):
            raise ConfigError(problems, on_every_rank=True)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the draft adapter."""
        module: Any = pl_module
        module.drafter = Drafter(module.model, load_draft_adapter(module.model, self.draft), self.config)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        module: Any = pl_module
        module.drafter = None

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave the module as it was; Lightning does not call :meth:`teardown` then."""
        self.teardown(trainer, pl_module, "")

    on_predict_start = on_test_start


def report_drafts(drafter: Drafter | None, *, is_first_rank: bool) -> dict[str, Any]:
    """Print on rank 0 what the drafts of all ranks saved, and return it for the results; a collective.

    Args:
        drafter: What generated the answers; None if no adapter drafts.
        is_first_rank: Whether this rank prints.

    Returns:
        The figures; empty without drafts.
    """
    if drafter is None:
        return {}
    counts, verdicts = DraftCounts(), list[str]()
    for of_rank, of_widths in gather_objects((drafter.counts, drafter.turned_off)):
        counts += of_rank
        verdicts += of_widths
    lines = (f"drafts: {counts}", *dict.fromkeys(verdicts))
    for line in lines if is_first_rank else ():
        SafeConsole(soft_wrap=True).print(Text(line))
    return {
        **dataclasses.asdict(drafter.config),
        "tokens": counts.tokens,
        "forwards": counts.forwards,
        "tokens_per_forward": counts.tokens_per_forward,
        "acceptance": counts.acceptance(),
        "turned_off": verdicts,
    }
