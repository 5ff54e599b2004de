"""What is stored in a checkpoint: how each module is, and what its tensors are, from config.json and the headers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, TensorSpec
from mergekit_plus.errors import CheckpointError, OptionError

from ..quantized import Scheme
from . import awq, config, gptq
from .config import Stored
from .format import READERS, AnyScheme, Codes, Reader

METHODS: dict[str, Callable[[Mapping[str, Any]], Callable[[str], Stored | None]]] = {
    "compressed-tensors": config.read_groups, "gptq": gptq.read_config, "awq": awq.read_config,
}  # fmt: skip
SCALES = ("weight_scale", "scales")
PACKED = ("weight_packed", "qweight")  # the last part of the name of what holds codes, but for those that take the weight's name


def declared(config_json: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of a config.json; empty where it has none."""
    text = config_json.get("text_config")
    parts = (config_json, text if isinstance(text, Mapping) else {})
    found: Any = next((part[key] for part in parts for key in ("quantization_config", "compression_config") if part.get(key)), {})
    return found if isinstance(found, Mapping) else {}


def stored_as(config_json: Mapping[str, Any]) -> Callable[[str], Stored | None]:
    """How a module is stored by its name, from a checkpoint's config.json; None for a module that is not quantised.

    Errors: CheckpointError for what cannot be read, with what can.
    """
    found = declared(config_json)
    if not found:
        return lambda module: None
    method = str(found.get("quant_method", "compressed-tensors"))
    if method not in METHODS:
        raise config.unreadable(f"quantized with '{method}'")
    try:
        return METHODS[method](found)
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        raise config.unreadable(f"it is malformed ({type(error).__name__}: {error})") from None


def read_config(config_json: Mapping[str, Any]) -> Callable[[str], AnyScheme | None]:
    """The scheme of a module by its name, as `stored_as`."""
    lookup = stored_as(config_json)

    def scheme(module: str) -> AnyScheme | None:
        stored = lookup(module)
        return stored.scheme if stored else None

    return scheme


@dataclass(frozen=True)
class Module:
    """A quantised module: how it is stored, its tensors by the last part of their names, and those that go with it and are not needed."""

    name: str
    stored: Stored
    reader: Reader
    specs: Mapping[str, TensorSpec]
    others: tuple[str, ...]
    shape: tuple[int, int]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all its tensors."""
        return tuple(f"{self.name}.{part}" for part in (*self.specs, *self.others))

    @property
    def row_parts(self) -> tuple[str, ...]:
        """The parts that hold its rows, which are what `decode` and `values` look at."""
        return tuple(part for part in self.specs if part != "weight_shape")

    @property
    def scale(self) -> str:
        """The part that holds its scales."""
        return next(part for part in self.specs if part in SCALES)

    def decode(self, tensors: Mapping[str, Tensor]) -> Codes:
        """The codes in these rows of its tensors. Errors: CheckpointError as the reader's."""
        found: Codes = self.reader.decode(tensors, self.stored.scheme, self._rows(tensors))
        return found

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The same, dequantised."""
        return self.reader.values(tensors, self.stored.scheme, self._rows(tensors))

    def _rows(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        whole = not self.reader.row_unit(self.stored.scheme)
        return (self.shape[0] if whole else len(tensors[self.reader.parts[0]])), self.shape[1]


def holds_codes(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor holds the codes of a module."""
    module, _, part = name.rpartition(".")
    if part in PACKED:
        return True
    return part == "weight" and f"{module}.weight_scale" in checkpoint.specs and not any(f"{module}.{other}" in checkpoint.specs for other in PACKED)


def modules_of(checkpoint: Checkpoint) -> Iterator[Module]:
    """The quantised modules of a checkpoint.

    Errors: CheckpointError for a module whose tensors or scheme are missing, or not what they should be.
    """
    lookup = stored_as(checkpoint.config)
    for name in checkpoint.specs:
        if not holds_codes(checkpoint, name):
            continue
        module, _, codes = name.rpartition(".")
        stored = lookup(module)
        if stored is None:
            raise CheckpointError(f"{checkpoint.label}: {module} is packed ({codes}), but config.json names no scheme for it")
        reader = READERS[stored.layout]
        specs = parts_of(checkpoint, module, stored)
        if missing := lacking(stored, specs):
            raise CheckpointError(f"{checkpoint.label}: {module} is stored as {stored.layout} by config.json, but its {missing} is missing")
        if is_symmetric(stored):
            specs.pop("weight_zero_point", None)
        others = tuple(part for part in (*reader.others, *reader.parts) if part not in specs and f"{module}.{part}" in checkpoint.specs)
        found = Module(module, stored, reader, specs, others, shape_of(checkpoint, module, stored, specs))
        if reason := misfit(found):
            raise CheckpointError(f"{checkpoint.label}: {reason}")
        yield found


def parts_of(checkpoint: Checkpoint, module: str, stored: Stored) -> dict[str, TensorSpec]:
    """Those of a module's tensors that make its weight."""
    return {part: checkpoint.specs[f"{module}.{part}"] for part in READERS[stored.layout].parts if f"{module}.{part}" in checkpoint.specs}


def shape_of(checkpoint: Checkpoint, module: str, stored: Stored, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """The shape of a module's weight. Errors: CheckpointError where its tensors do not say it."""
    try:
        return READERS[stored.layout].shape(specs, lambda part: checkpoint.read(f"{module}.{part}"), stored.scheme)
    except (ValueError, IndexError, TypeError):
        raise CheckpointError(f"{checkpoint.label}: {module} is stored as {stored.layout} by config.json, but its tensors are no matrices") from None


def misfit(module: Module) -> str | None:
    """A tensor of a module that is not what the scheme implies; None where all fit."""
    try:
        expected = module.reader.specs(TensorSpec(f"{module.name}.weight", module.specs[module.scale].dtype, module.shape), module.stored.scheme)
    except OptionError as error:
        return str(error)
    for spec in expected:
        own = module.specs.get(spec.name.rpartition(".")[2])
        if own is None or spec.name.endswith(".weight_shape"):
            continue
        alike = own.dtype == spec.dtype or (own.is_float and spec.is_float)
        if not alike or (own.shape != spec.shape and own.numel != 1):
            implied = f"{module.stored.scheme} of a weight {list(module.shape)} makes it {spec.dtype} {list(spec.shape)}"
            return f"{spec.name} is {own.dtype} {list(own.shape)}, but {implied}; config.json is another model's"
    return None


def lacking(stored: Stored, specs: Mapping[str, TensorSpec]) -> str | None:
    """A part without which a module cannot be read; None where it can."""
    reader = READERS[stored.layout]
    optional = [part for part in reader.optional if part != "weight_zero_point" or is_symmetric(stored)]
    return next((part for part in reader.parts if part not in specs and part not in optional), None)


def is_symmetric(stored: Stored) -> bool:
    """Whether its codes have no zero points; small floats have none."""
    return not isinstance(stored.scheme, Scheme) or stored.scheme.symmetric
