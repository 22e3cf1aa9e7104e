"""Forms for models of unknown families: attention by its names, feed-forward by its shapes."""

from __future__ import annotations

from dataclasses import dataclass

from sft.adapters.structure.attention import separate_groups
from sft.adapters.structure.feed_forward import FeedForward
from sft.adapters.structure.groups import CoupledGroup
from sft.adapters.structure.layout import Site, head_size, matrix

# Words in a matrix's name that say nothing about its role.
FILLERS = {"proj", "projection", "lin", "linear", "layer", "fc", "attn", "to", "w"}
WORDS = {
    "q": {"q", "query", "queries", "wq"},
    "k": {"k", "key", "keys", "wk"},
    "v": {"v", "value", "values", "wv"},
    "o": {"o", "out", "output", "wo", "dense"},
}
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead")


@dataclass(frozen=True)
class AttentionByName:
    """Four matrices, children of one module, whose names say q, k, v and o."""

    def groups(self, site: Site) -> list[CoupledGroup]:
        """Return the groups of a module with exactly one matrix for each role."""
        names = {role: _children_named(site, words) for role, words in WORDS.items()}
        if any(len(found) != 1 for found in names.values()):
            return []
        q, k, v, o = (matrix(site, names[role][0]) for role in "qkvo")
        if q is None or k is None or v is None or o is None:
            return []
        size = head_size(site, names["q"][0]) or _size_by_count(site, q.outputs)
        return separate_groups(site, (q, k, v, o), size) if size else []


@dataclass(frozen=True)
class FeedForwardByShape:
    """Two or three matrices, children of one module: all but one (d -> k), the last (k -> d)."""

    def groups(self, site: Site) -> list[CoupledGroup]:
        """Return the channels of a module of this form whose names don't say attention."""
        names = [name for name in site.module._modules if matrix(site, name) is not None]
        if len(names) not in (2, 3) or _children_named(site, WORDS["q"] | WORDS["k"]):
            return []
        for name in reversed(names):
            others = [other for other in names if other != name]
            if all(_mirror(site, other, name) for other in others):
                gate = others[0] if len(others) == 2 else ""
                return FeedForward(others[-1], name, gate=gate).groups(site)
        return []


ATTENTION_BY_NAME = AttentionByName()
FEED_FORWARD_BY_SHAPE = FeedForwardByShape()


def _mirror(site: Site, up: str, down: str) -> bool:
    """Tell whether one matrix maps (d -> k) and the other (k -> d)."""
    first, last = matrix(site, up), matrix(site, down)
    assert first is not None and last is not None
    return (first.inputs, first.outputs) == (last.outputs, last.inputs)


def _children_named(site: Site, words: set[str]) -> list[str]:
    """Return the children whose name, without its fillers, is one of these words."""
    return [name for name in site.module._modules if _core(name) in words]


def _core(name: str) -> str:
    parts = [part for part in name.lower().split("_") if part not in FILLERS]
    return "_".join(parts)


def _size_by_count(site: Site, width: int) -> int | None:
    """Return the width of the queries over the number of heads, where that is stated."""
    for name in HEAD_COUNTS:
        for holder in (site.module, site.config):
            count = getattr(holder, name, None)
            if isinstance(count, int) and count > 0 and width % count == 0:
                return width // count
    return None
