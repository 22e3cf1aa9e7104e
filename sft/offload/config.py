"""What is kept off the device."""

from __future__ import annotations

from dataclasses import dataclass

BASES = ("cpu", "disk")
OPTIMIZERS = ("cpu",)


@dataclass(frozen=True)
class OffloadConfig:
    """Keep frozen weights, or the optimizer's state, where there is more room.

    Args:
        base: the frozen weights of linear layers, embeddings and experts lie in memory ("cpu") or
            in files ("disk"), and come to the device while they are multiplied with. The output
            head stays.
        optimizer: "cpu" keeps moments and float32 copies of what is trained there, and steps there.
        folder: where files go; by default `offload` in the output folder.

    Raises:
        ValueError: a place is unknown, or nothing is offloaded.
    """

    base: str | None = None
    optimizer: str | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        for key, allowed in (("base", BASES), ("optimizer", OPTIMIZERS)):
            value = getattr(self, key)
            if value is not None and value not in allowed:
                raise ValueError(
                    f"offload.{key}: got {value!r}, allowed is one of {', '.join(allowed)}; leave "
                    "it out to offload nothing"
                )
        if self.base is None and self.optimizer is None:
            raise ValueError("offload: got neither base nor optimizer; name one, or leave it out")
        if self.folder is not None and self.base != "disk":
            raise ValueError(
                f"offload.folder: got {self.folder!r} with base={self.base!r}, which writes no "
                "files; set base to disk, or leave folder out"
            )
