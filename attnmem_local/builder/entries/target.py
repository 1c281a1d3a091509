"""What the entries of a KV head have to reproduce."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from ..state import State, exact_state, merge


@dataclass
class Target:
    """Live queries, their exact states over the prefix, and their states over the live tokens before them.

    All float32. The KV heads are the first dimension; head() leaves it out.
    """

    q: torch.Tensor  # [n_head_kv, n, d_k], after RoPE, in the order of transformers
    o: torch.Tensor  # [n_head_kv, n, d_v]
    lse: torch.Tensor  # [n_head_kv, n]
    live_o: torch.Tensor  # [n_head_kv, n, d_v]
    live_lse: torch.Tensor  # [n_head_kv, n]

    def head(self, h: int) -> "Target":
        return Target(*(x[h] for x in vars(self).values()))

    def __getitem__(self, rows) -> "Target":
        """A selection of the queries of one head."""
        return Target(*(x[rows] for x in vars(self).values()))

    def __len__(self) -> int:
        """The number of queries of one head."""
        return len(self.q)

    def thinned(self, n: int) -> "Target":
        """At most n queries of one head, evenly spaced."""
        return self[:: -(-len(self) // n)]

    @property
    def prefix_mass(self) -> torch.Tensor:
        """The share [n] of its attention that a query pays to the prefix. Errors count by its square."""
        return torch.sigmoid(self.lse - self.live_lse)

    def output(self) -> torch.Tensor:
        """The output of the head: attention over prefix and live tokens, [n, d_v]."""
        return merge((self.o, self.lse), (self.live_o, self.live_lse))[0]

    def error(self, state: State) -> torch.Tensor:
        """The error [n, d_v] of the output if the prefix had another state (o [n, d_v], lse [n])."""
        return merge(state, (self.live_o, self.live_lse))[0] - self.output()


def segment_targets(target: Target, k: torch.Tensor, v: torch.Tensor, offset: list[int], scale: float) -> list[Target]:
    """The target of each segment of a prefix with keys k [n_head_kv, P, d_k] and values v: the other segments count as live.

    offset: segment s holds the tokens offset[s]:offset[s + 1]. So each segment is fitted as if it were the whole prefix,
    and no fit depends on that of another segment.
    """
    if len(offset) == 2:
        return [target]
    states = [exact_state(target.q, k[:, a:b], v[:, a:b], scale) for a, b in pairwise(offset)]
    targets = []
    for s, state in enumerate(states):
        others = (target.live_o, target.live_lse)
        for other in states[:s] + states[s + 1 :]:
            others = merge(others, other)
        targets.append(Target(target.q, *state, *others))
    return targets
