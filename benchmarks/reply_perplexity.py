"""Perplexity of a dialogue recipe's test replies, with and without the token that ends a reply.

    GATERA_DATA=… python -m benchmarks.reply_perplexity --adapter results/dialogue/gatera-0-adapter \\
        --config smollm2_dialogue.yaml
"""

import math

import torch

from benchmarks.harness.arguments import build_parser
from gatera_lightning import load_adapter
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli.commands.preview import PreviewedSplit


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--adapter", help="an adapter folder; default: the untrained model")
    own, rest = parser.parse_known_args()
    recipe = PreviewedSplit(["fit", *rest], "test")
    model = load_backbone(recipe.model.backbone, "cpu")
    if own.adapter is not None:
        load_adapter(model, own.adapter)
    model.eval()
    nats, tokens = torch.zeros(2, dtype=torch.float64), torch.zeros(2)  # with the end, without it
    for example in recipe.table.examples:
        prompt, reply = list(example["prompt"]), list(example["answers"][example["gold"]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(reply), reduction="none").double()
        nats += torch.stack([losses.sum(), losses[:-1].sum()])
        tokens += torch.tensor([len(reply), len(reply) - 1])
    names = ("with the end token", "without it")
    for name, total, count in zip(names, nats.tolist(), tokens.tolist(), strict=True):
        print(f"{name}: {total:.0f} nats, {count:.0f} tokens, perplexity {math.exp(total / count):.2f}")


if __name__ == "__main__":
    main()
