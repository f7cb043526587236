"""Whether the trainer uses Transformer Engine: from the options and from what is installed, which is not imported here."""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec

from rlmono.config.schema import Config


def why_local(config: Config, device: str) -> str:
    """Why attention and norms of the trainer are rlmono's own; empty where they are Transformer Engine's."""
    if config.transformer_impl == "local":
        return "--transformer-impl local"
    if device != "cuda":
        return "Transformer Engine needs a GPU"
    if config.dtype == "float32":
        return "Transformer Engine's attention computes in bfloat16"
    if config.deterministic:
        return "Transformer Engine's attention is not --deterministic"
    if find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    return ""


def own_attention(context_parallel_size: int, multi_latent_attention: bool) -> list[str]:
    """Why attention is rlmono's own where norms are Transformer Engine's: latents have two head dimensions. Empty where it is not."""
    return [name for name, there in (("context parallelism", context_parallel_size > 1), ("multi-latent attention", multi_latent_attention)) if there]


def note(config: Config) -> str:
    """What a run on GPUs says when it starts."""
    if why := why_local(config, "cuda"):
        return f"the trainer's attention and norms are rlmono's own: {why}"
    own = own_attention(config.context_parallel_size, bool(config.model.get("multi_latent_attention")))
    parts = f"norms (attention is rlmono's own: {' and '.join(own)})" if own else "attention and norms"
    return f"the trainer's {parts} are Transformer Engine's{_version()}"


def _version() -> str:
    try:
        return f", version {importlib.metadata.version('transformer_engine')}"
    except importlib.metadata.PackageNotFoundError:
        return ""
