"""The `export:` section of a recipe."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from sft.recipe.section import Section


def is_size(text: str) -> bool:
    """Tell whether a text is the size of a file, such as 5GB."""
    return re.fullmatch(r"\d+(\.\d+)?[KMGT]B", text) is not None


class ExportSpec(Section):
    """What is written after training, besides the adapter."""

    merged: bool = True
    also: list[Literal["lora", "shira", "patch", "gguf"]] = Field(
        default_factory=list, description="other forms, each in a folder of its name in output_dir"
    )
    verify: bool = Field(
        default=True, description="reload what is written and compare logits with the trained model"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the merged weights; auto: as they were trained"
    )
    max_shard_size: str = Field(default="5GB", description="of a file of the merged model")
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] = Field(
        default="q8_0", description="of the matrices of a GGUF file"
    )
    rank: int = Field(default=64, ge=1, description="lora: highest rank of a rounded delta")
    max_error: float = Field(
        default=0.05, ge=0, lt=1, description="lora: largest relative error of a rounded delta"
    )
    quantized: Literal["dequantize", "requantize", "reference"] = Field(
        default="dequantize",
        description="merge into: the dequantised base; the base, packed anew; the base as it was",
    )
    push_to_hub: str | None = Field(
        default=None, description="repository for the merged model, or else for the adapter"
    )
    private: bool = Field(default=False, description="make a new repository private")

    @field_validator("max_shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if not is_size(value):
            raise ValueError(f"max_shard_size: got {value!r}; expected one such as 5GB")
        return value
