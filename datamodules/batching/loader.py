"""The training loader: a shuffled list of planned steps, and an exact position in it."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.datamodules.batching.datasets import TrainingBatches
from gatera_lightning.errors import CheckpointError


def ignore_signals(worker: int) -> None:
    """Leave SIGTERM and SIGUSR1, which SLURM sends to every process of a job, to the one that trains, which saves first."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # later than multiprocessing's own hook, and therefore run before it
def end_workers() -> None:
    """End daemons, such as the workers of a loader that an exception left in the middle, as multiprocessing does next.

    It would wait for ever for those that ignore SIGTERM. Processes that are no daemons are left to it.
    """
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    if not daemons:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error about each
    for daemon in daemons:
        daemon.terminate()
    for daemon in daemons:
        daemon.join(timeout=0.5)
        if daemon.is_alive():
            daemon.kill()


class PlannedLoader:
    """Steps in a new random order each epoch, each step's micro-batches in order.

    The order of epoch e is a function of (seed, e) alone. The position is the epoch and the steps handed out in it, which is
    the same on every rank (only rank 0's is saved), does not see what workers have fetched ahead, and means the same under
    another number of processes or micro-batches, as long as the plan's steps are the same.
    ``iter()`` alone changes nothing: trainers call it at will, and differently after resuming. A new epoch begins when the
    first batch of a new iterator is asked for, unless a position was restored in the middle of one.
    """

    def __init__(
        self, dataset: TrainingBatches, *, seed: int, num_workers: int, epoch_ends_at: int | None = None
    ) -> None:
        """``epoch_ends_at``: micro-batches after which the Trainer goes on to the next epoch; default: all of them."""
        self.dataset = dataset
        self.epoch_ends_at = len(dataset) if epoch_ends_at is None else epoch_ends_at
        self.seed = seed
        self.num_workers = num_workers
        self.epoch = 0
        self.handed_out = 0
        self._restored = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing below runs before the first batch is asked for.
        if self.handed_out >= self.epoch_ends_at or (self.handed_out and not self._restored):
            self.epoch, self.handed_out = self.epoch + 1, 0
        self._restored = False
        rest = self.order(self.epoch)[self.handed_out :]
        for batch in DataLoader(
            self.dataset,
            batch_size=None,
            sampler=rest,
            num_workers=self.num_workers,
            generator=torch.Generator(),
            worker_init_fn=ignore_signals,
        ):
            self.handed_out += 1
            yield batch

    def order(self, epoch: int) -> list[int]:
        """Indices of the micro-batches of an epoch."""
        accumulate = self.dataset.accumulate
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        steps = torch.randperm(len(self) // accumulate, generator=generator).tolist()
        return [step * accumulate + k for step in steps for k in range(accumulate)]

    def state_dict(self) -> dict[str, int | str]:
        """The position: the epoch, the steps handed out in it, micro-batches of the next one; and what gives it its meaning."""
        steps, micro_batches = divmod(self.handed_out, self.dataset.accumulate)
        return {
            "epoch": self.epoch,
            "steps": steps,
            "micro_batches": micro_batches,
            "accumulate": self.dataset.accumulate,
            "plan": self.dataset.plan,
        }

    def load_state_dict(self, state_dict: dict[str, int | str]) -> None:
        """Continue from a position. Raises CheckpointError when it was taken in other data, or in mid-step at another cut."""
        if state_dict["plan"] != self.dataset.plan:
            raise CheckpointError(
                "the checkpoint's position is one in other optimizer steps: other rows, or other rows to a step. Resume with "
                "the same data, data.batch_size, token_budget, group_by_length and seed, and with as many micro-batches a step "
                "(accumulate_grad_batches × processes) where a last step has few rows or a token_budget is set; or start a "
                "new run with model.warm_start set to the adapter folder"
            )
        epoch, steps, micro_batches, there = (
            int(state_dict[n]) for n in ("epoch", "steps", "micro_batches", "accumulate")
        )
        if micro_batches and there != self.dataset.accumulate:
            raise CheckpointError(
                f"the checkpoint was written behind micro-batch {micro_batches} of {there} of a step; resume it with "
                f"trainer.accumulate_grad_batches {there}, not {self.dataset.accumulate}"
            )
        self.epoch, self.handed_out = epoch, steps * self.dataset.accumulate + micro_batches
        self._restored = True
