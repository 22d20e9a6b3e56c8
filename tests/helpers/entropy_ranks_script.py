"""One rank of ``test_gate_entropy_ranks.py``: arguments BACKBONE FOLDER ROWS_PER_RANK MICRO_BATCHES."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from perturbed_adapter import perturb_adapter
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gatera_lightning.peft import GateEntropyMixin, GateRAConfig

STEPS = 4


class GatedTrainer(GateEntropyMixin, Trainer):
    pass


def rows():
    """Rows of very different lengths, so that the ranks of a step have different numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(8 * STEPS):
        length = 4 + 9 * (number % 4)
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return Dataset.from_list(found)


def collate(batch):
    width = max(len(row["input_ids"]) for row in batch)

    def padded(values, fill):
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    ids = [row["input_ids"] for row in batch]
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([row["labels"] for row in batch], -100),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
    }


def main(backbone, folder, rows_per_rank, micro_batches):
    torch.manual_seed(0)
    gate = {"kind": "token", "entropy_weight": 2.0}
    config = GateRAConfig(gate=gate, r=4, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(backbone), config)
    perturb_adapter(model, 0.5)  # a new gate is 0.5 everywhere, where the entropy has no gradient
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=int(rows_per_rank),
        gradient_accumulation_steps=int(micro_batches),
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",  # Adam would divide a wrong scale out of the gradient
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        train_sampling_strategy="sequential",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = GatedTrainer(model=model, args=arguments, train_dataset=rows(), data_collator=collate)
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(folder)
        names = ("loss", "gate_entropy", "gate_mean")
        logs = {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in names}
        logs["ranks"] = trainer.accelerator.num_processes
        (Path(folder) / "logs.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main(*sys.argv[1:])
