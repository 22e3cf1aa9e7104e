"""The sections of a recipe; fields of `method`, `zeroth_order`, `training` have other owners."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sft.data.spec import DataSpec
from sft.evaluation.spec import EvaluationSpec, ForgettingSpec
from sft.export.spec import ExportSpec
from sft.recipe.expected import ExpectedSpec
from sft.recipe.section import Section


class QuantizationSpec(Section):
    """How bitsandbytes packs the linear layers of the base; what is trained stays float32."""

    bits: Literal["nf4", "fp4", "int8"]
    double_quant: bool = Field(default=False, description="4 bits: quantise the scales as well")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="4 bits: what products are computed in; auto: the model's dtype"
    )
    storage_dtype: Literal["uint8", "float32", "bfloat16", "float16"] = Field(
        default="uint8", description="4 bits: what the bytes look like; a float for FSDP"
    )
    outlier_threshold: float | None = Field(
        default=None, ge=0, description="int8: inputs above it stay float16; default 6, 0 for none"
    )
    skip_modules: list[str] = Field(
        default_factory=list, description="left as they are, besides the output head"
    )

    @model_validator(mode="after")
    def _of_these_bits(self) -> QuantizationSpec:
        four = {"double_quant": False, "compute_dtype": "auto", "storage_dtype": "uint8"}
        others = {"outlier_threshold": None} if self.bits != "int8" else four
        for key, default in others.items():
            value = getattr(self, key)
            if value != default:
                raise ValueError(f"{key}: got {value}, which {self.bits} has not; leave it out")
        return self


class ModelSpec(Section):
    """Which model is loaded, and how."""

    name: str = Field(
        min_length=1, description="hub id, local folder, or 'smollm2-135m-instruct' (embedded)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = Field(
        default=None, description="a .jinja file, or the template itself, in place of the model's"
    )
    config: dict[str, Any] | None = Field(
        default=None,
        description="random weights: what differs from the named model's configuration, or {}",
    )
    quantization: QuantizationSpec | None = Field(
        default=None, description="pack the linear layers in 4 or 8 bits"
    )

    @model_validator(mode="after")
    def _packs_what_is_there(self) -> ModelSpec:
        if self.config is not None and self.quantization is not None:
            raise ValueError("quantization: got random weights as well; leave one of both out")
        return self


class OffloadSpec(Section):
    """What is kept off the device, where no other engine does it."""

    base: Literal["cpu", "disk"] | None = Field(
        default=None, description="where frozen weights lie while they are not multiplied with"
    )
    optimizer: Literal["cpu"] | None = Field(
        default=None, description="where the optimizer's state lies, and where it steps"
    )
    folder: str | None = Field(
        default=None, description="of base: disk; default: offload, in output_dir"
    )

    @model_validator(mode="after")
    def _moves_something(self) -> OffloadSpec:
        if self.base is None and self.optimizer is None:
            raise ValueError("base: got none, and no optimizer; name one, or leave the section out")
        if self.folder is not None and self.base != "disk":
            raise ValueError(f"folder: got one with base {self.base}; set base: disk, or leave out")
        return self


class Recipe(Section):
    """One job: model, task, method, data, evaluation, training, export."""

    model: ModelSpec
    task: dict[str, Any] = Field(
        default_factory=lambda: {"name": "sft"}, description="a name, or a section with one"
    )
    method: dict[str, Any]
    zeroth_order: dict[str, Any] | None = Field(
        default=None, description="train by forward passes alone; {} for the defaults"
    )
    data: DataSpec
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    forgetting: ForgettingSpec | None = Field(
        default_factory=ForgettingSpec, description="general text read before and after; or false"
    )
    training: dict[str, Any] = Field(default_factory=dict)
    export: ExportSpec = Field(default_factory=ExportSpec)
    offload: OffloadSpec | None = Field(
        default=None, description="keep weights or optimizer state off the device"
    )
    expected: ExpectedSpec | None = Field(
        default=None, description="what a run ends with and takes; told when it does not"
    )
    seed: int = Field(default=0, ge=0, lt=2**32)
    overwrite: bool = Field(default=False, description="replace a run found in output_dir")

    @field_validator("task", mode="before")
    @classmethod
    def _by_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("forgetting", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value is False else value
