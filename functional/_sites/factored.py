"""Weights with thin products added to them that are never multiplied out where the model only multiplies by them.

    W' = W + s L R,    so    x W' = x W + s (x L) R    and    W' x = W x + s L (R x)

`W'` is as large as `W`, for all experts of a mixture many times what one token needs; the right-hand sides are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensors import add_scaled, widen

FACTS = frozenset((
    "device", "dtype", "element_size", "dim", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_meta",
    "itemsize", "layout", "ndim", "numel", "shape", "size", "stride",
))  # fmt: skip
"""What a weight can be asked for that does not depend on its values."""


class Term(NamedTuple):
    """A product to be added: `scaling * left @ right`, `"... rows r"` and `"... r columns"`."""

    left: Tensor
    right: Tensor
    scaling: float | Tensor


class Factored:
    """An adapted parameter as a forward gets it: it acts like the dense tensor, `W + sum of s L R`.

    Products with it (`@`, `matmul`, `mm`, `bmm`, `addmm`, `baddbmm`, `F.linear`, `F.embedding`, `einsum` of two,
    grouped products) add the thin products to the base's. Transposing, indexing the leading axis and casting stay
    factored; whatever else is done with it sees the dense weight. It is no `torch.Tensor`, so that `torch.compile` and
    `torch.vmap` see tensors only.

    Args:
        weight: `"... rows columns"`, at least two axes.
        terms: The products, each with the leading axes of the weight, or fewer where it has fewer experts.

    >>> w = Factored(torch.ones(2, 3), (Term(torch.ones(2, 1), torch.ones(1, 3), 2.0),))
    >>> torch.ones(1, 2) @ w
    tensor([[6., 6., 6.]])
    >>> w.mT.shape, (w * 2).shape
    (torch.Size([3, 2]), torch.Size([2, 3]))
    """

    __slots__ = ("terms", "weight")

    def __init__(self, weight: Tensor, terms: Sequence[Term]):
        self.weight, self.terms = weight, tuple(terms)

    def dense(self) -> Tensor:
        """Multiply the weight out, summed in the widest dtype and rounded once."""
        wide, *_ = widen(self.weight, *(term.left for term in self.terms), *(term.right for term in self.terms))
        for left, right, scaling in self.terms:
            wide = add_scaled(wide, torch.matmul(*widen(left, right)), scaling)
        return wide.to(self.weight.dtype)

    def _map(self, weight: Tensor, change: Callable[[Term], Term]) -> Factored:
        return Factored(weight, [change(term) for term in self.terms])

    # -- what stays factored ---------------------------------------------------------------------------------------

    @property
    def mT(self) -> Factored:
        """The weight with its last two axes exchanged."""
        return self._map(self.weight.mT, lambda term: Term(term.right.mT, term.left.mT, term.scaling))

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Exchange two axes: factored where they are the last two, else dense."""
        n = self.weight.ndim
        if {dim0 % n, dim1 % n} == {n - 2, n - 1}:
            return self.mT
        return self.dense().transpose(dim0, dim1)

    swapaxes = swapdims = transpose

    def t(self) -> Any:
        """Transpose a matrix."""
        return self.mT if self.weight.ndim == 2 else self.dense().t()

    @property
    def T(self) -> Any:
        """The transpose of a matrix."""
        return self.mT if self.weight.ndim == 2 else self.dense().T

    def permute(self, *dims: Any) -> Any:
        """Permute the axes: factored where only the last two are exchanged, else dense."""
        order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        n = self.weight.ndim
        if [dim % n for dim in order] == [*range(n - 2), n - 1, n - 2]:
            return self.mT
        return self.dense().permute(*dims)

    def view(self, *shape: Any) -> Any:
        """Change the shape: factored where a matrix of stacked experts gets an axis for them, else dense."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if self.weight.ndim != 2 or len(sizes) != 3 or sizes[-1] != self.weight.shape[-1]:
            return self.dense().view(*shape)
        weight = self.weight.view(sizes)
        experts, rows = weight.shape[:2]
        terms = (
            Term(left.reshape(experts, rows, -1), right.expand(experts, *right.shape), scaling)
            for left, right, scaling in self.terms
        )
        return Factored(weight, tuple(terms))

    reshape = view

    def contiguous(self, **options: Any) -> Factored:
        """Return the same numbers, the weight's in one piece."""
        return self._map(self.weight.contiguous(**options), lambda term: term)

    def to(self, *args: Any, **kwargs: Any) -> Factored:
        """Return the weight in another dtype or on another device; its products keep their dtype."""
        weight = self.weight.to(*args, **kwargs)
        if weight is self.weight:
            return self
        here = weight.device
        return self._map(weight, lambda term: Term(term.left.to(here), term.right.to(here), term.scaling))

    def detach(self) -> Factored:
        """Return the same weight without gradients."""
        return self._map(self.weight.detach(), lambda term: Term(term.left.detach(), term.right.detach(), term.scaling))

    def __getitem__(self, key: Any) -> Any:
        if not _picks(key):
            return self.dense()[key]
        if self.weight.ndim > 2:
            return self._map(self.weight[key], lambda term: Term(term.left[key], term.right[key], term.scaling))
        if isinstance(key, int) or (isinstance(key, Tensor) and key.ndim == 0):
            return self[slice(key, key + 1)].dense()[0] if isinstance(key, int) and key >= 0 else self.dense()[key]
        return self._map(self.weight[key], lambda term: Term(term.left[key], term.right, term.scaling))

    def index_select(self, dim: int, index: Tensor) -> Any:
        """Select by a tensor of indices: factored along the leading axis, else dense."""
        return self[index] if dim % self.weight.ndim == 0 else self.dense().index_select(dim, index)

    def select(self, dim: int, index: int) -> Any:
        """Select by one index: factored along the leading axis, else dense."""
        return self[index] if dim % self.weight.ndim == 0 else self.dense().select(dim, index)

    def unbind(self, dim: int = 0) -> Any:
        """Split along an axis: factored along the leading one, else dense."""
        return tuple(self) if dim % self.weight.ndim == 0 else self.dense().unbind(dim)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self.weight)))

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def requires_grad(self) -> bool:
        """Whether the weight or any factor requires a gradient."""
        return any(t.requires_grad for t in (self.weight, *(x for term in self.terms for x in term[:2])))

    # -- everything else -------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in FACTS:
            return getattr(self.weight, name)
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        _refuse_writing(name)
        product = _METHODS.get(name)
        if product is not None:
            return lambda *args, **kwargs: self.__torch_function__(product, (), (self, *args), kwargs)
        return getattr(self.dense(), name)

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Factored({tuple(self.weight.shape)}, {self.weight.dtype}, {len(self.terms)} terms)"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = product_of(func)
        if product is not None:
            y = product(func, *args, **kwargs)
            if y is not NotImplemented:
                return y
        if isinstance(kwargs.get("out"), Factored):
            _refuse_writing("out=")
        if not torch.compiler.is_compiling() and args and isinstance(args[0], Factored):
            _refuse_writing(getattr(func, "__name__", ""))
        return func(*_densified(args), **{name: _densified(value) for name, value in kwargs.items()})


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: Factored, *others: Any) -> Any:
        return getattr(self.dense(), name)(*(_densified(other) for other in others))

    return operate


OPERATIONS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "mod", "neg", "abs", "eq", "ne",
    "lt", "le", "gt", "ge", "and", "or", "xor", "invert", "bool", "float", "int", "complex",
)  # fmt: skip


for _name in OPERATIONS:
    setattr(Factored, f"__{_name}__", _operator(f"__{_name}__"))


def _picks(key: Any) -> bool:
    """Return whether an index picks from the leading axis alone."""
    if isinstance(key, Tensor):
        return key.dtype in (torch.int64, torch.int32) or (key.dtype == torch.bool and key.ndim == 1)
    return isinstance(key, (int, slice, list)) and not isinstance(key, bool)


def _densified(x: Any) -> Any:
    if isinstance(x, Factored):
        return x.dense()
    return type(x)(map(_densified, x)) if type(x) in (list, tuple) else x


def _refuse_writing(name: str) -> None:
    if name == "out=" or (name.endswith("_") and not name.endswith("__")):
        raise TypeError(
            f"the forward writes to an adapted parameter ({name}), which here is the sum of the base's and an "
            "adapter's, so what is written would be lost; leave the parameter out of target_parameters"
        )


# -- products ----------------------------------------------------------------------------------------------------------


def _on_the_right(func: Any, y: Any, x: Tensor, w: Factored, product: Callable[..., Tensor] = torch.matmul) -> Any:
    """Return `y + s (x L) R` for all terms."""
    for left, right, scaling in w.terms:
        wide, left, right = widen(x, left, right)
        y = add_scaled(y, product(product(wide, left), right), scaling)
    return y


def _operator_matmul(func: Any, a: Any, b: Any) -> Any:
    """Multiply for `@`, whose operands `torch.compile` shows exchanged where the left one is no tensor (torch 2.13)."""
    if torch.compiler.is_compiling() and isinstance(a, Tensor) and isinstance(b, Factored):
        right = a.shape[-1] == b.shape[-2]
        left = a.shape[-1 if a.ndim == 1 else -2] == b.shape[-1]
        if left and right:
            raise RuntimeError(
                f"under torch.compile, w @ x and x @ w look the same where an adapted parameter w has shape "
                f"{tuple(b.shape)} and x {tuple(a.shape)}; write torch.matmul(w, x) in the model"
            )
        if left:
            return torch.matmul(b, a)  # type: ignore[arg-type]
    return _matmul(func, a, b)


def _matmul(func: Any, a: Any, b: Any) -> Any:
    if not isinstance(a, Factored):
        return _on_the_right(func, func(a, b.weight), a, b)
    if isinstance(b, Factored):
        return NotImplemented
    y, x = func(a.weight, b), b.unsqueeze(-1) if b.ndim == 1 else b
    for left, right, scaling in a.terms:
        wide, left, right = widen(x, left, right)
        delta = left @ (right @ wide)
        y = add_scaled(y, delta.squeeze(-1) if b.ndim == 1 else delta, scaling)
    return y


def _reversed_matmul(func: Any, a: Any, b: Any) -> Any:
    return torch.matmul(b, a)


def _added(func: Any, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """Compute `addmm` and its batched forms: `beta bias + alpha a b`."""
    if isinstance(bias, Factored) or isinstance(a, Factored) is isinstance(b, Factored):
        return NotImplemented
    weights = (x.weight if isinstance(x, Factored) else x for x in (a, b))
    y = func(bias, *weights, beta=beta, alpha=alpha)
    w = a if isinstance(a, Factored) else b
    for left, right, scaling in w.terms:
        wide, left, right = widen(b if w is a else a, left, right)
        y = add_scaled(y, left @ (right @ wide) if w is a else (wide @ left) @ right, scaling * alpha)
    return y


def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, Factored) or isinstance(bias, Factored) or weight.ndim != 2:
        return NotImplemented
    return _on_the_right(func, func(input, weight.weight, bias), input, weight.mT)


def _embedding(
    func: Any,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    special = padding_idx is not None or max_norm is not None or scale_grad_by_freq or sparse
    if special or isinstance(input, Factored) or weight.ndim != 2:
        return NotImplemented
    y = func(input, weight.weight)
    for left, right, scaling in weight.terms:
        left, right = widen(left, right)
        y = add_scaled(y, F.embedding(input, left) @ right, scaling)
    return y


def _grouped(func: Any, a: Any, b: Any, offs: Any = None, **options: Any) -> Any:
    """Multiply rows sorted by expert; the kernels take one dtype, so thin matrices are rounded to the input's."""
    if isinstance(a, Factored) or b.ndim != 3:
        return NotImplemented
    y = func(a, b.weight, offs=offs, **options)
    for left, right, scaling in b.terms:
        left, right = for_kernel(left.to(a.dtype), right.to(a.dtype))
        y = add_scaled(y, func(func(a, left, offs=offs), right, offs=offs), scaling)
    return y


def for_kernel(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Give matrices strides of whole 16 bytes, as grouped kernels want them, by a rank that is padded with zeros."""
    missing = -left.shape[-1] % (16 // left.itemsize)
    if missing:
        left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    return left if 1 in left.stride()[-2:] else left.contiguous(), right.contiguous()


def _einsum(func: Any, equation: Any, *operands: Any) -> Any:
    """Contract two operands, one of them factored; the label that the other shares with a thin matrix goes first."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if len(operands) != 2 or not isinstance(equation, str) or "." in equation or "->" not in equation:
        return NotImplemented
    inputs, _, out = equation.replace(" ", "").partition("->")
    at = 1 if isinstance(operands[1], Factored) else 0
    x, w = operands[1 - at], operands[at]
    other, labels = inputs.split(",")[1 - at], inputs.split(",")[at]
    batch, rows, columns = labels[:-2], labels[-2], labels[-1]
    if isinstance(x, Factored) or len(set(labels)) < len(labels) or (rows in other) is (columns in other):
        return NotImplemented
    thin = next(label for label in "zyxwvutsrqponm" if label not in equation)
    kept = [label for label in dict.fromkeys(other + batch) if label in out or label in batch]
    between = "".join(kept) + thin
    parts = f"{batch}{rows}{thin}", f"{batch}{thin}{columns}"
    first, second = (0, 1) if rows in other else (1, 0)
    y = func(equation, *((x, w.weight) if at else (w.weight, x)))
    for term in w.terms:
        wide, *pair = widen(x, term.left, term.right)
        down = torch.einsum(f"{other},{parts[first]}->{between}", wide, pair[first])
        y = add_scaled(y, torch.einsum(f"{between},{parts[second]}->{out}", down, pair[second]), term.scaling)
    return y


_PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.einsum: _einsum,
    Tensor.__rmatmul__: _reversed_matmul,
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__), _operator_matmul),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.mv, Tensor.mv), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), _added),
    **{
        function: _grouped
        for function in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None))
        if function
    },
}


_OPERATORS = {"grouped_mm_fallback": _grouped}
"""By name: transformers' own operator for where torch's kernel is missing."""


def product_of(func: Any) -> Callable[..., Any] | None:
    """Return the way to multiply by a factored weight in the place of a function of torch's."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        return _OPERATORS.get(func.__name__)
    return _PRODUCTS.get(func)


def is_grouped(func: Any) -> bool:
    """Return whether a function multiplies rows that are sorted by expert."""
    return product_of(func) is _grouped


_METHODS = {name: getattr(torch, name) for name in ("matmul", "mm", "bmm", "mv", "addmm", "baddbmm")}
