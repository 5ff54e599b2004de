"""From adapters of one base to one adapter.

The weighted sum of `s_i B_i A_i` is exact: factors laid side by side, whose ranks add up; with fewer ranks, the best approximation, from QR
factors. Every other merge method works on the products themselves, module by module, as on task vectors over a base of zeros; what
comes out is brought back to a low rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..adapters.layout import Factorise, Product, adapter_of
from ..adapters.lowrank import factors, leading, rank_of_product
from ..adapters.peft import Adapter, LowRank, refuse_misfits
from ..adapters.product import block_rows, blocks
from ..checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from ..checkpoint.checkpoint import Rows
from ..checkpoint.dtypes import TAGS, TORCH_DTYPES
from ..checkpoint.spec import natural_order
from ..errors import CheckpointError, OptionError
from . import METHODS
from .combine import shares
from .plan import MergeOptions, merge, problems
from .varying import varies

SVD = "svd"  # the weighted sum, brought down to the largest rank of the inputs


def adapter_problems(method: str, options: Mapping[str, object], adapters: int, rank: int | None) -> list[str]:
    """Everything wrong with a method, its options and this many adapters, a sentence each."""
    found = [f"rank must be 1 or more, not {rank}"] if rank is not None and rank < 1 else []
    if varies(options):
        return [*found, "options by depth or kind of layer are for models; adapters are merged with one value"]
    return found + problems("linear" if method == SVD else method, options, adapters, _takes_zeros(method))


def merge_adapters(
    adapters: Sequence[Adapter], method: str = "linear", options: Mapping[str, object] | None = None, rank: int | None = None, how: MergeOptions | None = None
) -> Checkpoint:
    """The merge of LoRA adapters as an adapter in peft's layout, computed as it is read. A module that an adapter lacks counts as zero.

    method: "linear" (an average unless told otherwise), "svd" (the same, brought down to a rank), or any merge method. rank: of each module;
    by default what the sum has for "linear", else the largest of the inputs'.
    Errors: OptionError for an unknown method or impossible options; CheckpointError where the adapters do not fit together.
    """
    how = how or MergeOptions()
    if found := adapter_problems(method, options or {}, len(adapters), rank):
        raise OptionError("; ".join(found))
    shapes = _shapes(adapters)
    dtype = how.dtype or _dtype(adapters)
    sums = method in ("linear", SVD)
    if sums:
        arguments = METHODS["linear"].options.check(options or {}, len(adapters))
        weights = shares(arguments["weight"], arguments["normalize"])
    else:
        deltas = _merged_products(adapters, shapes, method, options or {}, how)
    products, steps = [], []
    for module, shape in shapes.items():
        held = [(index, part.lowrank[module]) for index, part in enumerate(adapters) if module in part.lowrank]
        total = sum(lowrank.rank for _, lowrank in held)
        wanted = rank or (total if method == "linear" else max(lowrank.rank for _, lowrank in held))
        kept = total if sums and wanted >= total else min(wanted, shape[0], prod(shape[1:]))
        product = Product(module, kept, shape, held[0][1].embedding)
        if sums:
            reads = [(adapters[index].checkpoint, name) for index, lowrank in held for name in (lowrank.a, lowrank.b)]
            factorise: Factorise = partial(_sum, scales=[weights[index] * lowrank.scale for index, lowrank in held], rank=kept)
        else:
            reads = [(deltas, module)]
            factorise = partial(_truncate, rank=kept, name=module)
        products.append(product)
        steps.append(product.step(reads, factorise, dtype))
    label = f"{method} of {', '.join(part.label for part in adapters)}"
    tasks, bases, revisions = ({part.config.get(key) for part in adapters} for key in ("task_type", "base_model_name_or_path", "revision"))
    turned = any(part.config.get("fan_in_fan_out") for part in adapters)
    base = adapters[0].config.get("base_model_name_or_path") if len(bases) == 1 else None
    revision = adapters[0].config.get("revision") if base and len(revisions) == 1 else None
    return adapter_of(label, products, steps, base, tasks.pop() if len(tasks) == 1 else None, revision=revision, fan_in_fan_out=turned)


def _takes_zeros(method: str) -> bool:
    """Whether a method gets a base (of zeros): one that goes from one model to another has two adapters to do that with."""
    return method in METHODS and METHODS[method].needs_base and METHODS[method].models != (1, 1)


def _shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
    """Every module that an adapter changes, and the shape of `B A`.

    Errors: CheckpointError for what is no plain product, and for modules that are not the same in all.
    """
    found: dict[str, tuple[str, tuple[int, ...], bool]] = {}
    wrong = []
    for part in adapters:
        way_out = f"apply the adapter (MODEL+{part.label}) and merge models"
        for module, lowrank in part.lowrank.items():
            if lowrank.magnitude or lowrank.bias:
                raise CheckpointError(f"{part.label}: {lowrank.magnitude or lowrank.bias} is no product B A; {way_out}")
            shape = _product_shape(part, lowrank)
            label, known, embedding = found.setdefault(module, (part.label, shape, lowrank.embedding))
            if (known, embedding) != (shape, lowrank.embedding):
                wrong.append(f"{module}: {label} has {known}, {part.label} has {shape}")
        # beside the factors of an embedding, peft keeps the base's own values
        if whole := [name for name, tensor in part.whole.items() if not tensor.endswith(".base_layer.weight")]:
            raise CheckpointError(f"{part.label} holds {whole[0]} whole, which cannot be merged without its base; {way_out}")
    refuse_misfits("the adapters do not fit together", wrong, "They must be of one base")
    return {module: found[module][1] for module in sorted(found, key=natural_order)}


def _product_shape(part: Adapter, lowrank: LowRank) -> tuple[int, ...]:
    return (part.checkpoint.specs[lowrank.b].shape[0], *part.checkpoint.specs[lowrank.a].shape[1:])


def _dtype(adapters: Sequence[Adapter]) -> str:
    """The dtype that holds those of all inputs."""
    dtypes = [TORCH_DTYPES[part.checkpoint.specs[name].dtype] for part in adapters for lowrank in part.lowrank.values() for name in (lowrank.a, lowrank.b)]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return TAGS[dtype]


def _sum(tensors: Sequence[Tensor], scales: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    """A and B of `sum of scale_i B_i A_i`, from A_1, B_1, A_2, B_2, ...: side by side, or of the best approximation of this rank."""
    as_ = [a.double().flatten(1) for a in tensors[::2]]
    bs = [scale * b.double().flatten(1) for scale, b in zip(scales, tensors[1::2], strict=True)]
    if sum(len(a) for a in as_) > rank:
        return rank_of_product(bs, as_, rank)
    return torch.cat(as_), torch.cat(bs, 1)


def _truncate(tensors: Sequence[Tensor], rank: int, name: str) -> tuple[Tensor, Tensor]:
    """A and B of the best approximation of a matrix."""
    return factors(*leading(tensors[0].flatten(1), rank, name))


# ---- the products, for methods that need them ----


class _Zeros:
    """Tensors of zeros that lie nowhere."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        return torch.zeros(self.specs[name].slice_shape(rows))


def _merged_products(
    adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, ...]], method: str, options: Mapping[str, object], how: MergeOptions
) -> Checkpoint:
    """What a merge method makes of the products `s B A`, by module, in float32."""
    zeros = Checkpoint("zeros", _Zeros({module: TensorSpec(module, "F32", shape) for module, shape in shapes.items()}))
    models = [Checkpoint(part.label, Plan([_multiplied(part, zeros, module) for module in shapes])) for part in adapters]
    how = MergeOptions(seed=how.seed, device=how.device, allow_nonfinite=how.allow_nonfinite)
    return merge(models, method, zeros if _takes_zeros(method) else None, options, how)


def _multiplied(part: Adapter, zeros: Checkpoint, module: str) -> Step:
    """`s B A` of one module, in rows; zeros where the adapter does not have it."""
    if module not in part.lowrank:
        return copy_step(zeros, module)
    lowrank, write = part.lowrank[module], zeros.specs[module]
    width = prod(write.shape[1:])

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        b, a = (tensor.float().flatten(1) for tensor in tensors)
        with torch.no_grad():
            result = torch.empty(len(b), width)
            for rows in blocks(len(b), width):
                torch.mul(b[rows] @ a, lowrank.scale, out=result[rows])
        return (result.view(-1, *write.shape[1:]),)

    return Step(((part.checkpoint, lowrank.b), (part.checkpoint, lowrank.a)), (write,), run, block_rows(width), takes=(None, "whole"))
