"""bits.yaml: the scheme of each group of layers, as `compress allocate` writes it and `quantize` takes it.

    groups:
    - modules: [model.layers.0.self_attn.k_proj, model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj]
      bits: 4
      group_size: 128
      symmetric: true

`bits: dense` leaves layers as they are; every linear layer of the model is named, so that a file for another model is noticed. `*` in a module's name stands
for any expert. What stands beside `groups` tells how they were found, and is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.spec import natural_order
from mergekit_plus.errors import OptionError
from mergekit_plus.model import describe
from mergekit_plus.safe_yaml import read as read_yaml

from .quantized import Scheme

_EXPERT = re.compile(r"(\bexperts\.)\d+\.")
_SHOWN = 3  # names in an error


class GroupScheme(BaseModel):
    """Modules that share a scheme, or stay dense."""

    model_config = ConfigDict(extra="forbid")

    modules: list[str] = Field(min_length=1)
    bits: int | Literal["dense"]
    group_size: int = 128
    symmetric: bool = True

    @property
    def scheme(self) -> Scheme | None:
        """None for dense. Errors: OptionError for one that cannot be."""
        return None if self.bits == "dense" else Scheme(self.bits, self.group_size, self.symmetric)


class _File(BaseModel):
    groups: list[GroupScheme] = Field(min_length=1)


def read(path: Path) -> list[GroupScheme]:
    """The groups of a file. Errors: OptionError, or RecipeError for what is no YAML, in one line."""
    try:
        groups = _File.model_validate(read_yaml(path)).groups
        for group in groups:
            _ = group.scheme
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise OptionError(f"{path} is no allocation as `compress allocate` writes it: {f'{place}: ' if place else ''}{first['msg']}") from None
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None
    return groups


def group_schemes(checkpoint: Checkpoint, groups: Sequence[Sequence[str]], schemes: Sequence[Scheme]) -> list[GroupScheme]:
    """Groups of weights by their names, as the file holds them; the model's other linear layers are dense."""
    rest = set(describe(checkpoint).linears).difference(*groups)
    found = [
        GroupScheme(modules=_modules(group), bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric)
        for group, scheme in zip(groups, schemes, strict=True)
    ]
    return found + ([GroupScheme(modules=_modules(sorted(rest, key=natural_order)), bits="dense")] if rest else [])


def _modules(group: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(_EXPERT.sub(r"\1*.", name.removesuffix(".weight")) for name in group))


def write(path: Path, groups: Sequence[GroupScheme], made: Mapping[str, Any]) -> None:
    """A file of these groups; `made` tells how they were found."""
    content = {**made, "groups": [group.model_dump() for group in groups]}
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=160, default_flow_style=None))


def schemes_of(groups: Sequence[GroupScheme], checkpoint: Checkpoint, label: str = "the allocation") -> dict[str, Scheme]:
    """The scheme of each module of a model that does not stay dense.

    Errors: OptionError for a module that the model lacks, one of the model that no group names, and one that stands in two.
    """
    roles = describe(checkpoint)
    modules = dict.fromkeys(roles.tensors[name].module for name in roles.linears)
    found: dict[str, Scheme | None] = {}
    lost: list[str] = []
    for group in groups:
        for name in group.modules:
            named = [module for module in modules if fnmatchcase(module, name)] if "*" in name else [name] * (name in modules)
            lost += [name] * (not named)
            if twice := next((module for module in named if module in found), None):
                raise OptionError(f"{label}: '{twice}' stands in two groups; a layer has one scheme")
            found |= dict.fromkeys(named, group.scheme)
    unnamed = [module for module in modules if module not in found]
    if lost or unnamed:
        what = [f"it names {_some(lost)}, which {checkpoint.label} has not"] * bool(lost) + [f"it says nothing of {_some(unnamed)}"] * bool(unnamed)
        raise OptionError(f"{label} is another model's: {' and '.join(what)}; make one for this model with `compress allocate`")
    return {module: scheme for module, scheme in found.items() if scheme is not None}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
