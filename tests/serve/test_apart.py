"""Attention of steps of one token a request, against each request alone in fp64."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("fastapi")
from t2kernels.serve.engine.apart import PADDING, as_bias, attend, fits, spread


def request(length, tokens=1):
    return SimpleNamespace(query_length=tokens, state=SimpleNamespace(position_offset=length))


def test_only_steps_of_one_token_with_keys_and_of_similar_lengths_are_computed_apart():
    assert fits([request(n) for n in (1, 5, 9)])
    assert not fits([request(5), request(5, 2)])
    assert not fits([request(5), request(0)])  # its only key would be that of its own token
    assert fits([request(5)])
    many = [request(1) for _ in range(99)]
    assert fits([*many, request(4)])
    assert not fits([*many, request(99 * PADDING)])


def test_keys_lie_in_a_row_for_each_request_and_the_last_is_there_once():
    read = torch.tensor([7, 3, 5, 8, 9, 2])  # 8, and of requests of 3, 1 and 2 keys
    places, seen = spread(read, torch.tensor([0, 3, 4, 6], dtype=torch.int32), 3)
    assert places.view(3, 3).tolist() == [[7, 3, 5], [8, 8, 8], [9, 2, 9]]
    assert seen.tolist() == [[True] * 3, [True, False, False], [True, True, False]]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [[3], [5, 1, 9], [2, 2, 2, 2]])
def test_each_request_attends_to_its_own_keys(heads, kv_heads, lengths):
    torch.manual_seed(0)
    B, D, cached = len(lengths), 8, 40
    keys, values = torch.randn(2, cached, kv_heads, D)
    query = torch.randn(1, heads, B, D)
    read = torch.randperm(cached)[: sum(lengths)]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    places, seen = spread(read, ends, max(lengths))
    unread = torch.ones(cached, dtype=torch.bool)
    unread[read] = False
    keys[unread] = values[unread] = float("nan")  # nothing but the request's own is looked at
    given = (t[places].transpose(0, 1)[None] for t in (keys, values))  # as the cache gives them
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
    got, _ = attend(module, query, *given, as_bias(seen, torch.float32), scaling=0.3, is_causal=False)
    assert got.shape == (1, B, heads, D)
    for b, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        for h in range(heads):
            own = read[start:end]
            k, v = (t[own, h // (heads // kv_heads)].double() for t in (keys, values))
            wanted = torch.softmax(0.3 * k @ query[0, h, b].double(), 0) @ v
            torch.testing.assert_close(got[0, b, h].double(), wanted, rtol=1e-5, atol=1e-6)


def test_keys_of_another_request_that_are_not_finite_are_not_seen():
    keys, values = torch.randn(2, 1, 4, 8)
    query, ends = torch.randn(1, 1, 2, 8), torch.tensor([0, 2, 4], dtype=torch.int32)
    places, seen = spread(torch.arange(4), ends, 2)
    module, bias = SimpleNamespace(num_key_value_groups=1, is_causal=True), as_bias(seen, torch.float32)

    def first():
        return attend(module, query, keys[None][:, :, places], values[None][:, :, places], bias, is_causal=False)[0][
            0, 0
        ]

    wanted = first()
    keys[:, 2:] = values[:, 2:] = float("nan")
    assert torch.equal(first(), wanted)
    assert wanted.isfinite().all()
