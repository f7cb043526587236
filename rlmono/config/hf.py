"""The Hugging Face folder: what its config.json says of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

from rlmono.config.option import ConfigError


def read_hf_config(path: str) -> dict[str, Any]:
    """The folder's config.json. Raises ConfigError when the folder or the file is missing or malformed."""
    folder, file = Path(path), Path(path) / "config.json"
    if not folder.is_dir():
        raise ConfigError([f"{path} is not a folder; download the model first (hf download <model> --local-dir <folder>)"])
    if not file.is_file():
        raise ConfigError([f"{path} has no config.json, so it is not a Hugging Face model folder"])
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError([f"{file} is not JSON ({error}); download it again"]) from None
    if not isinstance(config, dict):
        raise ConfigError([f"{file} must hold a JSON object, but holds a {type(config).__name__}"])
    return config


def model_shape(path: str) -> dict[str, Any]:
    """The model's shape by Megatron's names, and `quantization_config` where the folder has one.

    Raises ConfigError as `read_hf_config` does, and for an architecture that no file in rlmono/models knows.
    """
    hf = read_hf_config(path)
    from rlmono.models.registry import shape_from_hf  # imports torch, and most of this room's users need no shape
    try:
        shape = dict(shape_from_hf(hf))
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from None
    if hf.get("quantization_config"):
        shape["quantization_config"] = hf["quantization_config"]
    return shape


def changed_values(path: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """What of the folder's config.json the shape `model` changes, as config.json would say it; {} without overrides."""
    from rlmono.models.registry import changed_values as changed
    return changed(read_hf_config(path), model)


def shape_with(path: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The shape if config.json said `changes` too. Raises ValueError and TypeError for what it can't say."""
    from rlmono.models.registry import shape_from_hf
    return shape_from_hf({**read_hf_config(path), **changes})
