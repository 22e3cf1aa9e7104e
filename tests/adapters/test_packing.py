"""Packed positions: exact, small, and read back from nothing but their bytes."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sft import SLTrainConfig, SpielConfig
from sft.adapters.packing import pack, unpack


def positions(count: int, numel: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    if count == numel:
        return torch.arange(numel)
    drawn = torch.randint(numel, (3 * count + 9,), generator=generator).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:count]].sort().values


SIZES = [(0, 10), (1, 1), (1, 2**40), (10, 10), (9, 10), (3, 1000), (500, 100_003), (777, 2**33)]


@pytest.mark.parametrize(("count", "numel"), SIZES)
def test_positions_come_back(count: int, numel: int) -> None:
    where = positions(count, numel)
    packed = pack(where, numel)
    assert packed.dtype == torch.uint8
    found = unpack(packed, count, numel, "x")
    assert found.dtype == (torch.int32 if numel < 2**31 else torch.int64)
    assert torch.equal(found.long(), where)


def test_the_ends_come_back() -> None:
    for where in ([0], [999], [0, 999], [998, 999]):
        assert unpack(pack(torch.tensor(where), 1000), len(where), 1000, "x").tolist() == where


def test_the_bytes_are_those_of_the_scheme() -> None:
    """l = 2: low bits 01 10 11 00; above them 0 0 1 3, so ones at 0, 1, 3 and 6."""
    packed = pack(torch.tensor([1, 2, 7, 12]), 16)
    assert packed.tolist() == [0b01101100, 0b11010010, 0]


@pytest.mark.parametrize("density", [0.3, 0.05, 0.005, 1e-3])
def test_a_position_takes_little_more_than_its_entropy(density: float) -> None:
    numel = 2_000_000
    count = int(numel * density)
    bits = 8 * len(pack(positions(count, numel), numel)) / count
    p = torch.tensor(density, dtype=torch.float64)
    entropy = -(p.log2() + (1 - p) / p * (1 - p).log2())
    assert entropy < bits < entropy + 0.8


def damaged(packed: Tensor) -> Tensor:
    packed = packed.clone()
    packed[-20] ^= 0xFF
    return packed


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda t: t[:-1], r"^x holds 120 bytes, the 100 positions that its .* take 121$"),
        (damaged, r"^x holds \d+ positions, not 100; the file is damaged$"),
    ],
    ids=["short", "damaged"],
)
def test_other_bytes_are_refused(harm, message: str) -> None:
    packed = pack(positions(100, 20_000), 20_000)
    with pytest.raises(ValueError, match=message):
        unpack(harm(packed), 100, 20_000, "x")


class Model(nn.Module):
    """Two matrices of the size of a small model's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(576, 1536, bias=False)
        self.down = nn.Linear(1536, 576, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x))
        return y


CONFIGS = {
    "spiel": lambda: SpielConfig(density=0.005, target_modules=["up", "down"]),
    "sltrain": lambda: SLTrainConfig(
        density=0.01, r=1, target_modules=["up", "down"], store_indices=True
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_takes_at_most_six_bytes_a_trained_weight(name: str, tmp_path) -> None:
    model = get_peft_model(Model(), CONFIGS[name]())
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size <= 6 * sum(p.numel() for p in trained)
    again = PeftModel.from_pretrained(Model(), tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


def test_a_damaged_file_is_refused_before_anything_is_copied(tmp_path) -> None:
    model = get_peft_model(Model(), CONFIGS["spiel"]())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.down.delta_indices"
    tensors[key] = tensors[key][:, :-1].clone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = (
        r"^adapter file: .*down.delta_indices holds 5287 bytes, the 4423 positions .* take 5288"
    )
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(Model(), tmp_path)


def test_positions_that_are_not_there_yet_are_not_packed() -> None:
    model = get_peft_model(Model(), CONFIGS["spiel"]()).to("meta")
    found = get_peft_model_state_dict(model)["base_model.model.down.delta_indices"]
    assert found.is_meta
    assert found.dtype == torch.int32


def test_a_loader_that_does_not_unpack_takes_no_bytes_for_positions(
    llama, batch, randomize, tmp_path
) -> None:
    """Here the bytes are as many as the positions: 19 of 32 x 32."""
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    o_proj = r".*layers\.0\.self_attn\.o_proj"
    model = get_peft_model(base, SpielConfig(num_weights=19, target_modules=o_proj))
    randomize(model, scale=1.0)
    model.save_pretrained(tmp_path / "adapter")
    (packed,) = (
        tensor
        for key, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
        if key.endswith("_indices")
    )
    assert packed.numel() == 19
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
