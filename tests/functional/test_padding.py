"""Padding of leaves: zeros stand behind each block, and what has numbers comes back."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchgraft.functional.extending import cut_to, pad_to, view_of_part

sizes = st.integers(1, 4).flatmap(lambda most: st.tuples(st.integers(1, most), st.just(most)))
axes = st.lists(sizes, min_size=1, max_size=3)


@given(axes, st.integers(1, 3), st.integers(0, 2))
def test_each_block_is_padded_by_itself(axes: list[tuple[int, int]], blocks: int, stacked: int) -> None:
    (own, most), *others = axes
    shape = blocks * own, *(short for short, _ in others)
    room = blocks * most, *(long for _, long in others)
    leaf = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)
    padded = pad_to(leaf, room, blocks)
    expected = torch.zeros(room, dtype=torch.long)
    for place in itertools.product(*map(range, shape)):
        block, rank = divmod(place[0], own)
        expected[block * most + rank, *place[1:]] = leaf[place]
    assert torch.equal(padded, expected)
    assert torch.equal(cut_to(padded, shape, blocks), leaf)
    many = torch.stack([padded] * stacked) if stacked else padded.clone()
    view_of_part(many, shape, blocks).neg_()
    assert torch.equal(many, -expected.expand_as(many))
    assert torch.equal(cut_to(many, shape, blocks), -leaf.expand(*many.shape[: many.ndim - leaf.ndim], *shape))
