"""What all configs share: PEFT's field names, the modules they target, and how they become JSON and back."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import nn

from torchgraft.functional import Method
from torchgraft.functional.extending import did_you_mean, modules_of

from .._files.disk.config_file import about, read_fields, read_file, write_fields
from . import (
    given_objects,  # noqa: F401 - what errors say of PEFT's objects
    layers,  # noqa: F401 - what any config may target
)
from .architectures import with_targets
from .fields import (
    as_json,
    check_attribute,
    check_biases_and_layers,
    check_call,
    check_fields,
    check_given,
    check_own_fields,
    check_task,
    own_type,
)
from .peft_format import NoForm, PeftFormat
from .peft_type import PeftType
from .replaced import Plan, find_replaced
from .targets import find_targets

PEFT_VERSION = "0.21.2"
"""The version of PEFT whose files these are."""
AS_SETS = ("target_modules", "exclude_modules", "feedforward_modules")
"""Fields whose lists become sets."""


@dataclasses.dataclass(kw_only=True)
class AdapterConfig:
    """Fields that every method has.

    Attributes:
        target_modules: Modules to adapt: names (a whole name, or its end after a dot), a regular expression for the
            whole name, or `"all-linear"`. A list becomes a set, here and in `exclude_modules`, as in PEFT.
        exclude_modules: Modules to leave out, in the same notation.
        layers_to_transform: Indices of the layers to adapt; `None` or `[]` for all. Whole names ignore it.
        layers_pattern: Names of the module list that holds the layers, where it is not the first numbered one.
        modules_to_save: Modules that are trained as a whole and saved with the adapter, by name or end of a name. Their
            parameters are leaves of the tree: `params["head"] = {"bias": ..., "weight": ...}`.
        bias: Whether biases of the base are trained too: `"none"`, `"all"`, or `"lora_only"` for those of the targeted
            modules (any name that ends in `_only`). They are leaves of the tree: `params["layers.0.q"]["bias"]`.
        fan_in_fan_out: Has no effect: how a module stores its weight is seen from the module.
        inference_mode: Whether an injected adapter starts frozen.
        task_type: PEFT's name of the task, see `TaskType`: the class of a `PeftModel`, and for files.
        peft_type: Name of the method; it may be given, as files have it, but no other than the class's.
        base_model_name_or_path: Where the base model came from, for files.
        revision: Version of the base model, for files.
        auto_mapping: Class of the base model, for files.
        peft_version: Version of PEFT that wrote the file; by default the one whose files these are.
        unknown_fields: Fields of a file that mean nothing here; written back as they were.
    """

    method: ClassVar[Method]
    form: ClassVar[PeftFormat] = NoForm()  # type: ignore[assignment]
    site_fields: ClassVar[frozenset[str]] = frozenset(
        {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
        | {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_type", "peft_version"}
        | {"revision", "task_type", "unknown_fields"}
    )
    """Fields that only choose modules or say where things came from, so that the adapters of a stack may differ."""
    in_memory: ClassVar[frozenset[str]] = frozenset()
    """Fields that are never written to a file or read from one."""

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    inference_mode: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_type: PeftType | str | None = None
    peft_version: str | None = None
    unknown_fields: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    if not TYPE_CHECKING:  # or else type checkers would take any name

        def __new__(cls, *args: Any, **fields: Any) -> Self:
            check_call(cls, args, fields)
            return super().__new__(cls)

        def __setattr__(self, name: str, value: Any) -> None:
            check_attribute(type(self), name)
            super().__setattr__(name, own_type(type(self), value) if name == "peft_type" else value)

    def __post_init__(self) -> None:
        check_fields(self)
        self.peft_type = None  # becomes the method's
        self.peft_version = self.peft_version or PEFT_VERSION
        for name in AS_SETS:
            if isinstance(value := getattr(self, name, None), list):
                setattr(self, name, set(value))
        check_task(self)
        check_biases_and_layers(self)

    def for_model(self, model: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> Self:
        """Return this config with its targets named as a model has them: PEFT's for its type where none are named.

        Args:
            model: The model.
            modules: Its modules by name; by default those of `named_modules`.

        Raises:
            ValueError: Names that cannot be told apart in this model.
        """
        return with_targets(self, model, modules)

    def targets(self, model: nn.Module) -> list[str]:
        """Return names of the modules of `model` to adapt, in the order of `named_modules`.

        Raises:
            ValueError: No target given, or nothing matched.
        """
        modules = modules_of(model)
        return find_targets(self.for_model(model, modules), modules, model)

    def structure(self, model: nn.Module) -> nn.Module:
        """Return the model that the config is for; another one than this only where it has more layers."""
        return model

    def follows(self, modules: Mapping[str, nn.Module], paths: list[str]) -> Mapping[str, Any]:
        """Return the modules that have the parameters of a site, by path; none, but for ties."""
        return {}

    def whole_modules(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """Return names of modules beside `modules_to_save` that are trained as a whole; none, but for LN tuning."""
        return []

    def token_rows(
        self, modules: Mapping[str, nn.Module], model: nn.Module
    ) -> list[int] | Mapping[str, list[int]] | None:
        """Return the tokens whose embeddings are trained, in the form of `trainable_token_indices`."""
        rows: list[int] | Mapping[str, list[int]] | None = getattr(self, "trainable_token_indices", None)
        return rows

    def replaces(self, modules: Mapping[str, nn.Module], model: nn.Module, paths: Iterable[str]) -> Plan:
        """Return the tensors of a model that the adapter trains copies of, by path and leaf.

        Args:
            modules: The model's modules by name.
            model: The model.
            paths: Names of the modules that are adapted.

        Raises:
            ValueError: A field that names nothing, or a tensor that cannot be trained.
        """
        return find_replaced(self, modules, model, paths)

    def recall(self, other: AdapterConfig) -> Self:
        """Return this config with what another of its class holds in memory, where both start alike."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as `adapter_config.json` has them, `peft_type` and `peft_version` among them.

        >>> from torchgraft.adapters import LoraConfig
        >>> fields = LoraConfig(target_modules={"b", "a"}).to_dict()
        >>> fields["target_modules"], fields["peft_type"]
        (['a', 'b'], 'LORA')
        >>> LoraConfig(**fields) == LoraConfig(target_modules=["a", "b"])
        True
        """
        names = [field.name for field in dataclasses.fields(self) if field.name not in self.in_memory]
        fields = {name: as_json(getattr(self, name)) for name in names}
        unknown = fields.pop("unknown_fields")
        for name in self.form.only_here:
            if fields[name] in (None, [], "none", False):
                del fields[name]
        return {**unknown, **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Make the config of the class that `peft_type` names, or of this class where there is no `peft_type`.

        Fields that are unknown here, from a newer PEFT, are kept in `unknown_fields` with a warning.

        Raises:
            ValueError: An unknown `peft_type`, a value of another type than its field's, or one that the method does
                not accept.
            TypeError: Another method's `peft_type`.

        >>> from torchgraft.adapters import LoraConfig
        >>> AdapterConfig.from_dict({"peft_type": "LORA", "r": 4}).r
        4
        """
        check_given(fields, f"{cls.__name__}.from_dict")
        given = dict(fields)
        given.pop("runtime_config", None)
        name = given.pop("peft_type", None)
        types = config_types()
        found = cls if name is None else types.get(str(getattr(name, "value", name)))
        if found is None or "method" not in vars(found):
            hint = did_you_mean(getattr(name, "value", name), types)
            raise ValueError(f"peft_type is {name!r}, expected one of {sorted(types)}{hint}")
        if not issubclass(found, cls):
            raise TypeError(f"{cls.__name__}: peft_type is {name!r}, the type of {found.__name__}; use that class")
        known = {field.name for field in dataclasses.fields(found)} - {"unknown_fields"} - found.in_memory
        unknown = {key: value for key, value in given.items() if key not in known}
        if unknown:
            warnings.warn(
                f"{found.__name__}: unknown fields {sorted(unknown)}, perhaps of a newer PEFT, have no effect; "
                f"they are kept for when the config is saved again{did_you_mean(min(unknown), known - given.keys())}",
                UserWarning,
                stacklevel=2,
            )
        return found(**{key: given[key] for key in given if key in known}, unknown_fields=unknown)

    @classmethod
    def from_peft_type(cls, **fields: Any) -> Self:
        """Make the config of the class that `peft_type` names: `from_dict` with fields by name, as PEFT has it.

        >>> AdapterConfig.from_peft_type(peft_type="IA3", target_modules=["k"]).target_modules
        {'k'}
        """
        return cls.from_dict(fields)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], auto_mapping_dict: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Write `adapter_config.json` into a directory; a file is replaced as a whole or not at all.

        Args:
            save_directory: The directory; made if it is not there.
            auto_mapping_dict: What the file has as `auto_mapping` in the place of the config's own.
        """
        given = {} if auto_mapping_dict is None else {"auto_mapping": dict(auto_mapping_dict)}
        write_fields(save_directory, self.to_dict() | given)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **_: Any,
    ) -> Self:
        """Read `adapter_config.json` from a directory, or from the Hub's local cache; nothing is ever downloaded.

        Args:
            pretrained_model_name_or_path: The directory, or the name of a repository that was downloaded before.
            subfolder: A directory in it.
            revision: The repository's branch or commit.
            cache_dir: The Hub's cache.

        Raises:
            FileNotFoundError, ValueError: No such file, or one that is no config; names the file and the field. A file
                without a `peft_type` is read by the class of a method, if it has no unknown fields.
            TypeError: The config of another method than this class's, or a file without a `peft_type` that has others.
        """
        typed = hasattr(cls, "method")
        file, fields = read_fields(pretrained_model_name_or_path, subfolder, revision, cache_dir, needs_type=not typed)
        with about(file):
            if "peft_type" not in fields:
                check_own_fields(cls, fields)
            config = (AdapterConfig if "peft_type" in fields else cls).from_dict(fields)
        if not isinstance(config, cls):
            raise TypeError(f"{cls.__name__}: {pretrained_model_name_or_path} holds a {type(config).__name__}")
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **_: Any) -> dict[str, Any]:
        """Read the fields of a config's file, as `from_dict` takes them; PEFT's name, and its result.

        Raises:
            FileNotFoundError, ValueError: No such file, or one that is no config; names the file.
        """
        return read_file(path_json_file)


def config_types() -> dict[str, type[AdapterConfig]]:
    """Return the config class of each method, by `peft_type`; subclasses that users define are among them.

    >>> config_types()["LORA"].__name__
    'LoraConfig'
    """
    found: dict[str, type[AdapterConfig]] = {}
    classes: list[type[AdapterConfig]] = AdapterConfig.__subclasses__()
    for cls in classes:
        classes.extend(cls.__subclasses__())
        if "method" in vars(cls):
            found[cls.method.name] = cls
    return found
