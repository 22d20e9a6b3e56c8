"""What an optimizer step costs: this library's methods, PEFT's, and the frozen backbone as the lower limit.

    python -m benchmarks.train_step [--dtype float32] [--rounds 7] [--only gatera peft_lora] \\
        [--out results/train_step.json]

SmolLM2-135M's shape with random weights, rank 32 on q, k, v, up, down, 4 examples of 160 tokens with 8
supervised tokens each, AdamW.

frozen             forward pass and gradient of the embeddings, with our head and recomputation: what every
                   method pays before its own matmuls
gatera             ``training_loss``; ``hira``, ``abba``, ``lora`` and ``dora`` likewise
hira_static        HiRA behind one learned number per layer
gated_lora         LoRA behind GateRA's gate
ts_peft            LoRA behind threshold gates, which keep half of the tokens
plain_loop         the same, from a batch without the totals of its step, as in a user's own loop
module             the same by GateRAModule in Lightning's Trainer, with its loop, hooks and logging
gatera_saved       outputs of elementwise operations are saved, not recomputed in the backward pass
gatera_70_closed   70 % of the tokens have gates below 0.1, which are skipped
gatera_saturated   most other gates are above 0.9, and use the merged weight
hard_half_open     hard gates that are open for half of the tokens; the gates' gradient comes from an eighth
*_compiled         compiled decoder layers; compilation is not timed
peft_*             as PEFT's documentation shows, with the logits of every token
peft_lora_targets  PEFT's LoRA with our output head

Columns: GFLOP of a step's matmuls; the peak allocated memory (tensors, weights and moments included); the
peak of the process, with interpreter and libraries; what the forward pass saves for backward, without
weights; the loss of the first step. The command fails if the losses of gatera, plain_loop and module
differ.
"""

import math
import statistics

from benchmarks.harness.arguments import add_dtype, build_parser
from benchmarks.harness.interleaving import format_ratio, run_interleaved, write_results
from benchmarks.harness.machine import describe_machine
from benchmarks.harness.steps import LOOPS, METHODS, StepSettings, count_each, timed_step


def main() -> None:
    parser = build_parser(__doc__)
    add_dtype(parser)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=576, help="a multiple of 192")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(4, 160, 8), metavar=("EXAMPLES", "TOKENS", "SUPERVISED")
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    settings = StepSettings(args.dtype, args.layers, args.width, args.rank, *args.shape)
    counted = count_each({method: (method, settings) for method in args.only})
    check_losses({method: figures["loss"] for method, figures in counted.items()})
    measured = run_interleaved(
        {method: (timed_step, (method, settings)) for method in args.only}, args.rounds
    )
    write_results(args.out, vars(args) | {"counted": counted}, measured)

    print(describe_machine())
    reference = next((name for name in ("peft_lora", "frozen") if name in measured), args.only[0])
    against = f"÷ {reference}"
    print(f"{'method':<20}s, median   {against:<28}GFLOP   allocated MB   process MB   saved MB     loss")
    for name, one in measured.items():
        flops, allocated, saved, loss = (
            counted[name][figure] for figure in ("flops", "allocated_bytes", "saved_bytes", "loss")
        )
        ratio = format_ratio(one.seconds, measured[reference].seconds)
        print(
            f"{name:<20}{statistics.median(one.seconds):>9.3f}   {ratio:<28}{flops / 1e9:>5.0f}"
            f"{allocated / 1e6:>15.0f}{one.peak_bytes / 1e6:>13.0f}{saved / 1e6:>11.0f}{loss:>9.4f}"
        )


def check_losses(losses: dict[str, float]) -> None:
    """Raise RuntimeError if the ways to run the same step compute different losses."""
    same = {method: losses[method] for method in ("gatera", *LOOPS) if method in losses}
    if same and not all(math.isclose(loss, min(same.values()), rel_tol=1e-6) for loss in same.values()):
        raise RuntimeError(f"gatera, plain_loop and module compute different losses: {same}")


if __name__ == "__main__":
    main()
