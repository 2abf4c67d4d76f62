"""Flow++ (Ho et al., ICML 2019): a normalizing flow with exact-form likelihoods, as a library.

The torch half loads on first use, so that configurations are cheap to import.
"""

from importlib import import_module
from typing import Any

from flowpp.config import DequantizerConfig, ModelConfig, TrainingConfig
from flowpp.presets import PRESETS

_LAZY = {"FlowPP": "flowpp.model", "Event": "flowpp.training", "train": "flowpp.training"}

__all__ = ["PRESETS", "DequantizerConfig", "Event", "FlowPP", "ModelConfig", "TrainingConfig", "train"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'flowpp' has no attribute {name!r}")
