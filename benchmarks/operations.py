"""Kinds of operation that a profile is summed up by."""

from __future__ import annotations

from collections import Counter

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_addmm_activation"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "loss": (
        "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward",
    ),
    "sparse gradients": ("sparse_sampled_addmm", "sampled_outer", "tiled_outer"),
    "reading and writing positions": (
        "index_select", "index_copy_", "index_put_", "_index_put_impl_", "index", "index_add_",
        "scatter_add", "scatter_add_", "gather", "write_", "take", "put_", "embedding",
        "embedding_dense_backward",
    ),
    "copies": ("copy_", "cat", "clone", "_to_copy", "fill_", "zero_", "_foreach_copy_"),
    "optimizer": ("_fused_adamw_", "sparse_adamw_", "sparse_adamw"),
    "ranking": ("topk", "sort", "kthvalue", "nonzero", "bincount", "masked_select", "searchsorted"),
}  # fmt: skip
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
REST = "elementwise and the rest"


def by_kind(times: dict[str, float]) -> Counter[str]:
    """Add the milliseconds of operations up by kind."""
    kinds: Counter[str] = Counter()
    for name, ms in times.items():
        kinds["python" if name == "python" else _KIND_OF.get(name, REST)] += ms
    return kinds
