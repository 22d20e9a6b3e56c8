"""What ``estimate`` predicts for Llama-3 on 1, 8 and 64 GPUs: the table of docs/results/scaling.md.

    python -m benchmarks.llama_estimates

Runs on any machine, in a minute.
"""

import torch
from transformers import LlamaConfig

from benchmarks.harness.arguments import build_parser
from gatera_lightning import AdapterConfig, BackboneConfig
from gatera_lightning.cost_model.device_memory import Layout, communication, predict_memory
from gatera_lightning.cost_model.step_costs import MicroBatch, build_on_meta, model_sizes, step_costs

GIB = 2**30
VOCABULARY = 128_256
MODELS = {"Llama-3-8B": (4096, 14_336, 32, 32), "Llama-3-70B": (8192, 28_672, 80, 64)}
"""Hidden size, MLP size, layers and attention heads."""

LAYOUTS = {
    "1 GPU": Layout(1, 1),
    "8 GPUs, DDP": Layout(8, 1),
    "8 GPUs, FSDP2": Layout(1, 8),
    "8 GPUs, FSDP2, CPU offload": Layout(1, 8, offload=True),
    "64 GPUs, FSDP2": Layout(1, 64),
    "64 GPUs, HSDP 8 × 8": Layout(8, 8),
}
BATCH = MicroBatch(sequences=4, length=256, supervised_tokens=128)  # per GPU, as in the commonsense recipe


def main() -> None:
    build_parser(__doc__).parse_args()
    print(
        "| model | layout | peak GiB per GPU | weights | activations "
        "| received per step, GiB | GFLOP per token |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (hidden, mlp, layers, heads) in MODELS.items():
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
        )
        backbone = BackboneConfig(id=name, gradient_checkpointing=True)
        model = build_on_meta(config, backbone, AdapterConfig(rank=32), torch.bfloat16)
        sizes, costs = model_sizes(model), step_costs(model, BATCH, recomputed=True)
        flops = (costs.forward_flops + costs.backward_flops) / BATCH.tokens
        for label, layout in LAYOUTS.items():
            memory = predict_memory(sizes, costs, layout)
            received = sum(communication(sizes, layout, 1).values())
            cells = (memory.peak, memory.parts["weights"], memory.parts["activations"], received)
            print(
                f"| {name} | {label} | "
                + " | ".join(f"{cell / GIB:.1f}" for cell in cells)
                + f" | {flops / 1e9:.0f} |"
            )


if __name__ == "__main__":
    main()
