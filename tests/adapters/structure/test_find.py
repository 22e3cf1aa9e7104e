"""Finding groups: counts of real models, unknown families, adapters, refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from sft.adapters.structure.check import self_check
from sft.adapters.structure.find import coupled_groups

Build = Callable[..., nn.Module]


@pytest.mark.parametrize(("width", "key_values", "block"), [(14336, 8, 4), (11008, 32, 1)])
def test_units_of_llama(width: int, key_values: int, block: int) -> None:
    """LLaMA3-8B and LLaMA2-7B on the meta device; 458,752 and 352,256 channels, 1024 heads."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=width,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=key_values,
    )
    with torch.device("meta"):
        groups = coupled_groups(LlamaForCausalLM(config))
    units: Counter[str] = Counter()
    for group in groups:
        units[group.kind] += group.num_units
    assert units == {
        "channels": 32 * width,
        "heads": 32 * 32,
        "vo_channels": 32 * key_values * 128,
    }
    assert {group.block_size for group in groups if group.kind == "heads"} == {block}
    # The released scripts' counts: int(total * ratio) of the pooled units.
    pooled = {14336: (0.03, 13762), 11008: (0.02, 7045)}[width]
    assert int(units["channels"] * pooled[0]) == pooled[1]
    assert int(units["heads"] * 0.052) == 53


class ToyConfig(PreTrainedConfig):  # type: ignore[misc]
    """A family nobody knows."""

    model_type = "toy"

    def __init__(
        self,
        hidden_size: int = 64,
        intermediate_size: int = 96,
        num_heads: int = 8,
        num_layers: int = 3,
        vocab_size: int = 96,
        slopes: bool = False,
        **others: object,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.vocab_size = vocab_size
        self.slopes = slopes
        super().__init__(**others)


class ToyBlock(nn.Module):
    """Attention and a gated feed-forward under names of its own."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("w_query", "w_key", "w_value", "w_out")}
        )
        self.ff = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        count = self.config.num_heads
        split = (*x.shape[:-1], count, x.shape[-1] // count)
        q, k, v = (
            self.attention[name](x).view(split).transpose(1, 2)
            for name in ("w_query", "w_key", "w_value")
        )
        scores = q @ k.transpose(-1, -2)
        if self.config.slopes:
            distance = torch.arange(x.shape[1])
            scores = scores + torch.arange(count)[:, None, None] * distance
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.attention["w_out"](mixed)
        out: Tensor = x + self.ff(x)
        return out


class Toy(PreTrainedModel):  # type: ignore[misc]
    """A model of an unknown family."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([ToyBlock(config) for _ in range(config.num_layers)])
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_an_unknown_family_by_its_look() -> None:
    groups = coupled_groups(Toy(ToyConfig()))
    assert Counter((g.kind, g.num_units) for g in groups) == {
        ("heads", 8): 3,
        ("vo_channels", 64): 3,
        ("channels", 96): 3,
    }
    assert all(group.permutable for group in groups)
    names = {group.name for group in groups}
    assert {"blocks.2.attention", "blocks.2.attention:vo", "blocks.2.ff"} <= names


def test_what_the_check_disproves_is_not_permuted() -> None:
    """Slopes by the number of a head: heads stay, dimensions and channels may move."""
    model = Toy(ToyConfig(slopes=True))
    groups = {group.name: group for group in coupled_groups(model)}
    heads = groups["blocks.0.attention"]
    assert not heads.permutable
    assert "permuting heads of a small random model changes its output by" in heads.reason
    assert groups["blocks.0.attention:vo"].permutable
    assert groups["blocks.0.ff"].permutable
    assert self_check(model) == heads.reason


def test_a_model_without_configuration_is_mapped_but_not_permutable() -> None:
    """The size of its heads is unknown; its channels show by their shapes."""
    groups = coupled_groups(nn.ModuleDict({"only": ToyBlock(ToyConfig())}))
    assert [group.name for group in groups] == ["only.ff"]
    assert not groups[0].permutable
    assert "it has no configuration" in groups[0].reason


def test_nothing_found_is_refused() -> None:
    with torch.device("meta"):
        model = MambaModel(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    with pytest.raises(ValueError, match=r"model_type: got 'mamba'.* remedy: ") as caught:
        coupled_groups(model)
    assert "\n" not in str(caught.value)


def test_layers_that_are_one_module_are_refused() -> None:
    with torch.device("meta"):
        model = AlbertModel(AlbertConfig(hidden_size=64, intermediate_size=64))
    with pytest.raises(ValueError, match=r"model_type: got 'albert'.* all its layers are one"):
        coupled_groups(model)


def test_matrices_of_two_layers_that_are_one_tensor_are_refused(build: Build) -> None:
    model = build("llama")
    one, two = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in range(2))
    two.weight = one.weight
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight: got a tensor shared"):
        coupled_groups(model)


def test_whole_modules_that_are_one_are_refused(build: Build) -> None:
    model = build("llama")
    layers = model.get_submodule("model.layers")
    layers[1] = layers[0]  # type: ignore[index,operator]
    with pytest.raises(ValueError, match="got a tensor shared with"):
        coupled_groups(model)


def test_tied_embeddings_are_no_concern(build: Build) -> None:
    assert coupled_groups(build("llama", tie_word_embeddings=True))


def test_adapters_do_not_hide_the_base(build: Build) -> None:
    """Same groups, same names, bare or adapted, from the wrapper or the model inside."""
    bare = coupled_groups(build("llama-biases"))
    config = LoraConfig(target_modules=["up_proj", "q_proj", "o_proj"])
    model = get_peft_model(build("llama-biases"), config)  # type: ignore[arg-type]
    assert coupled_groups(model) == bare
    assert coupled_groups(model.get_base_model()) == bare


def test_parts_of_a_composite_are_found(build: Build) -> None:
    names = [group.name for group in coupled_groups(build("gemma3"))]
    assert any("vision" in name for name in names)
    assert any("language_model.layers.1.mlp" in name for name in names)


def test_the_callers_random_state_is_left_alone(build: Build) -> None:
    model, state = build("llama"), torch.get_rng_state()
    assert self_check(model) is None
    coupled_groups(Toy(ToyConfig()))
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    Toy(ToyConfig())
    assert torch.equal(torch.get_rng_state(), drawn)


class Towers(Toy):
    """A second stack that the forward leaves out, as a tower that text doesn't reach."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.tower = nn.ModuleList([ToyBlock(config) for _ in range(config.num_layers)])
        self.post_init()


def test_what_the_check_does_not_run_is_not_permuted() -> None:
    groups = {group.name: group for group in coupled_groups(Towers(ToyConfig()))}
    assert groups["blocks.2.ff"].permutable
    assert not groups["tower.0.ff"].permutable
    assert "does not run this part" in groups["tower.0.ff"].reason


def test_a_layer_that_breaks_the_small_model_is_a_reason() -> None:
    class Failing(Toy):
        def forward(self, input_ids: Tensor) -> Tensor:
            raise RuntimeError("needs a camera")

    assert "needs a camera" in (self_check(Failing(ToyConfig())) or "")


def test_a_configuration_that_stays_large_is_not_built() -> None:
    """Sizes under names that are not known here stay as they are: a copy would fill the memory."""

    class Wide(Toy):
        def __init__(self, config: ToyConfig) -> None:
            super().__init__(config)
            self.wide = nn.Linear(4096, 8192)

    with torch.device("meta"):
        model = Wide(ToyConfig())
    assert "sizes of its own" in (self_check(model) or "")
    assert not any(group.permutable for group in coupled_groups(model))
