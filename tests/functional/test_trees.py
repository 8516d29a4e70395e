"""Trees of any shape: stacking and back, and what a check lets through."""

import copy

import hypothesis.strategies as st
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given

from torchgraft.functional import stack, unstack
from torchgraft.functional._trees import check_tree, sort

keys = st.text("abc.01", min_size=1, max_size=4)
shapes = st.dictionaries(
    keys,
    st.dictionaries(keys, st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)


def filled(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: {name: torch.randn(shape, generator=generator) for name, shape in leaves.items()}
        for path, leaves in shapes.items()
    }


@given(shapes, st.integers(1, 4))
def test_unstack_undoes_stack(shapes, count):
    trees = [filled(shapes, seed) for seed in range(count)]
    back = unstack(stack(trees))
    assert len(back) == count
    for tree, own in zip(trees, back, strict=True):
        assert pytree.tree_all(lambda x: x, pytree.tree_map(torch.equal, sort(tree), own))
        assert list(own) == sorted(own) and all(list(leaves) == sorted(leaves) for leaves in own.values())


@given(shapes, st.data())
def test_a_tree_fits_its_own_shapes_and_no_others(shapes, data):
    tree = filled(shapes, 0)
    check_tree(tree, shapes)
    path = data.draw(st.sampled_from(sorted(tree)))
    name = data.draw(st.sampled_from(sorted(tree[path])))
    wrong = copy.deepcopy(tree)
    change = data.draw(st.sampled_from(["leaf gone", "leaf new", "site gone", "site new", "shape", "none", "renamed"]))
    if change == "leaf gone":
        del wrong[path][name]
    elif change == "leaf new":
        wrong[path]["unknown leaf"] = torch.ones(1)
    elif change == "site gone":
        del wrong[path]
    elif change == "site new":
        wrong["unknown site"] = {}
    elif change == "shape":
        wrong[path][name] = wrong[path][name][None]
    elif change == "none":
        wrong[path][name] = None
    else:
        wrong["unknown site"] = wrong.pop(path)
    with pytest.raises((KeyError, TypeError, ValueError)) as caught:
        check_tree(wrong, shapes)
    expected = "unknown" if "new" in change or change == "renamed" else path
    assert expected in str(caught.value) or repr(expected)[1:-1] in str(caught.value)
