"""Data loaders: one for training, whose exact position can be saved and restored, and one for evaluation."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.datamodules.batching.datasets import LikelihoodBatches, PromptBatches, TrainingBatches
from gatera_lightning.datamodules.batching.workers import worker_options
from gatera_lightning.errors import CheckpointError


class ResumableLoader:
    """The training loader: optimizer steps in a new order each epoch, the micro-batches of a step in order.

    The order of an epoch depends on seed and epoch only. The position is the epoch and the number of
    micro-batches yielded in it. It does not depend on the rank (only rank 0's is saved) or on what workers
    have prefetched. It remains valid for another number of ranks or micro-batches, as long as the optimizer
    steps consist of the same examples.

    ``iter()`` alone does not change the position, because trainers call it at different times when resuming.
    A new epoch begins with the first batch that a new iterator yields, unless a position within an epoch was
    restored.
    """

    def __init__(
        self,
        dataset: TrainingBatches,
        *,
        seed: int,
        num_workers: int,
        micro_batches_per_epoch: int | None = None,
    ) -> None:
        """Start at the beginning of the first epoch.

        Args:
            dataset: The micro-batches of this rank.
            seed: Seed of the order of steps.
            num_workers: Number of worker processes.
            micro_batches_per_epoch: Micro-batches after which the Trainer ends an epoch; None for all.
        """
        self.dataset = dataset
        self.micro_batches_per_epoch = (
            len(dataset) if micro_batches_per_epoch is None else micro_batches_per_epoch
        )
        self.seed = seed
        self.num_workers = num_workers
        self.epoch = 0
        self.yielded = 0
        self._restored = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        # This is a generator: nothing below runs before the first batch is requested.
        if self.yielded >= self.micro_batches_per_epoch or (self.yielded and not self._restored):
            self.epoch, self.yielded = self.epoch + 1, 0
        self._restored = False
        for batch in DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self.order(self.epoch)[self.yielded :],
            generator=torch.Generator(),
            **worker_options(self.num_workers),
        ):
            self.yielded += 1
            yield batch

    def order(self, epoch: int) -> list[int]:
        """Return the indices of the micro-batches of an epoch, in order."""
        accumulate = self.dataset.accumulate
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        steps = torch.randperm(len(self) // accumulate, generator=generator).tolist()
        return [step * accumulate + k for step in steps for k in range(accumulate)]

    def state_dict(self) -> dict[str, int | str]:
        """Return the position, and the schedule that it refers to."""
        steps, micro_batches = divmod(self.yielded, self.dataset.accumulate)
        return {
            "epoch": self.epoch,
            "steps": steps,
            "micro_batches": micro_batches,
            "accumulate": self.dataset.accumulate,
            "plan": self.dataset.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, int | str]) -> None:
        """Continue from a position.

        Raises:
            CheckpointError: The position belongs to another batch schedule, or is in the middle of a step
                that has another number of micro-batches.
        """
        if state_dict["plan"] != self.dataset.fingerprint:
            raise CheckpointError(
                "the checkpoint has another batch schedule: its optimizer steps consist of other examples. "
                "Resume with the same data, data.batch_size, token_budget, group_by_length and seed, and as "
                "many micro-batches per step (accumulate_grad_batches × ranks) if the last step has few "
                "examples or token_budget is set; or start a new run with model.warm_start set to the "
                "adapter folder"
            )
        epoch, steps, micro_batches, accumulate = (
            int(state_dict[name]) for name in ("epoch", "steps", "micro_batches", "accumulate")
        )
        if micro_batches and accumulate != self.dataset.accumulate:
            raise CheckpointError(
                f"the checkpoint was written after micro-batch {micro_batches} of {accumulate} of a step; "
                f"resume it with trainer.accumulate_grad_batches {accumulate}, not {self.dataset.accumulate}"
            )
        self.epoch, self.yielded = epoch, steps * self.dataset.accumulate + micro_batches
        self._restored = True


def evaluation_loader(
    batches: LikelihoodBatches | PromptBatches, *, seed: int, num_workers: int
) -> DataLoader[Any]:
    """Return a loader of evaluation batches, in order."""
    return DataLoader(
        batches,
        batch_size=None,
        generator=torch.Generator().manual_seed(seed),  # otherwise worker seeds advance the global generator
        **worker_options(num_workers),
    )
