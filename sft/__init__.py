"""Sparse fine-tuning of Hugging Face models: train a sparse part of a dense model.

The names below load their modules on first use, so `import sft` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

from sft._peft_hook import install as _install_peft_hook

__version__ = "0.1.0"

_HOMES = {
    "SparseTrainer": "sft.trainer",
    "SparseTrainingMixin": "sft.trainer",
    "SparseSFTTrainer": "sft.trainers.supervised",
    "SparseDPOTrainer": "sft.trainers.preference",
    "SparseGRPOTrainer": "sft.trainers.policy",
    "SparseRewardTrainer": "sft.trainers.reward",
    "SparseSeq2SeqTrainer": "sft.trainers.seq2seq",
    "SparseCallback": "sft.driver",
    "ZerothOrderConfig": "sft.optim.zeroth_order.config",
    "OffloadConfig": "sft.offload.config",
    "SpielConfig": "sft.adapters.methods.spiel",
    "S2FTConfig": "sft.adapters.methods.s2ft",
    "SoRAConfig": "sft.adapters.methods.sora",
    "SLTrainConfig": "sft.adapters.methods.sltrain",
    "pretrain_model": "sft.pretrain",
    "resident": "sft.adapters.resident",
    "calibrate": "sft.adapters.calibrate",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name's home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sft' has no attribute {name!r}")
    # first of all, or registration would meet a method that is half imported
    importlib.import_module("peft")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)


_install_peft_hook()
