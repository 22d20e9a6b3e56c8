"""Generated text in pieces of complete characters, each with the gate of its tokens."""

import itertools

import numpy as np
import pytest
import torch
from tiny_backbone import tiny_tokenizer

from gatera_lightning.gate_analysis.capture import GateCall, GateCapture
from gatera_lightning.generation.streaming import TextStream


def test_pieces_are_complete_characters_with_the_mean_gate_of_their_tokens():
    tokenizer = tiny_tokenizer()
    text = "ab é🐝c"
    ids = [i for c in text for i in tokenizer(c).input_ids]
    ids += [tokenizer.bos_token_id, *tokenizer("d").input_ids]
    starts = np.cumsum([0] + [len(tokenizer(c).input_ids) for c in text])
    # The gates of the prompt's last token come first.
    gates = torch.rand(3, len(ids) + 1, generator=torch.Generator().manual_seed(0))
    captured, pieces = GateCapture(), []
    stream = TextStream(tokenizer, lambda *piece: pieces.append(piece), captured)
    stream.put(torch.tensor([[5, 6, 7]]))
    for number, token in enumerate([*ids, tokenizer.eos_token_id]):
        z = gates[:, None, number : number + 1]
        captured.calls.append(
            GateCall("decoding", torch.tensor([[0]]), torch.ones(1, 1).bool(), torch.zeros(1, 1), z)
        )
        stream.put(torch.tensor([token]))
    stream.end()
    assert [piece for piece, _ in pieces] == [*text, "d"]  # without the special token and the end
    means = gates.mean(0)[1:]
    expected = [means[a:b].mean() for a, b in itertools.pairwise(starts)] + [means[-1]]
    assert [gate for _, gate in pieces] == pytest.approx([float(gate) for gate in expected])
    assert stream.text == text + "d"


def test_incomplete_character_is_shown_at_the_end():
    tokenizer, pieces = tiny_tokenizer(), []
    stream = TextStream(tokenizer, lambda piece, gate: pieces.append(piece))
    for token in [[1], *tokenizer("a🐝").input_ids[:3], 1]:
        stream.put(torch.tensor(token).reshape(-1))
    assert pieces == ["a"]
    stream.end()
    assert pieces == ["a", "\N{REPLACEMENT CHARACTER}"]
