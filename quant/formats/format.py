"""How an on-disk format is written: what it stores for a weight, and what config.json says about it.

A format turns a `Quantized` into named tensors; it decides nothing about values. All that a plan needs before a tensor is read
(names, dtypes, shapes, the config) follows from a spec and a scheme. Reading back is not here, for it is not the same for all:
a dense weight is read as it is, and `pack_quantized.read_config` and `.decode` read the packed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergekit_plus.checkpoint.spec import TensorSpec
from mergekit_plus.registry import Registry

from ..quantized import Quantized, Scheme


@dataclass(frozen=True)
class Format:
    """One on-disk format, as pure functions of one weight `P.weight`.

    specs: the tensors that take the weight's place. encode: those of them, by the last part of their names ("weight_packed"), that
    hold the weight's rows; a run of rows gives the same run of the tensors' rows if it begins at a multiple of `row_unit`.
    fixed: the others, which follow from the spec. config: the `quantization_config` of config.json, from the scheme of every quantised module and the
    names of the linear modules that stay as they are; None where there is none to write.
    """

    name: str
    specs: Callable[[TensorSpec, Scheme], tuple[TensorSpec, ...]]
    encode: Callable[[Quantized], dict[str, Tensor]]
    fixed: Callable[[TensorSpec], dict[str, Tensor]]
    row_unit: Callable[[Scheme], int]
    config: Callable[[Mapping[str, Scheme], Sequence[str]], dict[str, Any] | None]
    summary: str


FORMATS: Registry[Format] = Registry("format")
