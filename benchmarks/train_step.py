"""What an optimizer step costs: this library's methods, PEFT's, and the frozen backbone as the limit, in one run.

    python benchmarks/train_step.py [--dtype float32] [--rounds 7] [--only gatera peft_lora] [--out results/train_step.json]

SmolLM2-135M's shape with random weights, rank 32 on q, k, v, up, down, 4 rows of 160 tokens with 8 targets each, AdamW. In
``gatera_70_closed`` every gate's bias is such that 70 % of the tokens have gates below 0.1, which are skipped; in
``gatera_decided`` most others have gates above 0.9 as well, and take the merged weight. ``gatera_kept`` is GateRA with nothing
computed again in backward; what is ``_compiled`` has its decoder layers compiled, which is not timed. PEFT is used as its
documentation shows, logits of every token included; ``peft_lora_targets`` has our output head. ``frozen`` is the backbone's
forward and its gradient by the embeddings, with our head and recomputation: what a method pays before its own products. GFLOP
are those of a step's products; tensors is the most that PyTorch's allocator had handed out, weights and moments included, the
peak what the process held, with interpreter and libraries; saved is what forward leaves alive for backward, without weights.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from allocated import kept_bytes, peak_bytes
from interleaved import Round, clock, interleaved, machine, ratio, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.adapters.gate_recording import record_gates
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters
from gatera_lightning.backbone.compilation import compile_layers
from gatera_lightning.backbone.probes import returns_head_output
from gatera_lightning.backbone.recomputation import recompute_elementwise
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.objectives.linear_cross_entropy import cross_entropy_in_head
from gatera_lightning.objectives.next_token import (
    head_only_at,
    shift_labels,
    summed_cross_entropy,
    summed_gate_entropy,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
OURS = {
    "gatera": AdapterConfig(),
    "gatera_kept": AdapterConfig(),
    "gatera_70_closed": AdapterConfig(gate=TokenGateConfig(skip_below=0.1)),
    "gatera_decided": AdapterConfig(gate=TokenGateConfig(skip_below=0.1, merge_above=0.9)),
    "hira": AdapterConfig(gate="none"),
    "lora": AdapterConfig(update="lora", gate="none"),
    "dora": AdapterConfig(update="dora", gate="none"),
}
COMPILED = {f"{method}_compiled": OURS[method] for method in ("gatera", "lora")}
PEFT = ("peft_lora", "peft_lora_targets", "peft_dora", "peft_hira")
METHODS = ("frozen", *OURS, *COMPILED, *PEFT)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def backbone(dtype: str, layers: int, width: int) -> LlamaForCausalLM:
    """SmolLM2-135M's shape, or a smaller or wider one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 192,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(DEVICE, getattr(torch, dtype)).train()


def rows(count: int, tokens: int, targets: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels, (count, tokens), the last ``targets`` of each row carrying loss."""
    ids = torch.randint(0, 49152, (count, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels = ids.clone()
    labels[:, :-targets] = IGNORE_INDEX
    return ids, labels


def step_of(method: str, *setting: Any) -> Round:
    """A whole optimizer step of ``method``; the setting is dtype, layers, width, rank, and (rows, tokens, targets)."""
    step, _, model, _ = built(method, *setting)
    if method in COMPILED:
        compile_layers(model)
    return step


def counts_of(method: str, *setting: Any) -> Round:
    """What is counted of a step, in a process of its own: counting would enlarge the peak of the one that is timed."""
    step, loss_of, model, optimizer = built(method, *setting)
    flops = products(
        step
    )  # before compiling, which leaves the products as they are, but the counter would see none
    if method in COMPILED:
        compile_layers(model)
    step()  # moments are there, and code is compiled
    counted = {
        "flops": flops,
        "saved_bytes": kept_bytes(loss_of),
        "allocated_bytes": peak_bytes(step, model, optimizer),
    }
    return lambda: counted


def built(
    method: str, dtype: str, layers: int, width: int, rank: int, shape: tuple[int, int, int]
) -> tuple[Callable[[], None], Callable[[], Tensor], nn.Module, torch.optim.Optimizer | None]:
    """The step, its loss alone, the model, and the optimizer if there is something to train; nothing is compiled."""
    model: nn.Module = backbone(dtype, layers, width)
    ids, labels = rows(*shape)
    if method.startswith("peft"):
        loss_of = with_peft(model, method, rank, ids, labels)
    elif method == "frozen":
        loss_of = without_adapter(model, ids, labels)
    else:
        config = (OURS | COMPILED)[method]
        loss_of = with_gatera(model, config, rank, ids, labels, less_kept=method != "gatera_kept")
        if config.gate.has_thresholds:
            set_gates(model, ids, sharpness=1.0 if method == "gatera_70_closed" else 1e3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    def step() -> None:
        loss_of().backward()
        if optimizer is not None:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, loss_of, model, optimizer


def with_gatera(
    model: nn.Module, config: AdapterConfig, rank: int, ids: Tensor, labels: Tensor, *, less_kept: bool
) -> Callable[[], Tensor]:
    """GateRAModule's loss."""
    inject_adapters(model, replace(config, rank=rank))
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("update.b"):
                parameter.normal_(std=1e-3)  # zero as at the beginning would leave A without gradients
    shifted, mask = shift_labels(labels), torch.ones_like(ids)
    keep = shifted != IGNORE_INDEX
    targets = shifted[keep]
    assert returns_head_output(model)

    def loss_of() -> Tensor:
        with (
            recompute_elementwise() if less_kept else nullcontext(),
            head_only_at(model, keep),
            record_gates(model) as gates,
            cross_entropy_in_head(model, targets),
        ):
            loss = model(input_ids=ids, attention_mask=mask).logits.squeeze() / len(targets)
        z = gates.stacked(mask)
        return loss if z is None else loss + 0.01 * summed_gate_entropy(z, mask) / z.numel()

    return loss_of


@torch.no_grad()
def set_gates(model: nn.Module, ids: Tensor, closed: float = 0.7, *, sharpness: float) -> None:
    """Biases with which a share ``closed`` of the tokens has gates below the threshold, layer by layer in one forward."""

    def set_bias(layer: AdaptedLinear, args: tuple[Tensor]) -> None:
        layer.gate.weight.normal_().mul_(sharpness / layer.gate.weight.norm())
        layer.gate.bias.zero_()
        z = layer.gate(args[0])
        layer.gate.bias.sub_(z.quantile(closed)).add_(math.log(0.1 / 0.9))

    handles = [layer.register_forward_pre_hook(set_bias) for layer in adapted_linears(model).values()]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()


def with_peft(model: nn.Module, method: str, rank: int, ids: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    from peft import HiraConfig, LoraConfig, get_peft_model

    chosen: Any = HiraConfig(r=rank, target_modules=TARGETS)
    if method != "peft_hira":
        chosen = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, use_dora=method == "peft_dora")
    wrapped = get_peft_model(model, chosen)  # in place
    mask = torch.ones_like(ids)
    if method == "peft_lora_targets":
        shifted = shift_labels(labels)
        keep = shifted != IGNORE_INDEX

        def loss_of() -> Tensor:
            with head_only_at(model, keep):
                return (
                    summed_cross_entropy(wrapped(input_ids=ids, attention_mask=mask).logits, shifted[keep])
                    / keep.sum()
                )

        return loss_of
    return lambda: wrapped(input_ids=ids, attention_mask=mask, labels=labels).loss


def without_adapter(model: nn.Module, ids: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    model.requires_grad_(False)
    shifted, mask = shift_labels(labels), torch.ones_like(ids)
    keep = shifted != IGNORE_INDEX
    targets = shifted[keep]

    def loss_of() -> Tensor:
        embedded = model.get_input_embeddings()(ids).requires_grad_(True)
        with (
            recompute_elementwise(),
            head_only_at(model, keep),
            cross_entropy_in_head(model, targets),
        ):
            return model(inputs_embeds=embedded, attention_mask=mask).logits.squeeze() / len(targets)

    return loss_of


def products(step: Callable[[], Any]) -> int:
    """Floating-point operations of one step's products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def counts(contenders: Mapping[str, tuple[Any, ...]]) -> dict[str, dict[str, float]]:
    """:func:`counts_of` each contender, by its name, one after another."""
    return {
        name: interleaved({name: (counts_of, args)}, rounds=1, warmup=0)[name].figures[0]
        for name, args in contenders.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the backbone"
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(4, 160, 8), metavar=("ROWS", "TOKENS", "TARGETS")
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    setting = (args.dtype, args.layers, args.width, args.rank, tuple(args.shape))
    counted = counts({method: (method, *setting) for method in args.only})
    measured = interleaved({method: (step_of, (method, *setting)) for method in args.only}, args.rounds)
    write(args.out, vars(args) | {"counted": counted}, measured)

    print(machine())
    reference = next((name for name in ("peft_lora", "frozen") if name in measured), args.only[0])
    print(f"method               s, median   ÷ {reference:<26}GFLOP   tensors MB   peak MB   saved MB")
    for name, one in measured.items():
        line = f"{name:<20}{statistics.median(clock(one)):>9.3f}   {ratio(clock(one), clock(measured[reference])):<26}"
        flops, tensors, saved = (
            counted[name][figure] for figure in ("flops", "allocated_bytes", "saved_bytes")
        )
        print(
            f"{line}{flops / 1e9:>8.0f}{tensors / 1e6:>13.0f}{one.peak_bytes / 1e6:>10.0f}{saved / 1e6:>11.0f}"
        )


if __name__ == "__main__":
    main()
