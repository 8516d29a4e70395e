"""Routing: one batch, many adapters, each row with its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._layers.routed import RoutedLayer
from .._locating.finder import Declared, Finder
from .._messages import given_type
from .._method import SiteAdapter, Tree
from .._places import Places
from .._rows import Rows, is_readable, rows_of
from .._trees import check_tree

_NOTHING = Declared()


class Routed:
    """A stacked tree and the adapter of each row: what `route` makes, given to a call in place of a tree.

    Attributes:
        tree: The stacked tree.
        rows: Which adapter each row uses.
        members: Which adapters of the bound stack the leading axis holds, for grafts of several configs.
        declared: What the user said of where rows are.
        check_all: Whether each call proves where its rows are, on all of them.
        places: What is in each place of the stack beside its leaves, where it is not what was bound.
        picked: Parts of leaves that sites share, as one call's groups of rows have them.
    """

    per_row = True

    __slots__ = ("_source", "check_all", "declared", "members", "picked", "places", "rows", "tree")

    def __init__(
        self,
        tree: Tree,
        rows: Rows,
        members: Tensor | None = None,
        declared: Declared = _NOTHING,
        check_all: bool = False,
        source: Tensor | None = None,
        places: Places | None = None,
    ):
        self.tree, self.rows, self.members, self.declared, self.check_all = tree, rows, members, declared, check_all
        self._source, self.places = source, places
        self.picked: dict[Any, Any] = {}

    @property
    def tokens(self) -> int:
        """How many tokens of a row have adapters of their own; 1 where the row has one adapter."""
        return self.rows.tokens or 1

    @property
    def batch(self) -> int:
        """How many rows the batch has."""
        return self.rows.size // self.tokens

    def named(self, name: str) -> Routed:
        """Return the part of one named adapter, over the same rows."""
        return self.with_tree(self.tree[name])

    def with_tree(self, tree: Tree) -> Routed:
        """Return another stacked tree, over the same rows."""
        return self._with(tree, self.rows)

    def now(self) -> Routed:
        """Return the same stack with the rows that the user's tensor has now, which may have been written to."""
        source = self._source
        if source is None:
            return self
        if torch.compiler.is_compiling() or not is_readable(source):
            rows = _placed(source, next(_leaves(self.tree)))
            return self._with(self.tree, Rows(rows, self.rows.count, tokens=self.rows.tokens))
        values = source.flatten().tolist()
        if values != self.rows.values:
            self.rows = rows_of(values, self.rows.count, next(_leaves(self.tree)).device, self.rows.tokens)
        return self._with(self.tree, self.rows)

    def single(self, adapter: int | Tensor) -> Routed:
        """Return the same stack where all rows have one adapter, given by its number or as a vector of it."""
        leaf, count = next(_leaves(self.tree)), self.rows.count
        if isinstance(adapter, Tensor):
            return self._with(self.tree, Rows(_placed(adapter, leaf), count, noise=self.rows.noise))
        return self._with(self.tree, rows_of([adapter], count, leaf.device, noise=self.rows.noise))

    def _with(self, tree: Tree, rows: Rows) -> Routed:
        return type(self)(tree, rows, self.members, self.declared, self.check_all, self._source, self.places)

    def check(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], what: str) -> None:
        """Validate the stack against the shapes of one adapter, as `trees.check` does."""
        check_tree(self.tree, shapes, what, stacked=self.rows.count)

    def along(self, adapter: SiteAdapter, rows: Rows) -> tuple[SiteAdapter, Rows]:
        """Return a site's part for this stack: constants as its members have them, and rows that have the site."""
        return adapter.along(self.members, rows, self.places)

    def layer(self, below: Any, adapter: SiteAdapter, finder: Finder | None) -> RoutedLayer:
        """Return the layer that a site gets."""
        adapter, rows = self.along(adapter, self.rows)
        leaves = adapter.leaves(self.tree)
        return RoutedLayer(below, adapter, leaves, rows, finder, self, self.declared, self.tokens)

    def tensors(self) -> Any:
        """Return all tensors that a call depends on."""
        held = None if self.places is None else (dict(self.places.constants), dict(self.places.present))
        return self.tree, self.rows.index, self.members, held

    def __repr__(self) -> str:
        said = [f"{name}={value!r}" for name, value in vars(self.declared).items() if value not in (None, ())]
        declared = f", declared: {', '.join(said)}" if said else ""
        each = f" of {self.rows.tokens} tokens" if self.rows.tokens else ""
        return f"Routed({self.rows.count} adapters, {self.batch} rows{each}{declared})"


def route(
    stacked: Tree,
    rows: Tensor | Sequence[Any] | None = None,
    *,
    batch_dim: int | Mapping[str, int] | None = None,
    tokens_dim: int | Mapping[str, int] | None = None,
    mixed: Sequence[str] = (),
    check: bool = False,
    members: Tensor | None = None,
    places: Places | None = None,
) -> Routed:
    """Give each row of a batch its own adapter: `graft(route(many, rows), x)`.

    Row `i` of the output is row `i` of `graft(unstack(many)[rows[i]], x)`, differentiable in the stack. The base sees
    the whole batch at once, and so do its attention kernels. Works wherever a tree does: in calls, views and as one
    of several named adapters; make it inside the function that is differentiated.

    The batch is the leading axis of the model's inputs. Inside the model it may be anywhere, and folded. Where it is
    is found out and proved at the first call of a kind (the module that is entered, the arguments given and their
    numbers of axes, modes, whether a cache is filled), on three rows of its inputs: two runs of the base tell where
    rows are at each site, and five with random adapters prove, at each site and in each output, that a row's own
    adapter is what it gets. A model that reorders, selects or mixes its rows is an error that names the first site or
    output that does not follow them. User hooks run in these runs, on copies; dropout is off in them. What begins
    above three rows (an order, a coupling) is not seen: `check=True` proves each call on all of its rows, and
    `torch.vmap` over the stack is the general way. `torch.compile`, `torch.vmap` and export cannot look: there, what
    an earlier call or `graft.look` saw counts, or what is declared, or it is an error. Under collectives, each rank
    has to make the same first calls.

    With `rows` of shape `(batch, tokens)`, token `j` of row `i` meets adapter `rows[i, j]` in every adapted layer: for
    several documents packed into one row, or a prompt and its answer. What the model does between the layers stays as
    it is; documents that shall not see each other are the business of its attention mask. Adapters have to be on
    layers that work token by token, linear ones and embeddings. Where the tokens are is found out and proved as well,
    by what reaches each site when some of them change (`functional/ROWS.md`); a model that reorders, drops or adds
    tokens on the way is an error.
    A module with adapted parameters (`target_parameters`, experts) runs once for each adapter that rows have, on these;
    experts that run as a grouped product run once for all rows.

    Values of `rows` are looked at in each call, outside of `torch.compile` (rows on a GPU are waited for), to choose
    the fastest way: equal runs of one adapter are one batched product. `rows=None` says so without looking.

    Args:
        stacked: A tree made by `stack`, leaves `"N ..."`.
        rows: `"batch"`, long: the adapter of each row, in any order; `-1` is the base alone, bit for bit. A model
            that repeats rows inside (beams, windows) has each one `k` times in succession. `None`: the batch is `N`
            equal parts, one for each adapter in order. What is written to the tensor later is what the next call uses.
            Or `"batch tokens"`: the adapter of each token. Lists of indices are taken too.
        batch_dim: Declares the axis of every site's input that has the batch, or of the sites at some paths. With one
            for every site nothing is looked at or proved.
        tokens_dim: The same of the tokens, where `rows` has some: the axis that has them, or that of the batch where
            both are folded into one. Then `batch_dim` has to be declared too, or nothing is spared.
        mixed: Declares outputs in which rows meet by design, by the names that the error has for them (`"loss"`): they
            are not checked against anything.
        check: Prove each call, on all of its rows, and wherever one changes adapters between tokens; takes eight times
            as long, and longer with tokens.
        members: `"N"`, long: which of the configs of `bind(model, [...])` the leading axis holds, where it is not all
            of them in order.
        places: What is in each place of the stack beside its leaves, where it is not what `bind(model, [...])` was
            given: `graft.places([...])`, and `put`, which changes one of them without binding again.

    Raises:
        TypeError, ValueError: Rows that are no integers with one axis or two, or out of range; a stack without leaves.

    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind, stack, unstack
    >>> graft = bind(torch.nn.Linear(4, 3), LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    >>> many, x = stack([graft.init(), graft.init()]), torch.randn(3, 4)
    >>> y = graft(route(many, torch.tensor([1, -1, 0])), x)
    >>> torch.allclose(y[0], graft(unstack(many)[1], x)[0]), torch.equal(y[1], graft.model(x)[1])
    (True, True)
    >>> packed = torch.randn(1, 5, 4)  # three tokens of one document, then two of another
    >>> y = graft(route(many, torch.tensor([[0, 0, 0, 1, 1]])), packed)
    >>> torch.allclose(y[:, 3:], graft(unstack(many)[1], packed[:, 3:]))
    True
    """
    _check_stack(stacked, rows)
    leaf = next(_leaves(stacked), None)
    if leaf is None or leaf.ndim == 0 or len(leaf) == 0:
        raise ValueError("route: the stacked tree has no leaves with a leading axis; make it with stack([tree, ...])")
    declared = _declared(batch_dim, tokens_dim, mixed)
    if places is not None and not isinstance(places, Places):
        raise TypeError(f"route: places is of type {type(places).__name__}, expected what graft.places() returns")
    if places is not None and len(places) != len(leaf):
        raise ValueError(
            f"route: the stack has {len(leaf)} adapters, and places of it are given for {len(places)}; give one for "
            "each"
        )
    if members is not None and not isinstance(members, Tensor):
        raise TypeError(f"route: members is {given_type(members)}, expected a tensor: torch.tensor(members)")
    if rows is None:
        return Routed(stacked, Rows(None, len(leaf)), members, declared, check, None, places)
    rows = _checked(rows)
    tokens = rows.shape[1] if rows.ndim == 2 else None
    if not torch.compiler.is_compiling() and is_readable(rows):
        adapter_rows = rows_of(rows.flatten().tolist(), len(leaf), leaf.device, tokens)
    else:
        adapter_rows = Rows(_placed(rows, leaf), len(leaf), tokens=tokens)
    if torch.compiler.is_compiling():
        index: Any = adapter_rows.index
        torch._assert_async(
            ((index >= -1) & (index < len(leaf))).all(),
            f"route: a row's index is outside of -1 to {len(leaf) - 1}, the {len(leaf)} adapters in the stack",
        )
    return Routed(stacked, adapter_rows, members, declared, check, rows, places)


def _checked(rows: Any) -> Tensor:
    """Return the rows that the user gave as a tensor."""
    if isinstance(rows, (list, tuple)):
        if any(isinstance(row, str) for row in rows):
            raise TypeError(
                "route: rows has names, expected numbers: the adapters of a stack are numbered, in the order in which "
                "it was made; a graft that was bound with names= has rows for them: graft.rows(names)"
            )
        if any(row is None for row in rows):
            raise TypeError("route: rows has None, expected -1 for the base alone; graft.rows(names) takes None")
        try:
            rows = torch.tensor(rows)
        except (TypeError, ValueError) as error:
            raise TypeError(f"route: rows is a list that is no tensor: {error}") from error
    if not isinstance(rows, Tensor):
        raise TypeError(f"route: rows is {given_type(rows)}, expected a tensor{_as_tensor(rows)}")
    if rows.numel() == 0:
        raise ValueError("route: rows is empty, expected one index for each row of the batch, or for each token")
    if rows.ndim not in (1, 2) or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"route: rows has shape {tuple(rows.shape)} and dtype {rows.dtype}, expected one long index for each row "
            f"of the batch, shape (batch,), or for each of its tokens, shape (batch, tokens){_as_indices(rows)}"
        )
    return rows


def _check_stack(stacked: Any, rows: Any) -> None:
    if isinstance(stacked, Tensor) and isinstance(rows, Mapping):
        raise TypeError("route: the arguments are swapped, expected route(stacked, rows)")
    if isinstance(stacked, (list, tuple)):
        raise TypeError(
            f"route: got a {type(stacked).__name__}, expected a stacked tree; make one of a list of trees: "
            "route(stack(trees), rows)"
        )


def _as_tensor(rows: Any) -> str:
    """Return what to write for rows that are no tensor."""
    return f": torch.full((batch,), {rows})" if isinstance(rows, int) else ": torch.tensor(rows)"


def _as_indices(rows: Tensor) -> str:
    """Return what to write for rows of another kind."""
    if rows.dtype == torch.bool:
        return "; a mask of rows is no index: torch.where(mask, 0, -1) gives those of the mask adapter 0"
    if rows.ndim in (1, 2):
        return "; rows.long(), if they are whole numbers"
    return "" if rows.ndim else "; rows.expand(batch) is one for all"


def _placed(rows: Tensor, leaf: Tensor) -> Tensor:
    return rows.flatten().to(leaf.device, torch.long)


def _declared(batch_dim: Any, tokens_dim: Any, mixed: Any) -> Declared:
    if isinstance(mixed, str) or not all(isinstance(name, str) for name in mixed):
        raise TypeError(f"route: mixed is {mixed!r}, expected a list of names of outputs, as ['loss']")
    for name, given in (("batch_dim", batch_dim), ("tokens_dim", tokens_dim)):
        axes = [*given.values()] if isinstance(given, Mapping) else [given]
        if any(not isinstance(axis, int) or isinstance(axis, bool) for axis in axes if given is not None):
            raise TypeError(f"route: {name} is {given!r}, expected an axis, or axes by path: {{'layers.0.q': 1}}")
    return Declared(batch_dim, tokens_dim, tuple(mixed))


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    else:
        raise TypeError(
            f"route: got a {type(tree).__name__} among the stacked tree's leaves, expected nested dicts of tensors, as "
            "stack makes them"
        )
