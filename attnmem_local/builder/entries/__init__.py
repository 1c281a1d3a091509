"""Entry kinds, one file each, in the order in which a KV head is fitted: each kind fits what those before it leave.

A new kind is one more file and one more line here; memory/entries.py lists how the file stores each kind.
"""

from .anchor import Anchor
from .centroid import Centroid
from .kind import EntryKind
from .residual import Residual
from .tangent import Tangent
from .token import REST, Token, looked_up

KINDS: tuple[EntryKind, ...] = (Centroid(), Tangent(), Token(), Anchor(), Residual())


def counts(n_anchors: int, n_entries: int, n_tokens: int, table: str = "centroid") -> dict[str, int]:
    """The entries of each kind in a KV head, from its number of anchors and of looked-up entries in a plan.

    A head with as many anchors as its segment has tokens is exact: it keeps every key. Tables then have nothing to correct,
    unless the prefix is so long that its keys are looked up themselves. table: the kind that is looked up without anchors.
    """
    if n_anchors >= n_tokens and not looked_up(n_tokens):
        return {"anchor": n_tokens}
    if n_anchors >= n_tokens:
        return {"token": n_tokens, "anchor": REST, "residual": n_entries}
    return {"anchor": n_anchors, "residual": n_entries} if n_anchors else {table: n_entries}
