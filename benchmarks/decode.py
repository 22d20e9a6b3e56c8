"""Greedy decoding: tokens a second and the time to the first token, this library's and PEFT's, in one run.

    python benchmarks/decode.py [--dtype float32] [--batch 8] [--only backbone gatera gatera_fast] [--out results/decode.json]

SmolLM2-135M's shape with random weights, rank 32 on q, k, v, up, down, a prompt of 64 tokens, Hugging Face's ``generate`` with
its cache. ``backbone`` is also what any merged adapter costs. Gates are set as in train_step.py: about 70 % of the tokens are
closed, nearly all others open, in every layer; ``decided`` is the share of the decoded tokens' gates below 0.1 or above 0.9.
``gatera`` is exact, ``gatera_fast`` reads one weight for a decided gate, ``gatera_plain`` is the layer as it trains, with the
product of its factors. The first token's time is that of a ``generate`` of one token. Preparing an adapter, once for all
prompts of a ``with`` block and anew in every call of ``gatera_lightning.generation.decoding.generate``, is told apart.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from interleaved import Round, interleaved, machine, ratio, write
from torch import Tensor, nn
from train_step import DEVICE, OURS, PEFT, TARGETS, backbone, rows, set_gates
from transformers import GenerationConfig

from gatera_lightning import inject_adapters
from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.adapters.lookup import adapted_linears

PROMPT = 64
CONTENDERS = ("backbone", "peft_lora", "peft_hira", "gatera_plain", "gatera", "gatera_fast")


def decoding_of(method: str, dtype: str, batch: int, new_tokens: int) -> Round:
    """``generate`` of ``new_tokens`` for ``batch`` prompts."""
    model: nn.Module = backbone(dtype, 30, 576).eval()
    ids, _ = rows(batch, PROMPT, 1)
    if method in PEFT:
        from peft import HiraConfig, LoraConfig, get_peft_model

        chosen = {"peft_lora": LoraConfig, "peft_hira": HiraConfig}[method](r=32, target_modules=TARGETS)
        model = get_peft_model(model, chosen).eval()
    elif method != "backbone":
        inject_adapters(model, OURS["gatera"])
        set_gates(model, ids, sharpness=1e3)

    thresholds = {"skip_below": 0.1, "merge_above": 0.9} if method == "gatera_fast" else {}

    def generated(count: int) -> float:
        begun = clock_now()
        settings = GenerationConfig(
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=1,
        )
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return clock_now() - begun

    share = decided(model, lambda: generated(8))

    def once() -> dict[str, float]:
        begun = clock_now()
        with nullcontext() if method == "gatera_plain" else prepared_for_inference(model, **thresholds):
            prepared = clock_now() - begun
            first = generated(1)
            token = (generated(new_tokens + 1) - first) / new_tokens
        return {"prepare_s": prepared, "first_token_s": first, "token_s": token, "decided": share}

    return once


def clock_now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def decided(model: nn.Module, generate: Callable[[], float]) -> float:
    """The share of gates of decoded tokens (not the prompt's) that are below 0.1 or above 0.9; 0 without gates."""
    layers = adapted_linears(model).values()
    seen: list[Tensor] = []
    for layer in layers:
        layer.set_gate_listener(seen.append)
    generate()
    for layer in layers:
        layer.set_gate_listener(None)
    gates = torch.cat(
        [torch.sigmoid(z).flatten() for z in seen if z.shape[-1] == 1] or [torch.full((1,), 0.5)]
    )
    return float(((gates < 0.1) | (gates > 0.9)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the backbone"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    setting = (args.dtype, args.batch, args.new_tokens)
    measured = interleaved(
        {method: (decoding_of, (method, *setting)) for method in args.only}, args.rounds, warmup=1
    )
    write(args.out, vars(args), measured)

    print(machine())
    against = f"÷ {args.only[0]}"
    print(f"method           tokens/s   {against:<24}prepare, s   first token, s   decided   peak MB")
    for name, one in measured.items():
        speed = args.batch / statistics.median(one.rounds("token_s"))
        line = f"{name:<15}{speed:>10.1f}   {ratio(measured[args.only[0]].rounds('token_s'), one.rounds('token_s')):<24}"
        prepare, first = (statistics.median(one.rounds(figure)) for figure in ("prepare_s", "first_token_s"))
        line += f"{prepare:>10.2f}{first:>17.2f}"
        print(f"{line}{one.rounds('decided')[0]:>10.0%}{one.peak_bytes / 1e6:>10.0f}")


if __name__ == "__main__":
    main()
