"""What the entries of a KV head have to reproduce."""

from dataclasses import dataclass

import torch

from ..state import State, exact_state, merge


@dataclass
class Target:
    """Live queries, their exact states over the prefix, and their states over the live tokens before them.

    Float32, with the KV heads as a first dimension or, from head(), without it.
    """

    q: torch.Tensor  # [n_head_kv, n, d_k], after RoPE, in the order of transformers
    o: torch.Tensor  # [n_head_kv, n, d_v]
    lse: torch.Tensor  # [n_head_kv, n]
    live_o: torch.Tensor  # [n_head_kv, n, d_v]
    live_lse: torch.Tensor  # [n_head_kv, n]

    def head(self, h: int) -> "Target":
        return Target(*(x[h] for x in vars(self).values()))

    def __getitem__(self, rows) -> "Target":
        """Some of the queries of one head."""
        return Target(*(x[rows] for x in vars(self).values()))

    def __len__(self) -> int:
        """Queries of one head."""
        return len(self.q)

    def thinned(self, n: int) -> "Target":
        """At most n of the queries of one head, from all over them."""
        return self[:: -(-len(self) // n)]

    @property
    def share(self) -> torch.Tensor:
        """The share of its attention that a query pays to the prefix: errors count by its square. [n]"""
        return torch.sigmoid(self.lse - self.live_lse)

    def output(self) -> torch.Tensor:
        """What the head gives to the model, [n, d_v]."""
        return merge((self.o, self.lse), (self.live_o, self.live_lse))[0]

    def error(self, state: State) -> torch.Tensor:
        """What the output is off by with another state (o [n, d_v], lse [n]) for the prefix: [n, d_v]."""
        return merge(state, (self.live_o, self.live_lse))[0] - self.output()


def segment_targets(target: Target, k: torch.Tensor, v: torch.Tensor, offset: list[int], scale: float) -> list[Target]:
    """The target of each segment of a prefix with keys k [n_head_kv, P, d_k] and values v: the other segments count as live.

    offset: segment s holds the tokens offset[s]:offset[s + 1]. Each segment is then fitted as if it were the prefix, and
    none depends on how the others are.
    """
    if len(offset) == 2:
        return [target]
    states = [exact_state(target.q, k[:, a:b], v[:, a:b], scale) for a, b in zip(offset, offset[1:])]
    found = []
    for s, state in enumerate(states):
        others = (target.live_o, target.live_lse)
        for other in states[:s] + states[s + 1 :]:
            others = merge(others, other)
        found.append(Target(target.q, *state, *others))
    return found
