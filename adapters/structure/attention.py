"""Groups of an attention module: whole heads, and the dimensions that v and o share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from sft.adapters.structure.groups import CoupledGroup, IndexRule, Member
from sft.adapters.structure.layout import Matrix, Site, head_size, matrix

Layout = Literal["segments", "grouped"]
NORMS = (
    ("q_norm", "q"),
    ("k_norm", "k"),
    ("q_layernorm", "q"),
    ("k_layernorm", "k"),
)


def free(site: Site) -> str:
    """Heads may be exchanged: nothing outside the module is tied to a head's number."""
    del site
    return ""


@dataclass(frozen=True)
class Heads:
    """How many heads there are and how large they are."""

    queries: int
    key_values: int
    size: int
    value_size: int

    @property
    def rep(self) -> int:
        """Query heads of a key-value head."""
        return self.queries // self.key_values


@dataclass(frozen=True)
class Separate:
    """Attention with one matrix each for q, k, v and o.

    Args:
        q: path of the matrix in the attention module; likewise `k`, `v` and `o`.
        tied: says why heads can't change places in a given module, or "".
    """

    q: str
    k: str
    v: str
    o: str
    tied: Callable[[Site], str] = free

    def groups(self, site: Site) -> list[CoupledGroup]:
        """Return the heads and the v-o dimensions of a module that has these four matrices."""
        q, k, v, o = (matrix(site, name) for name in (self.q, self.k, self.v, self.o))
        size = head_size(site, self.q)
        if q is None or k is None or v is None or o is None or not size:
            return []
        return separate_groups(site, (q, k, v, o), size, self.tied(site))


@dataclass(frozen=True)
class Fused:
    """Attention with one matrix for q, k and v (or k and v), and one for o.

    Args:
        qkv: path of the fused matrix in the attention module.
        o: path of the consumer.
        layout: its output features: "segments" [all q | all k | all v], "grouped" [q..., k, v] for
            each key-value head in turn, or what a function of the module says.
        q: path of the matrix of the queries where the fused one holds only k and v.
        tied: says why heads can't change places in a given module, or "".
    """

    qkv: str
    o: str
    layout: Layout | Callable[[Site], Layout]
    q: str = ""
    tied: Callable[[Site], str] = free

    def groups(self, site: Site) -> list[CoupledGroup]:
        """Return the heads and the v-o dimensions of a module that has these matrices."""
        qkv, o = matrix(site, self.qkv), matrix(site, self.o)
        size = head_size(site, self.q or self.qkv)
        q = matrix(site, self.q) if self.q else qkv
        if qkv is None or o is None or q is None or not size:
            return []
        queries = o.inputs // size
        ahead = 0 if self.q else queries  # query heads inside the fused matrix
        key_values = (qkv.outputs // size - ahead) // 2
        if key_values < 1 or queries % key_values:
            return []
        if qkv.outputs != (ahead + 2 * key_values) * size or o.inputs != queries * size:
            return []
        heads = Heads(queries, key_values, size, size)
        layout = self.layout if isinstance(self.layout, str) else self.layout(site)
        rules = (segment_rules if layout == "segments" else grouped_rules)(heads, ahead)
        members = (
            q.producer("q", rules[0]),
            qkv.producer("k", rules[1], heads.rep),
            qkv.producer("v", rules[2], heads.rep),
            o.consumer("o", IndexRule(size=size, stride=size)),
        )
        return attention_groups(site, heads, members, self.tied(site))


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek): heads are rows of q (or q_b) and of kv_b.

    A head's rows of kv_b are [k without position, v]; the part of k with position is shared by
    all heads and stays.
    """

    q: str
    kv: str = "kv_b_proj"
    o: str = "o_proj"

    def groups(self, site: Site) -> list[CoupledGroup]:
        """Return the heads and the v-o dimensions of a module that has these matrices."""
        q, kv, o = (matrix(site, name) for name in (self.q, self.kv, self.o))
        sizes = [site.setting(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
        value = site.setting("v_head_dim")
        if q is None or kv is None or o is None or None in (*sizes, value):
            return []
        nope, query, pair = sizes[0], sum(sizes), sizes[0] + value
        heads = Heads(q.outputs // query, q.outputs // query, query, value)
        wide = (q.outputs, kv.outputs, o.inputs)
        if wide != tuple(heads.queries * size for size in (query, pair, value)):
            return []
        members = (
            q.producer("q", IndexRule(size=query, stride=query)),
            kv.producer("k", IndexRule(size=nope, stride=pair)),
            kv.producer("v", IndexRule(size=value, stride=pair, offset=nope)),
            o.consumer("o", IndexRule(size=value, stride=value)),
        )
        return attention_groups(site, heads, members, "")


def separate_groups(
    site: Site, matrices: tuple[Matrix, Matrix, Matrix, Matrix], size: int, tied: str = ""
) -> list[CoupledGroup]:
    """Return the groups of q, k, v and o with heads of `size`; none if their shapes don't agree."""
    q, k, v, o = matrices
    heads = Heads(q.outputs // size, max(1, k.outputs // size), size, size)
    wide = (q.outputs, k.outputs, v.outputs, o.inputs)
    many = (heads.queries, heads.key_values, heads.key_values, heads.queries)
    if wide != tuple(count * size for count in many) or heads.queries % heads.key_values:
        return []
    rule = IndexRule(size=size, stride=size)
    members = (
        q.producer("q", rule),
        k.producer("k", rule, heads.rep),
        v.producer("v", rule, heads.rep),
        o.consumer("o", rule),
    )
    return attention_groups(site, heads, members, tied)


def segment_rules(heads: Heads, ahead: int) -> tuple[IndexRule, IndexRule, IndexRule]:
    """Return the rules of q, k and v in [q q q q | k k | v v], `ahead` query heads in front."""
    rule = IndexRule(size=heads.size, stride=heads.size)
    first = ahead * heads.size
    second = first + heads.key_values * heads.size
    return rule, replace(rule, offset=first), replace(rule, offset=second)


def grouped_rules(heads: Heads, ahead: int) -> tuple[IndexRule, IndexRule, IndexRule]:
    """Return the rules of q, k and v in [q q k v | q q k v]; one query each: [q k v | q k v]."""
    assert ahead == heads.queries
    size, rep = heads.size, heads.rep
    block = (rep + 2) * size
    q = IndexRule(size=size, stride=size, per_block=rep, block_stride=block)
    k = IndexRule(size=size, stride=block, offset=rep * size)
    return q, k, replace(k, offset=(rep + 1) * size)


def attention_groups(
    site: Site, heads: Heads, members: tuple[Member, ...], tied: str
) -> list[CoupledGroup]:
    """Return the group of heads and the group of v-o dimensions of one attention module."""
    by_head = CoupledGroup(
        name=site.path,
        kind="heads",
        num_units=heads.queries,
        producers=members[:3],
        consumers=members[3:],
        side=side_tensors(site, heads),
        block_size=heads.rep,
        permutable=not tied,
        reason=tied,
    )
    return [by_head, value_channels(site, heads, members[2], members[3])]


def value_channels(site: Site, heads: Heads, v: Member, o: Member) -> CoupledGroup:
    """Return the group of v-o dimensions, from the rules of whole heads in v and o."""
    size = heads.value_size
    rows = IndexRule(
        size=1, stride=1, offset=v.rule.offset, per_block=size, block_stride=v.rule.stride
    )
    columns = IndexRule(
        size=heads.rep, step=size, stride=1, per_block=size, block_stride=heads.rep * size
    )
    return CoupledGroup(
        name=f"{site.path}:vo",
        kind="vo_channels",
        num_units=heads.key_values * size,
        producers=(replace(v, rule=rows, shared=1),),
        consumers=(replace(o, rule=columns),),
        block_size=size,
        blocks_move=False,
    )


def side_tensors(site: Site, heads: Heads) -> tuple[Member, ...]:
    """Return norm weights that differ from head to head, and attention sinks."""
    found: list[Member] = []
    for name, role in NORMS:
        module = site.child(name)
        shared = heads.rep if role == "k" else 1
        if module is not None:
            found += norm_tensors(site.full(name), module, heads, shared)
    sinks = getattr(site.module, "sinks", None)
    if isinstance(sinks, nn.Parameter):
        one = IndexRule(size=1, stride=1)
        found.append(_side(site.path, "sinks", heads.queries, one))
    return tuple(found)


def norm_tensors(path: str, norm: nn.Module, heads: Heads, shared: int) -> list[Member]:
    """Return the tensors of a norm of q or k that must move with the heads.

    A weight of one head's size is the same for all heads and stays. One of full width moves in
    blocks (OLMo2), one of shape (heads, size) by rows (Cohere), a list of norms by entries
    (StableLM).
    """
    count = heads.queries // shared
    one = IndexRule(size=1, stride=1)
    entries = norm._modules.get("norms")
    if isinstance(entries, nn.ModuleList) and len(entries) == count:
        names = [name for name, _ in entries[0].named_parameters(recurse=False)]
        return [_side(f"{path}.norms", name, count, one, shared, listed=True) for name in names]
    found = []
    for name, tensor in norm.named_parameters(recurse=False):
        rule = _rule_of(tensor, count, heads.size)
        if rule is not None:
            found.append(_side(path, name, tensor.shape[0], rule, shared))
    return found


def _rule_of(tensor: Tensor, count: int, size: int) -> IndexRule | None:
    """Return where heads lie in a norm's tensor, or None if all heads share it."""
    if tuple(tensor.shape) == (count, size):
        return IndexRule(size=1, stride=1)
    if tuple(tensor.shape) == (count * size,) and count > 1:
        return IndexRule(size=size, stride=size)
    return None


def _side(
    path: str, name: str, extent: int, rule: IndexRule, shared: int = 1, listed: bool = False
) -> Member:
    return Member(
        role="side",
        module=path,
        parameter=name,
        axis=0,
        extent=extent,
        rule=rule,
        shared=shared,
        listed=listed,
    )
