"""PEFT's suites, pointed at our methods; `run.py` copies this file beside PEFT's tests.

PEFT parametrises its tests by module-level lists. The decorators hold the very list objects, so
that changing those in place before collection points the tests elsewhere.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from sft.adapters.registry import config_class, method_names
from tests import (
    test_config,
    test_custom_models,
    test_decoder_models,
    test_encoder_decoder_models,
    test_feature_extraction_models,
    test_seq_classifier,
)

# What the suites give each method: every entry is one more pass over all of a suite's tests.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "spiel": [{"density": 0.1}, {"density": 0.1, "growth": "none"}],
    "s2ft": [{"density": 0.1}, {"ratio": 0.3, "roles": ["q", "v", "o", "up", "down"]}],
    "sora": [{"r": 4, "alpha": 4}],
    "sltrain": [{"r": 4, "density": 0.1}],
}
# On PEFT's toy models: small matrices, and no attention or feed-forward for S2FT to find.
TOYS = SETTINGS | {
    "spiel": [{"density": 0.5}, {"density": 0.5, "growth": "none"}],
    "s2ft": [{"roles": ["any"], "ratio": 0.5}],
    "sltrain": [{"r": 4, "density": 0.5}],
}
# Embeddings are targets of single weights alone.
EMBEDDINGS = ["spiel"]

# Tests that a method fails on purpose, by method and test, with the reason.
KNOWN = {
    ("SoRAConfig", name): "gates stay float32: in half precision the shrinking rounds to nothing"
    for name in ("test_adapter_dtype_autocast", "test_add_adapter_no_autocast_adapter_dtype")
} | {("S2FTConfig", "test_lora_conversion"): "it converts to rank 8, and a slice has a rank a line"}

MODELS = Path(os.environ["CONFORMANCE_MODELS"])
TINY = {
    "vocab_size": 1200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OLDER = {"vocab_size": 1200, "d_model": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
}


def tiny(architecture: str, **fields: Any) -> str:
    """Write a tiny model with random weights; return its folder, named as PEFT's tests expect."""
    folder = MODELS / f"tiny-random-{architecture}"
    if not folder.is_dir():
        model_class = getattr(transformers, architecture)
        torch.manual_seed(0)
        model_class(model_class.config_class(**fields)).save_pretrained(folder)
    return str(folder)


def pointed(module: ModuleType, owner: str, lists: dict[str, list[Any]]) -> type:
    """Replace the lists of a module; return its test class without the tests that ignore them."""
    for name, content in lists.items():
        getattr(module, name)[:] = content
    replaced = [getattr(module, name) for name in lists]
    return only(getattr(module, owner), replaced)


def only(base: type, used: list[Any]) -> type:
    """Return the test class without the tests that are not parametrised by one of `used`."""

    def uses(test: Any) -> bool:
        arguments = [a for mark in getattr(test, "pytestmark", []) for a in mark.args]
        return any(a is wanted for a in arguments for wanted in used)

    tests = [name for name in dir(base) if name.startswith("test_")]
    dropped = {name: None for name in tests if not uses(getattr(base, name))}
    excused = {name: excuse(base, name) for _, name in KNOWN if hasattr(base, name)}
    return type(base.__name__, (base,), excused | dropped)


def excuse(base: type, name: str) -> Any:
    """Return a test that may fail where `KNOWN` says why."""
    test = getattr(base, name)

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            test(*args, **kwargs)
        except AssertionError:
            reason = KNOWN.get((kwargs["config_cls"].__name__, name))
            if reason is None:
                raise
            pytest.xfail(reason)

    return run


def configs(task: str, targets: list[str] | None = None) -> list[tuple[type, dict[str, Any]]]:
    """Return what every model is tested with: each method in each of its settings."""
    return [
        (config_class(name), {"task_type": task} | settings | _targets(name, targets))
        for name in method_names()
        for settings in SETTINGS[name]
    ]


def _targets(name: str, targets: list[str] | None) -> dict[str, Any]:
    """Targets by module name, for the methods that are pointed at modules."""
    return {} if name == "s2ft" else {"target_modules": targets}


def custom(name: str) -> list[tuple[str, str, type, dict[str, Any]]]:
    """Return one method's cases over PEFT's toy models."""
    owner, settings = config_class(name), TOYS[name][0]
    cases: list[tuple[str, str, Any, dict[str, Any]]] = [
        ("MLP 1", "MLP", "lin0", {}),
        ("MLP 2", "MLP", ["lin0"], {}),
        ("MLP 3", "MLP", ["lin1"], {}),
        ("MLP 4", "MLP", ["lin0", "lin1"], TOYS[name][-1]),
        ("MLP 5", "MLP", ["lin0"], {"modules_to_save": ["lin1"]}),
        ("Embedding + Conv1D 1", "EmbConv1D", ["conv1d"], {}),
    ]
    if name in EMBEDDINGS:
        cases.append(("Embedding + Conv1D 2", "EmbConv1D", ["emb"], {}))
        cases.append(("Embedding + Conv1D 3", "EmbConv1D", ["emb", "conv1d"], {}))
    return [
        (
            f"{name} {title}",
            model,
            owner,
            {**settings, **more, "target_modules": t},
        )
        for title, model, t, more in cases
    ]


TestPeftCustomModel = pointed(
    test_custom_models,
    "TestPeftCustomModel",
    {
        "TEST_CASES": [case for name in method_names() for case in custom(name)],
        # these tests name toy modules and nothing else, of which S2FT asks what role they play
        "ALL_PEFT_CONFIG_CLASSES": [
            config_class(name) for name in method_names() if name != "s2ft"
        ],
    },
)

TestMultipleActiveAdapters = pointed(
    test_custom_models,
    "TestMultipleActiveAdapters",
    {
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
            (
                f"{title} {name}",
                name,
                config_class(name),
                *({**TOYS[name][0], "target_modules": [t], "init_weights": False} for t in targets),
            )
            for name in method_names()
            for title, targets in {"Same": ("lin0", "lin0"), "Different": ("lin0", "lin1")}.items()
        ]
    },
)

TestDecoderModels = pointed(
    test_decoder_models,
    "TestDecoderModels",
    {
        "PEFT_DECODER_MODELS_TO_TEST": [
            tiny("LlamaForCausalLM", **TINY, num_key_value_heads=2),
            tiny("Qwen2ForCausalLM", **TINY, num_key_value_heads=2),
            tiny("GPT2LMHeadModel", **TINY, tie_word_embeddings=True),
        ],
        "ALL_CONFIGS": configs("CAUSAL_LM"),
    },
)

TestEncoderDecoderModels = pointed(
    test_encoder_decoder_models,
    "TestEncoderDecoderModels",
    {
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST": [
            tiny("T5ForConditionalGeneration", **OLDER, **T5),
            tiny("BartForConditionalGeneration", **OLDER, **BART),
        ],
        "ALL_CONFIGS": configs("SEQ_2_SEQ_LM"),
    },
)

TestPeftFeatureExtractionModel = pointed(
    test_feature_extraction_models,
    "TestPeftFeatureExtractionModel",
    {
        "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": [
            tiny("BertModel", **TINY),
            tiny("RobertaModel", **TINY),
        ],
        # not the pooler: the tests' loss leaves it out, and they want a gradient everywhere
        "ALL_CONFIGS": configs("FEATURE_EXTRACTION", ["query", "value"]),
    },
)

TestSequenceClassificationModels = pointed(
    test_seq_classifier,
    "TestSequenceClassificationModels",
    {
        "PEFT_SEQ_CLS_MODELS_TO_TEST": [
            tiny("BertForSequenceClassification", **TINY),
            tiny("LlamaForSequenceClassification", **TINY, num_key_value_heads=2),
        ],
        "ALL_CONFIGS": configs("SEQ_CLS"),
    },
)


def _config_suite() -> type:
    # this one's list is a tuple, so the marks are rewritten instead
    old, new = test_config.ALL_CONFIG_CLASSES, [(config_class(n), {}) for n in method_names()]
    owner = test_config.TestPeftConfig
    for name in dir(owner):
        for mark in getattr(getattr(owner, name), "pytestmark", []):
            if any(argument is old for argument in mark.args):
                object.__setattr__(mark, "args", (mark.args[0], new))
    # these read a repository of the Hub
    for name in ("", "_cache_dir"):
        setattr(owner, f"test_from_pretrained{name}", None)
    owner.test_save_pretrained_with_runtime_config = None
    return only(owner, [new])


TestPeftConfig = _config_suite()
