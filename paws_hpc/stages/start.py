"""Where training starts from: random weights, or a file's."""

from __future__ import annotations

from pathlib import Path

from paws_hpc.config import Config, Identity
from paws_hpc.engine.starting_weights import load_backbone
from paws_hpc.files import file_hash
from paws_hpc.models.encoder import Encoder, build_encoder


def starting_encoder(config: Config) -> Encoder:
    """The encoder before its first step, on the CPU.

    Raises:
        FileNotFoundError: ``model.init`` is no file.
        ValueError: it does not fit; what does not is listed.
    """
    encoder = build_encoder(config.model, seed=config.seed)
    if config.model.init is not None:
        load_backbone(encoder, Path(config.model.init))
    return encoder


def start_identity(config: Config) -> Identity:
    """What determines those weights beside the seed and the network; nothing where they are random."""
    return {} if config.model.init is None else {"model.init.xxh3_128": file_hash(Path(config.model.init))}
