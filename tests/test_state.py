"""Merge laws of attention states, as properties."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from attnmem_local.builder.state import causal_state, exact_state, merge

EMPTY = torch.zeros(3, 4, dtype=torch.float64), torch.full((3,), -torch.inf, dtype=torch.float64)


def states(lse):
    return st.builds(
        lambda seed, x: (
            torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),
            torch.tensor(x, dtype=torch.float64),
        ),
        st.integers(0, 2**31),
        st.lists(lse, min_size=3, max_size=3),
    )


some = states(st.one_of(st.floats(-300, 300), st.just(-torch.inf))).map(
    lambda s: (torch.where(s[1][:, None] == -torch.inf, torch.zeros_like(s[0]), s[0]), s[1])
)


def same(a, b):
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(a, b))


@given(some, some)
def test_merge_is_commutative(a, b):
    assert same(merge(a, b), merge(b, a))


@given(some, some, some)
def test_merge_is_associative(a, b, c):
    assert same(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(some)
def test_the_empty_state_is_the_identity(a):
    assert same(merge(a, EMPTY), a)


def test_two_empty_states_merge_to_zeros():
    o, lse = merge(EMPTY, EMPTY)
    assert (o == 0).all() and (lse == -torch.inf).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16))
def test_states_of_parts_merge_to_the_state_of_the_whole(n_a, n_b, block):
    g = torch.Generator().manual_seed(n_a * 100 + n_b)
    q, k, v = (torch.randn(n, 8, dtype=torch.float64, generator=g) for n in (5, n_a + n_b, n_a + n_b))
    whole = torch.softmax(q @ k.T / 8, dim=-1) @ v, (q @ k.T / 8).logsumexp(-1)
    assert same(exact_state(q, k, v, 1 / 8, block), whole)
    parts = [exact_state(q, k[s], v[s], 1 / 8) for s in (slice(n_a), slice(n_a, None))]
    assert same(merge(*parts), whole)


def test_causal_state_sees_no_future():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 8, dtype=torch.float64, generator=g) for n in (4, 10, 10))
    o, lse = causal_state(q, k, v, 0.3)
    for i in range(4):
        o_i, lse_i = exact_state(q[i : i + 1], k[: 7 + i], v[: 7 + i], 0.3)
        assert same((o[i : i + 1], lse[i : i + 1]), (o_i, lse_i))
