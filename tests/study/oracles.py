"""Models whose losses are known without training, and scored runs made of them."""

import numpy as np
import torch
from torch import nn

from tests.evaluation.fakes import MemoryDocuments
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.study.subject import Subject
from windowlm.tokenization.tokenizer import BytesTokenizer

FACTS = {
    "training_length": 4096,
    "window": None,
    "receptive_field": None,
    "tokens_trained": None,
    "tokenizer_identity": "bytes",
    "source_identity": "s",
    "split": "validation",
}


class OneHotModel(nn.Module):
    """Logits are ``sure`` for one token and 0 for the others, or 0 for all where nothing is predicted."""

    def __init__(self, vocabulary_size=256, sure=30.0):
        super().__init__()
        self.head = nn.Linear(vocabulary_size, vocabulary_size, bias=False)
        nn.init.eye_(self.head.weight)
        with torch.no_grad():
            self.head.weight.mul_(sure)

    def predicted(self, tokens):
        """Next token after each of a list of tokens, None for no idea."""
        raise NotImplementedError

    def hidden(self, tokens_BT):
        hidden_BTV = torch.zeros(*tokens_BT.shape, self.head.in_features, dtype=self.head.weight.dtype)
        for row, tokens in enumerate(tokens_BT.tolist()):
            for place, token in enumerate(self.predicted(tokens)):
                if token is not None:
                    hidden_BTV[row, place, token] = 1
        return hidden_BTV


class PeriodModel(OneHotModel):
    """Predicts the token one period before the next, if that lies within its reach."""

    def __init__(self, period, reach, **options):
        super().__init__(**options)
        self.period, self.reach = period, reach

    def predicted(self, tokens):
        back = self.period - 1
        return [
            tokens[place - back] if self.period <= self.reach and place >= back else None
            for place in range(len(tokens))
        ]


class InductionModel(OneHotModel):
    """Predicts what followed the last earlier occurrence of the last letters, within its reach."""

    def __init__(self, reach, letters=4, **options):
        super().__init__(**options)
        self.reach, self.letters = reach, letters

    def predicted(self, tokens):
        last = {}
        found = []
        for place in range(len(tokens)):
            suffix = tuple(tokens[max(0, place + 1 - self.letters) : place + 1])
            earlier = last.get(suffix)
            # The token that followed must be among the last ``reach``, the present one included.
            found.append(
                tokens[earlier + 1] if earlier is not None and place - earlier <= self.reach else None
            )
            last[suffix] = place
        return found


def scored(
    model,
    texts,
    lengths=(64, 256),
    authors=None,
    max_targets=None,
    training_length=4096,
    tokenizer=None,
    **settings,
):
    """A subject, its documents and its result."""
    tokenizer = tokenizer or BytesTokenizer()
    encoded = [tokenizer.encode(text) for text in texts]
    documents = MemoryDocuments(encoded, end_mark=tokenizer.end_of_document, authors=authors)
    evaluation = EvaluationConfig(context_lengths=list(lengths), max_targets=max_targets, **settings)
    result, _, losses = length_sweep(model, documents, tokenizer.token_bytes_V, evaluation, FACTS)
    by_hash = {documents.document_hash(number): text for number, text in enumerate(texts)}
    subject = Subject(
        model=model,
        tokenizer=tokenizer,
        texts={digest: by_hash[digest] for digest in losses.document_hashes},
        losses=losses,
        training_length=training_length,
        batch_tokens=evaluation.batch_tokens,
    )
    return subject, documents, result


def letters(length, seed=0, alphabet="abcdefghij "):
    return "".join(np.random.default_rng(seed).choice(list(alphabet), size=length))
