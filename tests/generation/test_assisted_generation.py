"""Transformers' own ways to draft work with gated models: an assistant, the first layers, prompt lookup."""

import pytest
import torch
from perturbed_adapter import perturb_adapter

from gatera_lightning import AdapterConfig, inject_adapters, prepared_for_inference


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "thresholds"])
@pytest.mark.parametrize("gate", ["token", "hard", "threshold"])
def test_text_is_that_of_plain_decoding(tiny_llama, gate, fast):
    model, assistant = (tiny_llama(initializer_range=0.3, eos_token_id=None).eval() for _ in range(2))
    update = "lora" if gate == "threshold" else "hira"
    inject_adapters(model, AdapterConfig(update=update, gate=gate, rank=4), torch.Generator().manual_seed(0))
    perturb_adapter(model, 0.1).eval()
    thresholds = {"skip_below": 0.2, "merge_above": 0.8} if fast else {}
    for seed in range(3):
        prompt = torch.randint(10, 40, (1, 30), generator=torch.Generator().manual_seed(seed))
        settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad(), prepared_for_inference(model, **thresholds):
            expected = model.generate(prompt, **settings)
            assert torch.equal(model.generate(prompt, assistant_model=assistant, **settings), expected)
            assert torch.equal(model.generate(prompt, assistant_early_exit=1, **settings), expected)
            assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **settings), expected)
