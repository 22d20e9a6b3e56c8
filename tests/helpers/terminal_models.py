"""A tiny model with long, readable answers for ``chat`` and ``generate``, and plain greedy decoding."""

import shutil
import unicodedata

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning import load_adapter


def talkative_backbone(tiny_backbone, folder):
    """Copy the tiny backbone with a chat template, and weights that generate varied ASCII without end."""
    shutil.copytree(tiny_backbone, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(15)
        for token in range(len(tokenizer)):
            if token in tokenizer.all_special_ids or not tokenizer.decode([token]).isascii():
                model.lm_head.weight[token] = 0
    model.save_pretrained(folder)
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|eos|>{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer.save_pretrained(folder)
    return folder


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def escape(text):
    """Escape control characters as JSON does."""
    return "".join(
        f"\\u{ord(c):04x}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


class GreedyReference:
    """Greedy decoding without a cache, one forward pass per token."""

    def __init__(self, backbone, adapter):
        self.model = AutoModelForCausalLM.from_pretrained(backbone).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(backbone)
        load_adapter(self.model, adapter)

    def ids(self, prompt, tokens):
        """The ids of the prompt and of its answer, and the length of the prompt."""
        ids = list(self.tokenizer(prompt).input_ids)
        start = len(ids)
        for _ in range(tokens):
            with torch.no_grad():
                ids.append(int(self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()
                break
        return ids, start

    def text(self, prompt, tokens):
        """The answer's text."""
        ids, start = self.ids(prompt, tokens)
        return decode(self.tokenizer, ids[start:])
