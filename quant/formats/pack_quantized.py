"""`pack-quantized` of compressed-tensors 0.20, which transformers and vLLM load: the tensors of one weight.

    P.weight_packed      I32  [out, ceil(in*bits/32)]   codes, a dense stream of bits along the inputs (bits.py)
    P.weight_scale       as P.weight, [out, groups]
    P.weight_shape       I64  [2] = [out, in]
    P.weight_zero_point  I32  [ceil(out*bits/32), groups]   where asymmetric: packed along the rows

config.py writes and reads what config.json says about them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_plus.checkpoint.spec import TensorSpec
from mergekit_plus.errors import CheckpointError, OptionError

from ..floats import FloatScheme
from ..quantized import Quantized, Scheme
from .bits import UNIT, pack, unpack, words
from .config import NAME, config
from .format import FORMATS, READERS, AnyScheme, Format, Reader


def prefix_of(weight: TensorSpec, scheme: AnyScheme, layout: str) -> str:
    """The name of a weight's module and a dot.

    Errors: OptionError for a tensor of another name, or of a shape that the scheme does not fit.
    """
    prefix = weight.name.removesuffix("weight")
    if prefix == weight.name or (prefix and not prefix.endswith(".")):
        raise OptionError(f"{weight.name}: {layout} stores the `weight` of a module only; leave this tensor out")
    if reason := scheme.fits(weight.shape):
        raise OptionError(f"{weight.name} {reason}")
    return prefix


def specs(weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """The tensors that take the place of `P.weight`.

    Errors: OptionError as `prefix_of`.
    """
    prefix = prefix_of(weight, scheme, NAME)
    out, width = weight.shape
    groups = scheme.groups(width)
    tensors = [
        TensorSpec(f"{prefix}weight_packed", "I32", (out, words(width, scheme.bits))),
        TensorSpec(f"{prefix}weight_scale", weight.dtype, (out, groups)),
        TensorSpec(f"{prefix}weight_shape", "I64", (2,)),
    ]
    if not scheme.symmetric:
        tensors.append(TensorSpec(f"{prefix}weight_zero_point", "I32", (words(out, scheme.bits), groups)))
    return tuple(tensors)


def encode(quantized: Quantized) -> dict[str, Tensor]:
    """`weight_packed`, `weight_scale` and, where asymmetric, `weight_zero_point` of these rows."""
    tensors = {"weight_packed": pack(quantized.codes, quantized.bits), "weight_scale": quantized.scale}
    if quantized.zero_point is not None:
        tensors["weight_zero_point"] = pack(quantized.zero_point.T, quantized.bits).T.contiguous()
    return tensors


def fixed(weight: TensorSpec) -> dict[str, Tensor]:
    """`weight_shape`."""
    return {"weight_shape": torch.tensor(weight.shape, dtype=torch.int64)}


def row_unit(scheme: Scheme) -> int:
    """Zero points share words with those of neighbouring rows."""
    return 1 if scheme.symmetric else UNIT


def decode(tensors: Mapping[str, Tensor], scheme: Scheme, shape: Sequence[int]) -> Quantized:
    """The codes, scales and zero points in `weight_packed`, `weight_scale` and `weight_zero_point`; the inverse of `encode`.

    shape: [rows, in] of the weight, or of a run of its rows that begins at a multiple of `row_unit`.

    Errors: CheckpointError for a tensor that is missing or has another shape than the scheme implies.
    """
    expected = {spec.name: spec for spec in specs(TensorSpec("weight", "F32", tuple(shape)), scheme)}
    del expected["weight_shape"]
    for name, spec in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{name} is missing; a weight of {scheme} has {', '.join(expected)}")
        tensor = tensors[name]
        if tuple(tensor.shape) != spec.shape or (spec.dtype == "I32" and tensor.dtype != torch.int32):
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise CheckpointError(f"{name} is {found}, but {scheme} of a weight {list(shape)} makes it {list(spec.shape)}")
    codes = unpack(tensors["weight_packed"], scheme.bits, shape[1])
    zero_point = None
    if not scheme.symmetric:
        zero_point = unpack(tensors["weight_zero_point"].T.contiguous(), scheme.bits, shape[0]).T.contiguous()
    return Quantized(codes, tensors["weight_scale"], zero_point, scheme.bits)


def _shape(specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], scheme: Scheme) -> tuple[int, int]:
    out, width = read("weight_shape").tolist()
    return int(out), int(width)


def only_integers(scheme: AnyScheme) -> str | None:
    """Why a format of integers cannot hold a scheme."""
    return f"it holds integers, not {scheme}" if isinstance(scheme, FloatScheme) else None


FORMATS.register(NAME, Format(NAME, specs, encode, fixed, row_unit, config, "compressed-tensors, for transformers and vLLM", only_integers))
READERS.register(
    NAME,
    Reader(
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"), specs, _shape,
        decode, row_unit, ("weight_zero_point",), ("weight_g_idx",),
    ),
)  # fmt: skip
