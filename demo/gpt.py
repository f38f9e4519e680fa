"""A small GPT as a list of pipeline layers, and the bytes of a text to train it on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256  # bytes


class Embedding(nn.Module):
    """Bytes and their places in the sequence."""

    def __init__(self, width: int, sequence_length: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(sequence_length, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, sequence) -> (batch, sequence, width)."""
        return self.byte(tokens) + self.place.weight


class Block(nn.Module):
    """One transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_before_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.norm_before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        batch, sequence, width = x.shape
        parts = self.query_key_value(self.norm_before_attention(x))
        query, key, value = parts.view(batch, sequence, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(attention.transpose(1, 2).reshape(batch, sequence, width))
        return x + self.mlp(self.norm_before_mlp(x))


class Head(nn.Module):
    """What the next byte is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.next_byte = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> (batch, sequence, vocabulary)."""
        return self.next_byte(self.norm(x))


def gpt_layers(num_blocks: int, width: int, heads: int, sequence_length: int) -> list[LayerSpec]:
    """The model, layer by layer."""
    return [
        LayerSpec(Embedding, width, sequence_length),
        *(LayerSpec(Block, width, heads) for _ in range(num_blocks)),
        LayerSpec(Head, width),
    ]


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """The loss of one microbatch."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def microbatches(text: Path, batch: int, sequence_length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random (input, target) pieces of a text."""
    tokens = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - sequence_length - 1, (batch,), generator=generator).tolist()
        pieces = torch.stack([tokens[start : start + sequence_length + 1] for start in starts])
        yield pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
