"""Documents in memory and models with a known loss."""

import hashlib

import numpy as np
import torch
from torch import nn


class MemoryDocuments:
    """Documents of token ids; the end mark is added."""

    name = "memory"

    def __init__(self, documents, end_mark=0, authors=None):
        self._tokens = [np.append(np.asarray(tokens), end_mark) for tokens in documents]
        self._authors = authors
        self.lengths = np.array([len(tokens) for tokens in self._tokens], dtype=np.int64)

    def __len__(self):
        return len(self._tokens)

    def read(self, document, start, stop):
        return self._tokens[document][start:stop]

    def document_hash(self, document):
        return hashlib.sha256(self._tokens[document].tobytes()).hexdigest()

    def title(self, document):
        return f"document {document}"

    def author(self, document):
        return None if self._authors is None else self._authors[document]


class UniformModel(nn.Module):
    """All tokens are equally likely."""

    def __init__(self, vocabulary_size):
        super().__init__()
        self.head = nn.Linear(2, vocabulary_size, bias=False)
        nn.init.zeros_(self.head.weight)

    def hidden(self, tokens_BT):
        return torch.ones(*tokens_BT.shape, 2, dtype=self.head.weight.dtype)


class ReachModel(nn.Module):
    """The logits are a causal sum over the last ``reach`` tokens, itself included.

    It remembers all that it was given, so that a test can see what it saw.
    """

    def __init__(self, vocabulary_size, reach, width=16, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(vocabulary_size, width, generator=generator))
        self.head = nn.Linear(width, vocabulary_size, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(vocabulary_size, width, generator=generator))
        self.reach = reach
        self.seen = []

    def hidden(self, tokens_BT):
        self.seen.extend(row.tolist() for row in tokens_BT)
        embedded_BTD = self.embedding[tokens_BT]
        total_BTD = torch.zeros_like(embedded_BTD)
        for back in range(min(self.reach, tokens_BT.shape[1])):
            shifted_BTD = torch.roll(embedded_BTD, back, dims=1)
            shifted_BTD[:, :back] = 0
            total_BTD = total_BTD + shifted_BTD / (1 + back)
        return torch.tanh(total_BTD)


def random_documents(lengths, vocabulary_size=11, seed=0, authors=None):
    generator = np.random.default_rng(seed)
    return MemoryDocuments(
        [generator.integers(1, vocabulary_size, length) for length in lengths], authors=authors
    )


def one_byte_each(vocabulary_size=11):
    token_bytes_V = np.ones(vocabulary_size, dtype=np.int64)
    token_bytes_V[0] = 0
    return token_bytes_V
