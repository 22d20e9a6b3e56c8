"""Peak allocated memory of rank 0 in a sharded training step on two ranks.

``python memory_script.py OUT.json VOCABULARY``
"""

import json
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig
from gatera_lightning.distributed.sharding import AdapterShardingStrategy

SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
VOCABULARY = int(sys.argv[2])
BATCH = {"sequences": 4, "length": 32, "supervised_tokens": 32}


def micro_batch():
    ids = torch.full((BATCH["sequences"], BATCH["length"]), 7)
    labels = torch.full_like(ids, -100)
    labels[:, 1 : 1 + BATCH["supervised_tokens"] // BATCH["sequences"]] = 7
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "response_mask": labels != -100,
        "example_ids": torch.arange(BATCH["sequences"]),
        "step_supervised_tokens": 2 * BATCH["supervised_tokens"],
        "step_tokens": 2 * ids.numel(),
    }


class Measure(L.Callback):
    """Profiles the third step; the first two create everything that stays, such as the moments."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            self.recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.recorded.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx != 2:
            return
        self.recorded.__exit__(None, None, None)
        events = [e for e in self.recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        parameters = [p.to_local() if isinstance(p, DTensor) else p for p in module.model.parameters()]
        frozen = sum(
            p.numel() * p.element_size()
            for p, q in zip(parameters, module.model.parameters(), strict=True)
            if not q.requires_grad
        )
        moments = [v for state in trainer.optimizers[0].state.values() for v in state.values() if v.ndim]
        local = [v.to_local() if isinstance(v, DTensor) else v for v in moments]
        resident = sum(t.numel() * t.element_size() for t in [*parameters, *local])
        if trainer.is_global_zero:
            found = {
                "peak": peak,
                "resident": resident,
                "frozen": frozen,
                "sizes": SIZES,
                "vocabulary": VOCABULARY,
                "batch": BATCH,
            }
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = tempfile.gettempdir() + f"/memory_script_backbone_{VOCABULARY}"
    if not Path(folder, "model.safetensors").exists():
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SIZES)).save_pretrained(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=AdapterShardingStrategy(),
        max_steps=3,
        callbacks=[Measure()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = GateRAModule(
        backbone=BackboneConfig(id=folder, dtype="float32"),
        adapter=AdapterConfig(rank=8),
        optimizer=OptimizerConfig(),
    )
    trainer.fit(module, torch.utils.data.DataLoader([micro_batch()] * 3, batch_size=None))
