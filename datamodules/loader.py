"""The training loader: a shuffled list of planned steps, and an exact position in it."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from gatera_lightning.datamodules.batches import TrainingBatches
from gatera_lightning.datamodules.tokens import Batch


class PlannedLoader:
    """Steps in a new random order each epoch, each step's micro-batches in order.

    The order of epoch e is a function of (seed, e) alone. The position is two integers, the epoch and the batches handed out
    in it, which are the same on every rank (only rank 0's are saved) and do not see what workers have fetched ahead.
    ``iter()`` alone changes nothing: trainers call it at will, and differently after resuming. A new epoch begins when the
    first batch of a new iterator is asked for, unless a position was restored in the middle of one.
    """

    def __init__(self, dataset: TrainingBatches, *, seed: int, num_workers: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.num_workers = num_workers
        self.epoch = 0
        self.handed_out = 0
        self._restored = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing below runs before the first batch is asked for.
        if self.handed_out == len(self) or (self.handed_out and not self._restored):
            self.epoch, self.handed_out = self.epoch + 1, 0
        self._restored = False
        rest = self.order(self.epoch)[self.handed_out :]
        for batch in DataLoader(
            self.dataset, batch_size=None, sampler=rest, num_workers=self.num_workers, generator=torch.Generator()
        ):
            self.handed_out += 1
            yield batch

    def order(self, epoch: int) -> list[int]:
        """Indices of the micro-batches of an epoch."""
        accumulate = self.dataset.accumulate
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        steps = torch.randperm(len(self) // accumulate, generator=generator).tolist()
        return [step * accumulate + k for step in steps for k in range(accumulate)]

    def state_dict(self) -> dict[str, int]:
        """The position, epoch and batches handed out in it, and what gives it its meaning."""
        position = {"epoch": self.epoch, "handed_out": self.handed_out}
        return position | {"accumulate": self.dataset.accumulate, "batches": len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a position. Raises ValueError when it was taken under another cut of the data."""
        there = state_dict["accumulate"], state_dict["batches"]
        here = self.dataset.accumulate, len(self)
        if there != here:
            raise ValueError(
                f"the checkpoint's position counts {there[1]} micro-batches an epoch at accumulate_grad_batches {there[0]}; "
                f"here there are {here[1]} at {here[0]}. Resume with the same data, data.batch_size, accumulation and "
                "processes, or start a new run with model.warm_start set to the adapter folder."
            )
        self.epoch, self.handed_out = state_dict["epoch"], state_dict["handed_out"]
        self._restored = True
