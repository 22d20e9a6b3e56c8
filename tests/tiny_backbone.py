"""A whole backbone folder, small enough to train in a second: what ``model.backbone.id`` may name."""

import json
from importlib import resources
from pathlib import Path

import torch

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def sample_texts():
    """Question and answer text of every embedded sample row."""
    folder = Path(str(resources.files("gatera_lightning.datamodules"))) / "samples" / "everyday"
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text(encoding="utf-8"))]
    return [f"{row['instruction']}\n{row['output']}" for row in rows]


def tiny_tokenizer(pad=True, bos=True):
    """A byte-level BPE of 400 entries, trained on the embedded samples."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(sample_texts(), trainer)
    special = {"eos_token": EOS} | ({"pad_token": PAD} if pad else {}) | ({"bos_token": BOS} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def tiny_backbone_folder(path, **tokenizer):
    """Save a two-layer Llama (hidden 32) and its tokenizer to ``path``, which AutoModelForCausalLM can load."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = tiny_tokenizer(**tokenizer)
    config = LlamaConfig(
        vocab_size=len(own),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=own.convert_tokens_to_ids(BOS),
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    own.save_pretrained(path)
    return Path(path)
