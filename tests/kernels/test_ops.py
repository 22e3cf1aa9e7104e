"""Every op, as torch sees it: schema, tracing, gradients, and the choice of implementation."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sft.kernels import library
from sft.kernels.library import OPS, define, implementation, launcher

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
for _file in sorted(KERNELS.glob("*.py")):
    importlib.import_module(f"sft.kernels.{_file.stem}")
NAMES = sorted(OPS)


def sample(name: str) -> tuple[Any, ...]:
    from device_cases.base import collected

    arguments = collected("SAMPLES")[name]
    return tuple(arguments() if callable(arguments) else arguments)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(OPS[name], sample(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_tracer_keeps_the_op(name: str) -> None:
    """One graph, and the values of the op itself."""
    from device_cases.base import tensors

    def call(*arguments: Any) -> Any:
        return OPS[name](*arguments)

    torch._dynamo.reset()
    eager, traced = sample(name), sample(name)
    with torch.no_grad():
        wanted = call(*eager)
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(*traced)
    pairs = zip(tensors((found, traced)), tensors((wanted, eager)), strict=True)
    for left, right in pairs:
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", NAMES)
def test_a_launcher_takes_the_arguments_of_the_op(name: str) -> None:
    """Both implementations, one signature: a launcher that does not is found without a GPU."""
    pytest.importorskip("triton")
    import inspect

    where = library.LAUNCHERS[name]
    parameters = inspect.signature(launcher(where)).parameters
    assert list(parameters) == [argument.name for argument in OPS[name]._schema.arguments]


@pytest.mark.parametrize("name", NAMES)
def test_every_op_is_explained(name: str) -> None:
    page = KERNELS.parent / "docs/kernels.md"
    assert f"`{name}`" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ["Triton", "", "cuda"])
def test_an_unknown_choice_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_KERNELS", value)
    with pytest.raises(ValueError, match=f"SFT_KERNELS: got {value!r}, allowed is one of auto, to"):
        implementation(torch.device("cpu"))


def test_triton_asked_for_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_KERNELS", "triton")
    with pytest.raises(ValueError, match="SFT_KERNELS: got 'triton', the tensors are on cpu"):
        implementation(torch.device("cpu"))


def test_triton_asked_for_and_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_KERNELS", "triton")
    monkeypatch.setattr(library, "_installed", lambda: False)
    with pytest.raises(ValueError, match=r"SFT_KERNELS: got 'triton', .* pip install 'sparse-sft"):
        implementation(torch.device("cuda"))


def test_the_choice_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFT_KERNELS", raising=False)
    monkeypatch.setattr(library, "_installed", lambda: True)
    assert implementation(torch.device("cuda")) == "triton"
    assert implementation(torch.device("cpu")) == "torch"
    monkeypatch.setenv("SFT_KERNELS", "torch")
    assert implementation(torch.device("cuda")) == "torch"
    monkeypatch.setenv("SFT_KERNELS", "auto")
    monkeypatch.setattr(library, "_installed", lambda: False)
    assert implementation(torch.device("cuda")) == "torch"


def test_a_launcher_without_triton_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_installed", lambda: False)
    with pytest.raises(ImportError, match=r"triton: not installed, .* pip install 'sparse-sft"):
        launcher("nothing:at_all")


def test_the_chosen_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the op, on the device of its first tensor, in a list as well."""
    called = []
    op = define(
        "probe(Tensor[] values, float scale) -> Tensor",
        plain=lambda values, scale: called.append("torch") or values[0] * scale,
        triton="probe:probe",
        fake=lambda values, scale: torch.empty_like(values[0]),
    )

    def triton(values: list[Tensor], scale: float) -> Tensor:
        called.append("triton")
        return values[0] * scale

    try:
        monkeypatch.setattr(library, "launcher", lambda where: triton)
        monkeypatch.setattr(library, "_installed", lambda: True)
        op([torch.ones(2)], 2.0)
        monkeypatch.setattr(library, "TRITON_DEVICES", {"cpu"})
        assert torch.equal(op([torch.ones(2)], 2.0), torch.full((2,), 2.0))
        assert called == ["torch", "triton"]
    finally:
        del OPS["probe"]


def test_what_a_launcher_writes_to_has_a_new_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after any operation in place: of tensors in lists as well, and of no other."""
    op = define(
        "probe_(Tensor(a!)[] values, Tensor scale, Tensor(b!) state) -> ()",
        plain=lambda *_: None,
        triton="probe:probe_",
        fake=lambda *_: None,
    )
    try:
        monkeypatch.setattr(library, "launcher", lambda where: lambda *_: None)
        monkeypatch.setattr(library, "_installed", lambda: True)
        monkeypatch.setattr(library, "TRITON_DEVICES", {"cpu"})
        parameter, scale, state = torch.nn.Parameter(torch.ones(2)), torch.ones(1), torch.ones(1)
        op([parameter.detach()], scale, state=state)
        assert (parameter._version, scale._version, state._version) == (1, 0, 1)
        with torch.inference_mode():
            op([torch.ones(2)], scale, state)
    finally:
        del OPS["probe_"], library.LAUNCHERS["probe_"]


def test_triton_is_imported_late() -> None:
    code = "import sys, sft, sft.kernels.library; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
