"""Evaluations of a tiny backbone with a perturbed adapter, which can be interrupted after any batch."""

import lightning as L
from perturbed_adapter import perturb_adapter
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.evaluation.prediction_files import PREDICTIONS_FILE
from gatera_lightning.generation import DecodingConfig

EXAMPLES = 7
BOTH = ["likelihood", "generation"]


def perturbed_module(folder, **adapter):
    """A module on the backbone in ``folder`` whose adapter differs from its initial values."""
    module = tiny_module(folder, **adapter)
    module.decoding = DecodingConfig(max_new_tokens=4)
    module.configure_model()
    perturb_adapter(module.model, 4.0)
    return module


class Killed(Exception):
    """The evaluation was interrupted."""


class Killer(L.Callback):
    """Raises ``Killed`` once ``after`` batches are on disk; records the computed examples."""

    def __init__(self, after=None):
        self.after, self.batches, self.computed = after, 0, []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        kind = "likelihood" if "labels" in batch else "generation"
        computed = [
            (kind, example) for example in dict.fromkeys(batch["example_ids"].tolist()) if example >= 0
        ]
        if computed and self.batches == self.after:
            raise Killed
        self.batches += bool(computed)
        self.computed += computed

    def on_test_epoch_end(self, trainer, pl_module):
        if self.batches == self.after:
            raise Killed

    on_predict_batch_end = on_test_batch_end


def evaluate(
    module, folder, after=None, stage="test", examples=EXAMPLES, evaluate_by=BOTH, root=None, **settings
):
    """Evaluate into ``folder``, or the log folder below ``root`` for None; return the Killer of the run."""
    killer = Killer(after)
    report = EvaluationReport(None if folder is None else str(folder))
    trainer = tiny_trainer(root or folder, killer, report)
    test = [f"everyday[:{examples}]"]
    data = tiny_data(module.backbone.id, test=test, evaluate_by=evaluate_by, eval_batch_size=6, **settings)
    options = {"verbose": False} if stage == "test" else {}
    getattr(trainer, stage)(module, datamodule=data, **options)
    return killer


def merged_bytes(folder):
    """Content of the merged predictions; no part file or temporary file may be left."""
    assert list(folder.glob("part-*")) == list(folder.glob("*.tmp")) == []
    return (folder / PREDICTIONS_FILE).read_bytes()
