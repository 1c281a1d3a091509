"""Running the model with the prefix outside of its context: the prefix at positions −P … −1, live tokens from 0.

attention.py replaces the attention of the transformers model. It asks a session for the state of what lies before the live
tokens and merges it with causal attention over them. Sessions differ in where that state comes from.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .attention import Session
from .entries.target import Target
from .model import BuildModel
from .state import State, exact_state


@dataclass
class PrefixKV:
    """The keys and values of a prefix after RoPE at positions −P … −1, in the order of transformers."""

    k: list[torch.Tensor] = field(default_factory=list)  # per layer [n_head_kv, P, d_k] float32
    v: list[torch.Tensor] = field(default_factory=list)  # per layer [n_head_kv, P, d_v] float32

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keys and values [n_head_kv, n, d] of the next n tokens."""
        if layer == len(self.k):
            self.k.append(k)
            self.v.append(v)
        else:
            self.k[layer] = torch.cat((self.k[layer], k), dim=1)
            self.v[layer] = torch.cat((self.v[layer], v), dim=1)

    def state(self, layer: int, q: torch.Tensor, scale: float) -> State:
        """The exact state of queries q [batch, n_head_kv, n_q, d_k]."""
        batch = len(q)
        q = q.transpose(0, 1).flatten(1, 2)  # the batch shares the prefix: one matrix product per KV head
        return tuple(x.unflatten(1, (batch, -1)).transpose(0, 1) for x in exact_state(q, self.k[layer], self.v[layer], scale))


class _Prefill:
    """A session that runs the prefix itself, chunk by chunk, and keeps its keys and values."""

    hidden: torch.Tensor | None = None

    def __init__(self, kv: PrefixKV):
        self.kv = kv

    def live(self, layer, k, v):
        self.chunk = k, v
        return k, v

    def past(self, layer, q, scale, live):
        state = self.kv.state(layer, q, scale) if layer < len(self.kv.k) else None
        self.kv.append(layer, *(x[0].float() for x in self.chunk))  # after the state: a chunk is not its own past
        return state


class Live:
    """A session that runs live tokens after a prefix.

    past_state(layer, q, scale): the state of the prefix, such as PrefixKV.state. Without it nothing precedes the tokens.
    """

    hidden: torch.Tensor | None = None

    def __init__(self, past_state: Callable[[int, torch.Tensor, float], State] | None):
        self.past_state = past_state
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.n_tokens = 0

    def past(self, layer, q, scale, live):
        return None if self.past_state is None else self.past_state(layer, q, scale)

    def live(self, layer, k, v):
        if layer in self.cache:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.cache[layer], (k, v)))
        self.cache[layer] = k, v
        return k, v

    def run(self, model: BuildModel, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, n_tokens, n_vocab] of the next live tokens [batch, n_tokens]."""
        with torch.no_grad():
            logits = _forward(model, tokens, torch.arange(tokens.shape[1])[None] + self.n_tokens, self)
        self.n_tokens += tokens.shape[1]
        return logits


def _forward(model: BuildModel, tokens: torch.Tensor, positions: torch.Tensor, session: Session, **options) -> torch.Tensor:
    return model.module(
        input_ids=tokens.to(model.device), position_ids=positions.to(model.device), use_cache=False, session=session, **options
    ).logits


@torch.no_grad()
def prefill(model: BuildModel, tokens: list[int], chunk: int = 512, progress: Callable[[int], None] = lambda n: None) -> PrefixKV:
    """The keys and values of a prefix, computed in chunks so that memory stays bounded."""
    kv = PrefixKV()
    session = _Prefill(kv)
    for start in range(0, len(tokens), chunk):
        part = torch.tensor([tokens[start : start + chunk]])
        _forward(model, part, torch.arange(part.shape[1])[None] + start - len(tokens), session, logits_to_keep=1)
        progress(part.shape[1])
    return kv


class Packed:
    """A session that runs whole windows of live text after a prefix, all in one batch, layer by layer.

    windows: token sequences that each follow the prefix on their own. Short ones share a row and do not see each other.
    first: the position of the first token of each window, 0 by default. Starting a window later simulates a long chat. RoPE
    is relative, so attention among live tokens is unchanged; only attention to the prefix shifts.
    visit(layer, target): gets the queries of each layer and their exact states. The model goes on with the state that it
    returns (o [n_head_kv, n, d_v], lse [n_head_kv, n]), or with the exact one for None.
    """

    def __init__(
        self, kv: PrefixKV, windows: list[list[int]], visit: Callable[[int, Target], State | None], first: list[int] | None = None
    ):
        self.kv, self.visit = kv, visit
        rows = _pack([len(w) for w in windows])
        shape = len(rows), sum(len(windows[i]) for i in rows[0])
        self.tokens = torch.zeros(shape, dtype=torch.long)
        self.positions = torch.zeros(shape, dtype=torch.long)
        self.window = torch.full(shape, -1)  # the window of each token, −1 in the padding of a row
        for row, members in enumerate(rows):
            column = 0
            for i in members:
                cells = (row, slice(column, column + len(windows[i])))
                self.tokens[cells] = torch.tensor(windows[i])
                self.positions[cells] = torch.arange(len(windows[i])) + (first[i] if first else 0)
                self.window[cells] = i
                column += len(windows[i])
        later = torch.ones(shape[1], shape[1], dtype=torch.bool).triu(1)
        self.hidden: torch.Tensor | None = (later | (self.window[:, :, None] != self.window[:, None, :]))[:, None, None]

    def past(self, layer, q, scale, live):
        batch, _, n_q, _ = q.shape
        with torch.no_grad():  # sensitivity.py needs gradients only of what the model does with the states
            exact = self.kv.state(layer, q, scale)
            used = (self.window >= 0).to(q.device)[:, None].expand(batch, n_q // self.window.shape[1], -1).reshape(batch, n_q)
            target = Target(*(x.detach().transpose(0, 1)[:, used] for x in (q, *exact, *live)))
            if (state := self.visit(layer, target)) is None:
                return exact
            full = tuple(x.transpose(0, 1).contiguous() for x in exact)
            for x, new in zip(full, state):
                x[:, used] = new
            return tuple(x.transpose(0, 1) for x in full)

    def live(self, layer, k, v):
        return k, v

    def run(self, model: BuildModel, **options) -> torch.Tensor:
        """Logits [n_row, n_tokens, n_vocab] of all rows; see `tokens` and `window`."""
        if self.hidden is not None:
            self.hidden = self.hidden.to(model.device)  # once, not in every layer
        return _forward(model, self.tokens, self.positions, self, **options)


def spread(windows: list[list[int]], n_tokens: int) -> list[list[int]]:
    """Evenly spaced windows that together have about n_tokens."""
    n = min(len(windows), max(1, round(n_tokens * len(windows) / sum(map(len, windows)))))
    return [windows[i * len(windows) // n] for i in range(n)]


def _pack(lengths: list[int]) -> list[list[int]]:
    """Windows in rows as long as the longest window: first fit, longest first. The first row is full."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


@torch.no_grad()
def capture(model: BuildModel, kv: PrefixKV, windows: list[list[int]], first: list[int] | None = None) -> list[Target]:
    """The queries of every layer, with their exact states."""
    targets: list[Target] = []
    Packed(kv, windows, lambda layer, target: targets.append(target), first).run(model, logits_to_keep=1)
    return targets
