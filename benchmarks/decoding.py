"""Greedy decoding: tokens per second and the time to the first token, this library's and PEFT's.

    python -m benchmarks.decoding [--dtype float32] [--batch 8] \\
        [--only backbone gatera gatera_fast] [--out results/decoding.json]

SmolLM2-135M's shape with random weights, adapters on q, k, v, up, down, a prompt of 64 tokens, Hugging
Face's ``generate`` with its cache. Gates are set as in train_step.py: about 70 % of the tokens are closed,
nearly all others open, in every layer.

backbone      what a merged adapter costs, too
gatera        exact
gatera_fast   reads one of two weights where a gate is saturated
gatera_plain  the layer as it is in training, which computes ``B A`` for every token
lora, abba    without a gate; hira and dora likewise
hira_static   HiRA behind one learned number per layer
gated_lora    LoRA behind GateRA's gate; gated_lora_fast reads one of two weights
hard          HiRA behind hard gates, open for half of the tokens; hard_fast reads one of two weights
ts_peft       LoRA behind threshold gates, which keep half of the tokens; ts_peft_fast skips B for the others

``saturated`` is the share of the gates of decoded tokens below 0.1 or above 0.9. The time to the first
token is that of a ``generate`` of one token. ``prepare`` is the time that an adapter needs before decoding:
once for all prompts of a ``with`` block, and once in every call of
``gatera_lightning.generation.decoding.generate``. ``prompt_flops``, in the JSON file only, counts a forward
pass of the prompts without thresholds.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from benchmarks.harness.arguments import add_dtype, build_parser
from benchmarks.harness.interleaving import Round, format_ratio, run_interleaved, write_results
from benchmarks.harness.machine import DEVICE, describe_machine, synchronize
from benchmarks.harness.steps import (
    PEFT,
    TARGET_MODULES,
    StepSettings,
    random_backbone,
    random_batch,
    set_gates,
    set_threshold_gates,
)
from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.adapters.lookup import adapted_linears

PROMPT = 64
FAST = {"skip_below": 0.1, "merge_above": 0.9}
OWN = {
    "gatera_plain": AdapterConfig(),
    "gatera": AdapterConfig(),
    "gatera_fast": AdapterConfig(),
    "lora": AdapterConfig(update="lora", gate="none"),
    "abba": AdapterConfig(update="abba", gate="none"),
    "hira": AdapterConfig(gate="none"),
    "hira_static": AdapterConfig(gate="static"),
    "dora": AdapterConfig(update="dora", gate="none"),
    "gated_lora": AdapterConfig(update="lora"),
    "gated_lora_fast": AdapterConfig(update="lora"),
    "hard": AdapterConfig(gate="hard"),
    "hard_fast": AdapterConfig(gate="hard"),
    "ts_peft": AdapterConfig(update="lora", gate="threshold"),
    "ts_peft_fast": AdapterConfig(update="lora", gate="threshold"),
}
CONTENDERS = ("backbone", "peft_lora", "peft_hira", *OWN)


def timed_decoding(method: str, settings: StepSettings, batch: int, new_tokens: int) -> Round:
    """Return ``generate`` of ``new_tokens`` for ``batch`` prompts, with figures in seconds."""
    model: nn.Module = random_backbone(settings).eval()
    ids = random_batch(batch, PROMPT, 1)["input_ids"]
    if method in PEFT:
        from peft import HiraConfig, LoraConfig, get_peft_model

        config_class = {"peft_lora": LoraConfig, "peft_hira": HiraConfig}[method]
        model = get_peft_model(model, config_class(r=settings.rank, target_modules=TARGET_MODULES)).eval()
    elif method != "backbone":
        inject_adapters(model, OWN[method])
        set_gates_of(OWN[method].gate.kind, model, ids)

    thresholds = FAST if method.endswith("_fast") else {}

    def seconds_to_generate(count: int) -> float:
        started = _now()
        decoding = GenerationConfig(
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=1,
        )
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=decoding)
        return _now() - started

    saturated = share_of_saturated_gates(model, lambda: seconds_to_generate(8))
    with torch.no_grad(), prepared_for_inference(model), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, logits_to_keep=1)
    prompt_flops = float(counter.get_total_flops())

    def run_once() -> dict[str, float]:
        started = _now()
        with nullcontext() if method == "gatera_plain" else prepared_for_inference(model, **thresholds):
            prepare = _now() - started
            first = seconds_to_generate(1)
            token = (seconds_to_generate(new_tokens + 1) - first) / new_tokens
        times = {"prepare_s": prepare, "first_token_s": first, "token_s": token}
        return times | {"saturated": saturated, "prompt_flops": prompt_flops}

    return run_once


def set_gates_of(kind: str, model: nn.Module, ids: Tensor) -> None:
    """Close 70 % of the tokens of soft gates, and half of those of gates that decide."""
    if kind == "token":
        set_gates(model, ids, sharpness=1e3)
    elif kind == "hard":
        set_gates(model, ids, closed=0.5, sharpness=1e3, threshold=0.5)
    elif kind == "threshold":
        set_threshold_gates(model, ids, closed=0.5)


def _now() -> float:
    synchronize()
    return time.perf_counter() if DEVICE == "cuda" else time.process_time()


def share_of_saturated_gates(model: nn.Module, generate: Callable[[], float]) -> float:
    """Return the share of the gates of decoded tokens below 0.1 or above 0.9; 0 without gates."""
    layers = adapted_linears(model).values()
    logits: list[Tensor] = []
    for layer in layers:
        layer.set_gate_listener(logits.append)
    generate()
    for layer in layers:
        layer.set_gate_listener(None)
    decoded = [torch.sigmoid(z).flatten() for z in logits if z.shape[-1] == 1]  # without the prompt
    if not decoded:
        return 0.0
    gates = torch.cat(decoded)
    return float(((gates < 0.1) | (gates > 0.9)).float().mean())


def main() -> None:
    parser = build_parser(__doc__)
    add_dtype(parser)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1, help="number of prompts")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    setting = (StepSettings(args.dtype, args.layers, rank=args.rank), args.batch, args.new_tokens)
    measured = run_interleaved(
        {method: (timed_decoding, (method, *setting)) for method in args.only}, args.rounds, warmup=1
    )
    write_results(args.out, vars(args), measured)

    print(describe_machine())
    against = f"÷ {args.only[0]}"
    print(f"method           tokens/s   {against:<24}prepare, s   first token, s   saturated   process MB")
    reference = measured[args.only[0]].by_round("token_s")
    for name, one in measured.items():
        speed = args.batch / statistics.median(one.by_round("token_s"))
        prepare, first = (
            statistics.median(one.by_round(figure)) for figure in ("prepare_s", "first_token_s")
        )
        print(
            f"{name:<15}{speed:>10.1f}   {format_ratio(reference, one.by_round('token_s')):<24}"
            f"{prepare:>10.2f}{first:>17.2f}{one.by_round('saturated')[0]:>12.0%}"
            f"{one.peak_bytes / 1e6:>13.0f}"
        )


if __name__ == "__main__":
    main()
