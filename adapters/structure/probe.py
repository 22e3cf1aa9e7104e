"""A small random model of a model's class, and its output for a random input."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from sft.adapters.structure.small import small_config

MOST_PARAMETERS = 20_000_000  # of a copy that is still small: a check must not fill the memory

# What a model's output may call the tensor that everything flows into.
OUTPUTS = ("logits", "logits_per_text", "prediction_logits", "last_hidden_state")


def small_model(model: nn.Module) -> nn.Module:
    """Return a small fp32 model of the same class in eval mode, with random parameters.

    Raises:
        ValueError: it has no configuration, or one that cannot be made small.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError("it has no configuration")
    build, shrunk = type(model), small_config(config)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(shrunk).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(
            f"its configuration has sizes of its own, which leave {count:,} parameters"
        )
    small: nn.Module = build(shrunk).float().eval()
    randomise_(small)
    return small


def randomise_(model: nn.Module) -> None:
    """Fill every parameter, biases and norms included, with noise of a sensible size."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.dim() < 2 else max(parameter.shape[-2:]) ** -0.5
            parameter.normal_(0.0, scale)


def output(model: nn.Module, seed: int = 0) -> Tensor:
    """Return a model's output for a small random input, as one tensor."""
    with torch.no_grad():
        result: Any = model(**random_inputs(model, seed))
    for name in OUTPUTS:
        value = result.get(name) if hasattr(result, "get") else getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(result, Tensor):
        return result
    raise ValueError(f"its output has none of {', '.join(OUTPUTS)}")


def random_inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return random tokens, pixels or audio features, as the model's forward asks for."""
    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if "input_ids" in names:
        # Higher than any special token: a model may mask or count those.
        inputs["input_ids"] = torch.randint(4, text.vocab_size, (2, 7), generator=generator)
    if "decoder_input_ids" in names:
        tokens = torch.randint(4, text.vocab_size, (2, 5), generator=generator)
        inputs["decoder_input_ids"] = tokens
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or ("pixel_values" in names and not has_image_token(config)):
        part = getattr(config, "vision_config", config)
        pixels = (2, part.num_channels, part.image_size, part.image_size)
        inputs["pixel_values"] = torch.randn(pixels, generator=generator)
    if main == "input_features":
        features = (2, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.randn(features, generator=generator)
    return inputs


def has_image_token(config: Any) -> bool:
    """Tell whether images enter among the tokens, so that text alone will do."""
    return any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from logging what it thinks of so small a configuration."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
