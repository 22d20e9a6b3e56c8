"""What ``estimate`` predicts for Llama-3, by GPUs and by method: the tables of docs/results/scaling.md.

    python -m benchmarks.llama_estimates

Runs on any machine, in a minute.
"""

import torch
from transformers import LlamaConfig

from benchmarks.harness.arguments import build_parser
from gatera_lightning import AdapterConfig, BackboneConfig, HardGateConfig
from gatera_lightning.cost_model.device_memory import Layout, communication, predict_memory
from gatera_lightning.cost_model.saturated_gates import half_open, saved_flops
from gatera_lightning.cost_model.step_costs import (
    MicroBatch,
    build_on_meta,
    model_sizes,
    step_costs,
    step_flops,
)

GIB = 2**30
MODELS = {
    "Llama-3-8B": (4096, 14_336, 32, 32, 8, 128_256),
    "Llama-3-70B": (8192, 28_672, 80, 64, 8, 128_256),
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49_152),
}
"""Hidden size, MLP size, layers, attention heads, key-value heads and vocabulary."""

LAYOUTS = {
    "1 GPU": Layout(1, 1),
    "8 GPUs, DDP": Layout(8, 1),
    "8 GPUs, FSDP2": Layout(1, 8),
    "8 GPUs, FSDP2, CPU offload": Layout(1, 8, offload=True),
    "64 GPUs, FSDP2": Layout(1, 64),
    "64 GPUs, HSDP 8 × 8": Layout(8, 8),
}
BATCH = MicroBatch(sequences=4, length=256, supervised_tokens=128)  # per GPU, as in the commonsense recipe


METHODS = {
    "LoRA": AdapterConfig(update="lora", gate="none"),
    "LoRA behind threshold gates (TS-PEFT)": AdapterConfig(update="lora", gate="threshold"),
    "DoRA": AdapterConfig(update="dora", gate="none"),
    "ABBA": AdapterConfig(update="abba", gate="none"),
    "HiRA behind hard gates, half of them open": AdapterConfig(
        gate=HardGateConfig(bias=0.0, gradient_share=1 / 8), stochastic_rounding=True
    ),
    "HiRA, stochastic rounding": AdapterConfig(gate="none", stochastic_rounding=True),
    "HiRA": AdapterConfig(gate="none"),
    "GateRA": AdapterConfig(),
}
"""All of rank 32, on q, k, v, up and down."""

SHAPES = {
    "Llama-3-8B": MicroBatch(sequences=4, length=512, supervised_tokens=2048),
    "SmolLM2-135M": MicroBatch(sequences=4, length=160, supervised_tokens=32),
}


def main() -> None:
    build_parser(__doc__).parse_args()
    print_layouts()
    print()
    print_methods()


def print_methods() -> None:
    """Print the FLOPs of a step of every method, without recomputation."""
    print("| TFLOP of a step | " + " | ".join(f"{name} | ÷ LoRA" for name in SHAPES) + " |")
    print("|---|" + "---|---|" * len(SHAPES))
    reference: dict[str, int] = {}
    for method, adapter in METHODS.items():
        cells = []
        for name, batch in SHAPES.items():
            model = build_on_meta(llama(name), BackboneConfig(id=name), adapter, torch.bfloat16)
            flops, shares = sum(step_flops(model, batch)), half_open(model)
            if shares is not None:
                flops -= saved_flops(model, batch.tokens, shares)
            cells.append(f"{flops / 1e12:.2f} | {flops / reference.setdefault(name, flops):.2f}")
        print(f"| {method} | " + " | ".join(cells) + " |")


def llama(name: str) -> LlamaConfig:
    """Return the configuration of a model of ``MODELS``."""
    hidden, mlp, layers, heads, key_value_heads, vocabulary = MODELS[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
    )


def print_layouts() -> None:
    """Print memory and communication of GateRA by layout."""
    print(
        "| model | layout | peak GiB per GPU | weights | activations "
        "| received per step, GiB | GFLOP per token |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in ("Llama-3-8B", "Llama-3-70B"):
        backbone = BackboneConfig(id=name, gradient_checkpointing=True)
        model = build_on_meta(llama(name), backbone, AdapterConfig(rank=32), torch.bfloat16)
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
