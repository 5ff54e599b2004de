"""How an on-disk format is written and read: what it stores for a weight, and what config.json says about it.

A format turns a `Quantized` into named tensors and back; it decides nothing about values. All that a plan needs before a tensor is read
(names, dtypes, shapes, the config) follows from a spec and a scheme. What is read may have been written by others, so that more can be
read than is written: `READERS` has the layouts, reading.py finds out which one a config.json means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.checkpoint.spec import TensorSpec
from mergekit_plus.registry import Registry

from ..floats import FloatScheme, QuantizedFloats, float_values
from ..quantized import Quantized, Scheme, dequantize

AnyScheme = Scheme | FloatScheme
Codes = Quantized | QuantizedFloats


def values_of(codes: Codes) -> Tensor:
    """What codes stand for."""
    return float_values(codes) if isinstance(codes, QuantizedFloats) else dequantize(codes)


def rows_of_a_block(scheme: AnyScheme) -> int:
    """Rows that share scales: 1 but for floats in blocks."""
    return scheme.outputs if isinstance(scheme, FloatScheme) else 1


@dataclass(frozen=True)
class Format:
    """One on-disk format, as pure functions of one weight `P.weight`.

    specs: the tensors that take the weight's place. encode: those of them, by the last part of their names ("weight_packed"), that
    hold the weight's rows; a run of rows gives the same run of the tensors' rows if it begins at a multiple of `row_unit`, 0 where only the whole can be
    encoded. fixed: the others, which follow from the spec. config: the `quantization_config` of config.json, from the scheme of every quantised module and the
    names of the linear modules that stay as they are; None where there is none to write. refuses: why it cannot hold a scheme, None where it can.
    dtype: that of its scales, where it has one of its own: weights are brought to it before they are quantised, so that codes are chosen against the
    scale as stored. copy: a file beside config.json that says the same.
    """

    name: str
    specs: Callable[[TensorSpec, Any], tuple[TensorSpec, ...]]
    encode: Callable[[Any], dict[str, Tensor]]
    fixed: Callable[[TensorSpec], dict[str, Tensor]]
    row_unit: Callable[[Any], int]
    config: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any] | None]
    summary: str
    refuses: Callable[[AnyScheme], str | None] = lambda scheme: None
    dtype: torch.dtype | None = None
    copy: str | None = None


FORMATS: Registry[Format] = Registry("format")


@dataclass(frozen=True)
class Reader:
    """How one layout is read; the parts of a module are known by the last part of their names.

    parts: the tensors that make the weight; without one of `optional` it can be read all the same. others: tensors that go with it and are not needed.
    specs: what they are for a weight and a scheme. shape: of the weight, from the specs of its parts and a function that reads one. decode: rows of the
    parts, the scheme, and the shape of those rows, to codes; rows begin at a multiple of `row_unit`, 0 where only the whole can be read. own_values: the
    same to values, where some have no codes that `decode` can hold. dtype: that of `values` where the scales do not say it.
    """

    parts: tuple[str, ...]
    specs: Callable[[TensorSpec, Any], tuple[TensorSpec, ...]]
    shape: Callable[[Mapping[str, TensorSpec], Callable[[str], Tensor], Any], tuple[int, int]]
    decode: Callable[[Mapping[str, Tensor], Any, Sequence[int]], Any]
    row_unit: Callable[[Any], int]
    optional: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    dtype: str | None = None
    own_values: Callable[[Mapping[str, Tensor], Any, Sequence[int]], Tensor] | None = None

    def values(self, tensors: Mapping[str, Tensor], scheme: AnyScheme, shape: Sequence[int]) -> Tensor:
        """As `decode`, dequantised."""
        return self.own_values(tensors, scheme, shape) if self.own_values else values_of(self.decode(tensors, scheme, shape))


READERS: Registry[Reader] = Registry("layout")
