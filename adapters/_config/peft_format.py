"""The form that a method's parameters have in PEFT: attributes of its layers, keys of its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchgraft.functional import Site

from .tasks import Tasks

KINDS = {
    "linear": "Linear",
    "embedding": "Embedding",
    "conv1d": "Conv1d",
    "conv2d": "Conv2d",
    "conv3d": "Conv3d",
    "attention": "MultiheadAttention",
}
"""What the names of PEFT's classes of layers have of the kind of a site."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A number that layers show for each adapter, such as `layer.scaling["default"]`.

    Attributes:
        get: `(config, site) -> value`.
        set: `(config, site, value) -> constants` that change with it; `None` where the value is fixed.
        planned: `(config, site) -> value` as the config plans it, where it can be written.
    """

    get: Callable[[Any, Site], Any]
    set: Callable[[Any, Site, Any], Mapping[str, Any]] | None = None
    planned: Callable[[Any, Site], Any] | None = None


def as_they_are(config: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a state dict whose form is that of the leaves."""
    return dict(state)


@dataclasses.dataclass(frozen=True)
class PeftFormat:
    """How PEFT's layers and files hold a method's parameters.

    Attributes:
        prefix: What the names of PEFT's attributes start with (`"lora_"`).
        parameters: Leaves that are bare parameters, `layer.<leaf>[adapter]`; their key in a file is the leaf's name.
        modules: Leaves that are the weight of a module, `layer.<leaf>[adapter].weight`; their key ends in `.weight`.
        bare_modules: The same, but their key in a file is the leaf's name.
        grouped: Leaves that are one of several parameters of a module, `<attribute>.<parameter>`, for
            `layer.<attribute>[adapter].<parameter>`; their key in a file is the leaf's name.
        numbered: Leaves that are `<attribute>.<number>`, from 0: the attribute, and `site -> count`. Layers have a list
            of them, `layer.<attribute>[adapter][<number>]`; their key in a file is the leaf's name.
        shared_leaves: Bare parameters that several sites train together (`SharesLeaves`). Their names under `"*"` are
            the leaf's, for `layer.<leaf>[adapter]`, or `<leaf>.<key>`, for `layer.<leaf>[adapter][<key>]`; all layers
            have the same container. Files hold each once for the whole model, `base_model.<name>`.
        repeated: Leaves among `modules` that several sites train together (`SharesLeaves`), for which the layers have
            one module in common. Files hold them again for each layer, as leaves of its own.
        biases: Leaves that are the bias of such a module, by name, with the leaf that is its weight.
        biased: The field of a config that says whether there are such biases.
        holder: `(config, site, leaf) -> module` whose weight is such a leaf, made without drawing random numbers.
        dropout: The attribute of dropout modules, and the field that has their probability; `""` for none.
        probability: That field, where it has another name than the attribute.
        values: Numbers that layers show for each adapter.
        facts: `(config, site) -> {attribute: value}` of the layer itself.
        shared: Constants that files hold once for all sites that have the same one, `base_model.<name>`.
        shared_by: `site -> key` of the sites that share them, for `base_model.<name>.<key>`; `""` where all do.
        follow_shared: `(config, site, weight, {name: tensor}) -> constants` of a site that go with other shared ones
            than those that were planned; `weight()` is the base's.
        fixed: `(config, site) -> leaves` that are not trained but constants of the site, by the leaf's name. Files hold
            them as they hold leaves; an injected layer has them as frozen parameters.
        buffers: Those of them that a layer has as buffers instead, beside bare parameters.
        starts: Constants that are the values that leaves started with, by leaf. In an injected layer they have the
            leaf's dtype.
        saves_shared: `(config) -> bool`, whether files hold them.
        infer: `(config, {path: {leaf: tensor}}) -> fields` of a config that fits such tensors, such as ranks. Shared
            leaves are at `"*"` there.
        ranked: Leaves whose first axis is the rank, by which files tell ranks without a model.
        express: `(config, {path: site}) -> fields` of a config that plans the numbers that these sites have now, where
            values can be written; none where they are the config's own.
        input_side: `(site) -> bool`, whether the method acts on the input, so that of several active adapters the first
            is the outermost.
        reads: Fields that change what `apply` computes beyond what `plan` makes of them; dropout, which is for training
            alone, is not among them.
        gradients: `(config, site, leaf) -> (gradient) -> gradient`, what `backward` leaves in `.grad` of an injected
            layer, where PEFT has such hooks; `None` for what it is.
        check: `(config, {path: {leaf: tensor}}) -> None`, raises a `ValueError` where such tensors cannot be the
            config's. It runs before `plan`, for methods whose `plan` makes tensors as large as the config says.
        pack: `(config, {key: tensor}) -> {key: tensor}`, leaves as state dicts and files hold them, where these have
            another form.
        unpack: The same, back; also of tensors on the meta device.
        tasks: What it says of its tasks, where an adapter is one for each task of a row.
        only_here: Fields that PEFT's config of this method does not have; written only where they say something.
        layers: Names of PEFT's classes of layers, with the kind's name in braces.
    """

    prefix: str
    parameters: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    bare_modules: tuple[str, ...] = ()
    grouped: tuple[str, ...] = ()
    numbered: Mapping[str, Callable[[Site], int]] = dataclasses.field(default_factory=dict)
    shared_leaves: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    biases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    biased: str = ""
    holder: Callable[[Any, Site, str], nn.Module] | None = None
    dropout: str = ""
    probability: str = ""
    values: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    facts: Callable[[Any, Site], Mapping[str, Any]] = lambda config, site: {}
    shared: tuple[str, ...] = ()
    shared_by: Callable[[Site], str] = lambda site: ""
    follow_shared: Callable[[Any, Site, Callable[[], Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]] = (
        lambda config, site, weight, given: given
    )
    fixed: Callable[[Any, Site], tuple[str, ...]] = lambda config, site: ()
    buffers: tuple[str, ...] = ()
    starts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    saves_shared: Callable[[Any], bool] = lambda config: False
    infer: Callable[[Any, Mapping[str, Mapping[str, Any]]], dict[str, Any]] | None = None
    ranked: tuple[str, ...] = ()
    express: Callable[[Any, Mapping[str, Site]], dict[str, Any]] | None = None
    input_side: Callable[[Site], bool] = lambda site: False
    reads: tuple[str, ...] = ()
    gradients: Callable[[Any, Site, str], Callable[[Tensor], Tensor] | None] = lambda config, site, leaf: None
    check: Callable[[Any, Mapping[str, Mapping[str, Any]]], None] = lambda config, found: None
    pack: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]] = as_they_are
    unpack: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]] = as_they_are
    tasks: Tasks | None = None
    only_here: tuple[str, ...] = ()
    layers: str = "{}"

    def layer_name(self, site: Site) -> str:
        """Return the name that PEFT has for the class of a site's layer.

        >>> PeftFormat("lora_", layers="SVD{}").layer_name(Site("a", "linear", 2, 2))
        'SVDLinear'
        """
        return "ParamWrapper" if site.is_parameter else self.layers.format(KINDS[site.kind])

    def fixed_tensors(self, config: Any, site: Site) -> dict[str, Tensor]:
        """Return the leaves of a site that are not trained, by name."""
        return {leaf: getattr(site.constants, leaf) for leaf in self.fixed(config, site)}

    def shared_names(self, site: Site) -> dict[str, str]:
        """Return the names in files, after `base_model.`, of the constants that a site shares with others.

        >>> form = PeftFormat("frod_", shared=("frod_V",), shared_by=lambda site: site.path.partition(".")[2])
        >>> form.shared_names(Site("0.q", "linear", 2, 2))
        {'frod_V': 'frod_V.q'}
        """
        key = self.shared_by(site) if self.shared else ""
        return {constant: f"{constant}.{key}" if key else constant for constant in self.shared}

    def shared_tensors(self, sites: Iterable[Site]) -> dict[str, Tensor]:
        """Return the constants that files hold once for several sites, by their names there."""
        found: dict[str, Tensor] = {}
        for site in sites:
            for constant, name in self.shared_names(site).items():
                found.setdefault(name, getattr(site.constants, constant))
        return found

    def dropout_of(self, config: Any) -> float:
        """Return the probability of dropout that a config says, 0 for methods without dropout modules."""
        name = self.probability or self.dropout
        p: float = getattr(config, name) if name else 0.0
        return p

    @property
    def leaves(self) -> tuple[str, ...]:
        """The leaves that a module can have of its own, but for numbered ones."""
        return (*self.modules, *self.biases, *self.parameters, *self.bare_modules, *self.grouped)

    def is_numbered(self, leaf: str) -> bool:
        """Return whether a name is that of a leaf that has a number.

        >>> PeftFormat("adamss_", numbered={"adamss_A": lambda site: 2}).is_numbered("adamss_A.1")
        True
        """
        attribute, _, number = leaf.partition(".")
        return attribute in self.numbered and number.isdecimal()

    def is_leaf(self, name: str) -> bool:
        """Return whether a name is that of a leaf that a module can have of its own."""
        return name in self.leaves or self.is_numbered(name)

    def is_grouped(self, leaf: str) -> bool:
        """Return whether layers have a leaf as one of several parameters of a module or a list."""
        return leaf in self.grouped or self.is_numbered(leaf)

    def leaves_at(self, site: Site) -> tuple[str, ...]:
        """Return the leaves that a site can have of its own."""
        counts = {attribute: count(site) for attribute, count in self.numbered.items()}
        return (*self.leaves, *(f"{attribute}.{i}" for attribute, count in counts.items() for i in range(count)))

    def place(self, leaf: str) -> tuple[str, str | None]:
        """Where a layer holds a leaf: attribute, and the parameter of the module there; `None` for bare parameters.

        >>> PeftFormat("lora_", modules=("lora_B",), biases={"lora_B_bias": "lora_B"}).place("lora_B_bias")
        ('lora_B', 'bias')
        >>> PeftFormat("psoft_", grouped=("psoft_R.vector_a",)).place("psoft_R.vector_a")
        ('psoft_R', 'vector_a')
        """
        if self.is_grouped(leaf):
            attribute, _, parameter = leaf.partition(".")
            return attribute, parameter
        if leaf in self.biases:
            return self.biases[leaf], "bias"
        return leaf, None if leaf in self.parameters else "weight"

    def places(self, site: Site) -> dict[str, tuple[str, str | None]]:
        """Return where the layer of a site holds each leaf that it can have, those that it shares among them.

        Raises:
            ValueError: A shared leaf that is not declared, or under a name that says nothing of it.

        >>> site = Site("a", "linear", 2, 2, shared={"bank": "bank.0"})
        >>> PeftFormat("bank_", parameters=("mix",), shared_leaves=("bank",)).places(site)
        {'mix': ('mix', None), 'bank': ('bank', '0')}
        """
        shared = {leaf: (leaf, self._shared_key(site.path, leaf, name)) for leaf, name in self.together(site).items()}
        return {leaf: self.place(leaf) for leaf in self.leaves_at(site)} | shared

    def together(self, site: Site) -> dict[str, str]:
        """Return the leaves that a site shares in a container of all its layers, with their names under `"*"`.

        >>> site = Site("a", "linear", 2, 2, shared={"bank": "bank.0", "lora_A": "lora_A.0"})
        >>> PeftFormat("", modules=("lora_A",), repeated=("lora_A",), shared_leaves=("bank",)).together(site)
        {'bank': 'bank.0'}
        """
        return {leaf: name for leaf, name in site.shared.items() if leaf not in self.repeated}

    def repeats(self, site: Site) -> dict[str, str]:
        """Return the other leaves that it shares, which files hold for each layer."""
        return {leaf: name for leaf, name in site.shared.items() if leaf in self.repeated}

    def _shared_key(self, path: str, leaf: str, name: str) -> str | None:
        """Return what a shared leaf goes by among those of its adapter; `None` where it is the only one."""
        found = self.shared_name(name)
        if leaf not in self.shared_leaves or found is None or found[0] != leaf:
            raise ValueError(
                f"{path}: shares its leaf {leaf!r} under the name {name!r}, expected one of shared_leaves "
                f"{self.shared_leaves}, under its own name or '<leaf>.<key>' with a key without dots"
            )
        return found[1]

    def shared_name(self, name: str) -> tuple[str, str | None] | None:
        """Leaf and key of a name that shared leaves have under `"*"`; `None` for other names.

        >>> form = PeftFormat("bank_", shared_leaves=("bank",))
        >>> form.shared_name("bank"), form.shared_name("bank.5x5"), form.shared_name("banks")
        (('bank', None), ('bank', '5x5'), None)
        """
        leaf, dot, key = name.partition(".")
        if leaf not in self.shared_leaves or "." in key or (dot and not key):
            return None
        return leaf, key or None

    def key(self, leaf: str) -> str:
        """Name of a leaf in PEFT's files, after the module's.

        >>> PeftFormat("lora_", modules=("lora_A",)).key("lora_A")
        'lora_A.weight'
        """
        attribute, parameter = self.place(leaf)
        return attribute if parameter is None or leaf in self.bare_modules else f"{attribute}.{parameter}"


class NoForm:
    """Stands where a method has not said how PEFT's layers and files hold its leaves."""

    def __get__(self, config: Any, cls: type) -> Any:
        raise AttributeError(
            f"{cls.__name__} has no form, by which files and layers in place hold its leaves; set {cls.__name__}.form ="
            " PeftFormat(prefix=..., parameters=(...))"
        )
