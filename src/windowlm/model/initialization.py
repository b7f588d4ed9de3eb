"""Initial weights of the decoder, all in one table.

| parameter                          | distribution                                  |
|------------------------------------|-----------------------------------------------|
| embedding (and head when tied)     | normal, standard deviation 0.02               |
| head when not tied                 | normal, standard deviation 0.02               |
| query, key, value, gate, up        | normal, standard deviation fan_in ** -0.5     |
| attention output, down             | normal, fan_in ** -0.5 * (2 * layers) ** -0.5 |
| RMSNorm weights                    | ones                                          |

The last factor keeps the variance of the residual stream independent of depth: each of the
2 * layers branches adds to it (Radford et al. 2019, GPT-2, section 2.3).
"""

from torch import nn

EMBEDDING_STANDARD_DEVIATION = 0.02
RESIDUAL_OUTPUTS = ("output", "down")


def initialize(model: nn.Module, layers: int) -> None:
    """Draw every parameter of ``model`` by the module's table, from torch's global generator."""
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) or kind == "head":
            assert isinstance(module, nn.Embedding | nn.Linear)
            nn.init.normal_(module.weight, std=EMBEDDING_STANDARD_DEVIATION)
        elif isinstance(module, nn.Linear):
            deviation = module.in_features**-0.5
            if kind in RESIDUAL_OUTPUTS:
                deviation *= (2 * layers) ** -0.5
            nn.init.normal_(module.weight, std=deviation)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
