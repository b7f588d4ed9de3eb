"""The optimizer over the parameters of a decoder, with decay on matrices only."""

import torch

from windowlm.model.decoder import Decoder
from windowlm.training.config import OptimizerConfig
from windowlm.training.master_weights import MasterWeights, float32_copies
from windowlm.training.muon import MuonAdamW

# Peak learning rate of a parameter group as a multiple of the configured one.
RATE_SHARE = "rate_share"


def build_optimizer(model: Decoder, config: OptimizerConfig, *, fused: bool) -> torch.optim.Optimizer:
    """Muon for the matrices inside the blocks and AdamW for the rest, or AdamW for all.

    Norm weights and other vectors are not decayed: pulling them to zero shrinks the signal, not the
    function's complexity. Nor are the weights of short convolutions, which start as the identity. Weights in
    bfloat16 or float16 are trained through float32 copies.

    Args:
        model: its trainable parameters, a shared one counted once.
        config: kind, rates, betas, decay.
        fused: AdamW in one kernel for all parameters; float16's loss scaling needs it off, so that gradients
            are unscaled before they are clipped.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    narrow = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in trained)
    masters: dict[torch.Tensor, torch.Tensor] = {weight: weight for weight in trained}
    if narrow:
        masters = float32_copies(trained)
    hidden = []
    if config.kind == "muon":
        hidden = [masters[matrix] for matrix in model.hidden_matrices() if matrix.requires_grad]
    taken = set(map(id, hidden))
    rest = [master for master in masters.values() if id(master) not in taken]
    tables = set()
    table_decay = config.embedding_weight_decay
    if config.embedding_lr is not None or table_decay is not None:
        tables = {id(masters[table]) for table in model.embedding_tables() if table.requires_grad}
    if table_decay is None:
        table_decay = config.weight_decay
    kinds: list[tuple[list[torch.Tensor], float, float | None]] = [
        ([p for p in rest if p.ndim == 2 and id(p) not in tables], config.weight_decay, None),
        ([p for p in rest if id(p) in tables], table_decay, config.embedding_lr),
        ([p for p in rest if p.ndim != 2], 0.0, config.vector_lr),
    ]
    groups = [
        {"params": params, "weight_decay": decay, RATE_SHARE: 1.0 if rate is None else rate / config.lr}
        for params, decay, rate in kinds
        if params
    ]
    adamw = {"lr": config.lr, "betas": config.betas, "eps": config.epsilon, "fused": fused}
    optimizer: torch.optim.Optimizer
    if hidden:
        muon_lr = config.lr if config.muon_lr is None else config.muon_lr
        optimizer = MuonAdamW(
            hidden,
            groups,
            muon_lr=muon_lr,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
            **adamw,
        )
        optimizer.param_groups[0][RATE_SHARE] = muon_lr / config.lr
    else:
        optimizer = torch.optim.AdamW(groups, **adamw)  # type: ignore[arg-type]
    return MasterWeights(masters, optimizer) if narrow else optimizer
