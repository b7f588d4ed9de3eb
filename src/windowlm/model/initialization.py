"""Initial weights of the decoder, all in one table.

| parameter                          | distribution                                  |
|------------------------------------|-----------------------------------------------|
| embedding (and head when tied)     | normal, standard deviation 0.02               |
| head when not tied                 | normal, standard deviation 0.02               |
| query, key, value, gate, up        | normal, standard deviation fan_in ** -0.5     |
| attention output, down             | normal, fan_in ** -0.5 * (2 * layers) ** -0.5 |
|                                    | zeros with zero_output_init                   |
| biases of query, key and value     | zeros                                         |
| RMSNorm weights                    | ones                                          |
| output gate of the attention       | zeros                                         |
| logits of learned sinks            | zeros                                         |
| tables of n-gram embeddings        | zeros                                         |
| projection of n-gram embeddings    | normal, standard deviation fan_in ** -0.5     |
| value embeddings                   | normal, standard deviation 1                  |
| shares of value and embedding      | 2 ** -0.5                                     |
| shares of stream and embedding     | 1 and 0                                       |
| short convolution                  | 1 for the token itself, 0 for those before it |

The factor (2 * layers) ** -0.5 keeps the variance of the residual stream independent of depth: each of the
2 * layers branches adds to it (Radford et al. 2019, GPT-2, section 2.3).
"""

import torch
from torch import nn

from windowlm.attention.layers import SlidingWindowAttention
from windowlm.attention.short_convolution import ShortConvolution
from windowlm.model.ngram_embedding import NgramEmbedding

EMBEDDING_STANDARD_DEVIATION = 0.02
RESIDUAL_OUTPUTS = ("output", "down")


def initialize(model: nn.Module, layers: int, *, zero_outputs: bool = False) -> None:
    """Draw every parameter of ``model`` by the module's table, from torch's global generator."""
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if name.startswith("value_embeddings."):
            assert isinstance(module, nn.Embedding)
            # As wide as the projected values are, which with equal shares keeps the variance of their sum.
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Embedding) or kind == "head":
            assert isinstance(module, nn.Embedding | nn.Linear)
            nn.init.normal_(module.weight, std=EMBEDDING_STANDARD_DEVIATION)
        elif isinstance(module, nn.Linear):
            deviation = module.in_features**-0.5
            if kind in RESIDUAL_OUTPUTS:
                deviation *= 0.0 if zero_outputs else (2 * layers) ** -0.5
            nn.init.normal_(module.weight, std=deviation)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
    for name, parameter in model.named_parameters():
        if name.endswith("residual_shares"):
            # The plain residual stream, whose gradient tells where the embedding should come in.
            with torch.no_grad():
                parameter.copy_(torch.tensor([1.0, 0.0]))
    for module in model.modules():
        if isinstance(module, SlidingWindowAttention):
            _initialize_options(module)
        elif isinstance(module, NgramEmbedding):
            # Most n-grams are rare: one that training never met adds nothing then, where a draw would stay as
            # noise.
            nn.init.zeros_(module.tables.weight)
        elif isinstance(module, ShortConvolution):
            module.reset_parameters()


def _initialize_options(attention: SlidingWindowAttention) -> None:
    attention.reset_parameters()
    if attention.gate is not None:
        # Every head starts half open, where the sigmoid is steepest: none is shut by the draw, and the
        # residual stream starts with half of what attention adds, whatever the hidden state.
        nn.init.zeros_(attention.gate.weight)
