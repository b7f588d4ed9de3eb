"""The attention backends of a run, chosen before its data are read."""

from dataclasses import replace

import torch

from windowlm.attention.backends.capability import Request
from windowlm.attention.dispatch import choose_backend, compute_capability
from windowlm.config import ConfigError, TrainConfig
from windowlm.evaluation.precision import compute_dtype


def chosen_backends(config: TrainConfig, device: torch.device, *, cut: bool = False) -> list[str]:
    """Each distinct choice over the layers, with its reason, as training makes it.

    Args:
        config: settings.
        device: of the run.
        cut: whether sequences are cut over processes, whose parts are calls with others' keys.

    Raises:
        ConfigError: the backend cannot serve the training, or the evaluation in its own precision.
    """
    model = config.model
    choices = []
    for window, sinks in dict.fromkeys(zip(model.layer_windows(), model.layer_sinks(), strict=True)):
        training = Request(
            device=device.type,
            compute_capability=compute_capability(device),
            dtype=compute_dtype(config.precision),
            head_dim=model.head_dim,
            groups=model.heads // model.kv_heads,
            window=window,
            sinks=sinks,
            documents=config.data.document_masking,
            more_keys=cut and not config.data.document_masking and not sinks,
            separate_keys=cut and sinks > 0,
            dropout=model.attention_dropout,
            sink_logits=model.learned_sinks,
            logit_cap=model.logit_cap is not None,
            deterministic=config.trainer.deterministic,
        )
        evaluation = replace(
            training,
            dtype=compute_dtype(config.evaluation.precision),
            documents=True,
            more_keys=False,
            separate_keys=False,
            dropout=0.0,
            gradients=False,
        )
        choices.append(_chosen(model.backend, training, "training"))
        if cut and training.documents and not sinks:
            within_one = replace(training, documents=False, more_keys=True)
            choices.append(_chosen(model.backend, within_one, "training"))
        _chosen(model.backend, evaluation, f"evaluation.precision={config.evaluation.precision}")
    return list(dict.fromkeys(choices))


def _chosen(backend: str, request: Request, user: str) -> str:
    try:
        choice = choose_backend(backend, request)
    except ValueError as error:
        reason = str(error).removeprefix(f"backend={backend!r} ").partition("; try ")[0]
        raise ConfigError(
            f"model.backend={backend}: {reason} ({user})",
            key="model.backend",
            correction="model.backend=auto",
        ) from None
    return f"{choice.name} ({choice.reason})"
