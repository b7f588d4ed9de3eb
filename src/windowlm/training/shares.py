"""How processes can share a run's work, told by its settings; loads no torch."""

from dataclasses import replace

from windowlm.config import ConfigError, TrainConfig
from windowlm.parallel.config import ParallelConfig
from windowlm.parallel.parts import parts_of, told

# Gathered one behind the other unless told otherwise: fewer take more memory, more take longer.
PARTS_OF_MODEL = 4


def check_shares(config: TrainConfig, processes: int) -> None:
    """Refuse settings that so many processes cannot share.

    Raises:
        ConfigError: rows, tokens, blocks or groups of processes do not come out even, or a process would
            have no token.
    """
    sharing = context_processes(config, processes)
    blocks_at_once(config.parallel, config.model.layers, checkpointed=config.trainer.activation_checkpointing)
    if config.data.batch_size is None:
        config = with_rows(config, processes, None)
    check_divisible(config, processes // sharing, sharing)


def with_rows(config: TrainConfig, processes: int, kept: int | None) -> TrainConfig:
    """The settings with the number of rows that they leave open: that of the run that goes on, or else one
    for each part that a batch is read in.

    Raises:
        ConfigError: the processes cannot share sequences as the settings say, or the batch is too large.
    """
    rows = kept or processes // context_processes(config, processes)
    try:
        return replace(config, data=replace(config.data, batch_size=rows))
    except ValueError as error:
        raise ConfigError(f"data.{error}", key="data.batch_size") from None


def context_processes(config: TrainConfig, processes: int) -> int:
    """How many share each sequence."""
    given, shares = config.parallel.sharing, config.parallel.context_shares
    if given is None or processes % given == 0:
        return given or processes if config.parallel.kind == "context" else 1
    if shares is not None:
        raise ConfigError(
            f"parallel.context_shares={told(shares)}: for {given} processes that share each sequence, or for "
            f"several times as many, and there {'are' if processes > 1 else 'is'} {processes}; start more by "
            "trainer.devices or torchrun, or give null",
            key="parallel.context_shares",
            correction="parallel.context_shares=null" if processes > 1 else f"trainer.devices={given}",
        )
    raise ConfigError(
        f"parallel.context_processes={given}: a divisor of the number of processes, "
        f"{processes}, is allowed, or null for all; start more by trainer.devices or torchrun",
        key="parallel.context_processes",
        correction="parallel.context_processes=null",
    )


def blocks_at_once(settings: ParallelConfig, layers: int, *, checkpointed: bool) -> int:
    """Whose weights a process gathers at once, of so many.

    Raises:
        ConfigError: more than there are, or several, where activations are checkpointed.
    """
    if settings.kind != "fsdp2":
        return 1
    given = settings.blocks_at_once
    if given is not None and given > layers:
        raise ConfigError(
            f"parallel.blocks_at_once={given}: the model has {layers} blocks, and up to {layers} is allowed, "
            "or null",
            key="parallel.blocks_at_once",
            correction=f"parallel.blocks_at_once={layers}",
        )
    if not checkpointed:
        return given or -(-layers // PARTS_OF_MODEL)
    if given not in (None, 1):
        raise ConfigError(
            f"parallel.blocks_at_once={given}: with trainer.activation_checkpointing=true, which computes "
            "each block again by itself, 1 is allowed, or null",
            key="parallel.blocks_at_once",
            correction="parallel.blocks_at_once=null",
        )
    return 1


def check_divisible(config: TrainConfig, readers: int, sharing: int) -> None:
    """Refuse rows that cannot be read in so many equal parts, and sequences that cannot be cut in so many.

    Raises:
        ConfigError: which of the two, or shares of sequences that do not fit.
    """
    rows, tokens = config.data.rows, config.data.sequence_length
    if rows % readers and config.resume == "auto":
        counts = [str(parts * sharing) for parts in range(1, rows + 1) if rows % parts == 0]
        raise ConfigError(
            f"data.batch_size={rows}: {readers} processes cannot share so many rows in equal parts, and a "
            f"run that goes on keeps them; as many processes are allowed: {', '.join(counts)}",
            key="data.batch_size",
        )
    if rows % readers:
        raise ConfigError(
            f"data.batch_size={rows}: {readers} processes share the rows of a batch, and a multiple of "
            f"{readers} is allowed",
            key="data.batch_size",
            correction=f"data.batch_size={-(-rows // readers) * readers}",
        )
    if (shares := config.parallel.context_shares) is not None:
        try:
            parts_of(tokens, sharing, shares)
        except ValueError as error:
            raise ConfigError(
                f"parallel.{error}", key="parallel.context_shares", correction="parallel.context_shares=null"
            ) from None
    elif tokens % sharing:
        raise ConfigError(
            f"data.sequence_length={tokens}: {sharing} processes share each sequence, and a "
            f"multiple of {sharing} is allowed",
            key="data.sequence_length",
            correction=f"data.sequence_length={-(-tokens // sharing) * sharing}",
        )
