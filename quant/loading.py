"""A transformers model of a checkpoint as it is stored: dense, or packed, with layers that multiply by packed weights.

    model = load(Checkpoint.open("model-4bit"), torch.bfloat16)
    model.generate(**tokenizer(prompt, return_tensors="pt"))
    checkpoint, adapters = opened("model-4bit+adapter")                 # the adapter beside packed layers
    model = load(checkpoint, torch.bfloat16, adapters=adapters)

All packed layouts of integers that can be read run packed: what is not laid out as `pack-quantized` is turned at load, code for code, with scales and
zero points as they are. What cannot run packed is dequantized, and a warning says what and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_plus.adapters import Adapter, read_adapter
from mergekit_plus.adapters.difference import is_difference
from mergekit_plus.checkpoint import Checkpoint, Plan
from mergekit_plus.checkpoint.layout import computations
from mergekit_plus.checkpoint.references import split_reference
from mergekit_plus.errors import CheckpointError
from mergekit_plus.evaluate import Reader, load_model
from mergekit_plus.model import ModelMap, adapter_reason, describe, meta_model
from mergekit_plus.progress import Progress, quiet

from .adapters.beside import attach
from .experts import QuantExperts, leaves_of, may_be_packed
from .formats import FORMATS, Module, modules_of
from .formats.config import NAME
from .formats.pack_quantized import encode
from .linear import QuantLinear
from .plan import dense_modules, dequantize, is_packed
from .quantized import Quantized, Scheme


def load(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, progress: Progress | None = None,
    adapters: Sequence[Adapter] = (), as_dequantized: bool = False, device: str = "cpu",
) -> Any:  # fmt: skip
    """The transformers model of a checkpoint, dense or packed, in evaluation mode; each tensor is read, or computed, once.

    dtype: of all that is not packed, and so of the hidden states. adapters: what stands beside its layers. as_dequantized: packed layers compute what
    those of the dequantized model would, bit for bit, see `QuantLinear`. Memory: what is packed as it is stored, the rest in `dtype`, a few tensors more.
    Errors: CheckpointError as `evaluate.load_model`, for packed weights that cannot be read, and for adapters that do not fit.
    """
    packed = is_packed(checkpoint)
    model = _load_packed(checkpoint, dtype, progress or quiet(), as_dequantized) if packed else load_model(checkpoint, dtype, progress)
    model.to(device)
    for adapter in adapters:
        attach(model, adapter, dtype, device)
    return model


def opened(ref: str) -> tuple[Checkpoint, list[Adapter]]:
    """A model by its name, and the adapters that are to stand beside it: those of `MODEL+ADAPTER` where the model is packed, none where they are applied.

    Errors: CheckpointError where one of them cannot be opened, and for an adapter alone.
    """
    base, *names = split_reference(ref)
    checkpoint = Checkpoint.open(base)
    if reason := adapter_reason(checkpoint):
        raise CheckpointError(reason)
    if not names or not is_packed(checkpoint):
        return Checkpoint.open(ref) if names else checkpoint, []
    parts = [Checkpoint.open(name) for name in names]
    if different := next((part for part in parts if is_difference(part)), None):
        raise CheckpointError(f"{different.label} is a difference to dense weights, and those of {base} are packed; `compress dequantize {base}` unpacks them")
    return checkpoint, [read_adapter(part) for part in parts]


def _load_packed(checkpoint: Checkpoint, dtype: torch.dtype, progress: Progress, as_dequantized: bool) -> Any:
    for computation in computations(checkpoint):
        computation.run(progress=progress)
    dense = dequantize(checkpoint)
    assert isinstance(dense.source, Plan)
    roles = describe(dense)
    modules = {f"{module.name}.weight": module for module in modules_of(checkpoint)}
    packed = _Packed(modules, roles, dict(meta_model(dense).named_modules()))
    nbytes = sum(checkpoint.specs[name].nbytes for module in modules.values() for name in module.tensors)
    with progress.phase(f"loading what is packed of {checkpoint.label}", nbytes):
        instead = packed.made(Reader(checkpoint, progress), dtype, as_dequantized)
    rest = replace(dense, label=checkpoint.label, source=Plan(step for step in dense.source.steps if step.writes[0].name not in packed.taken))
    model = load_model(rest, dtype, progress, instead)
    schemes = {module.name: module.stored.scheme for name, module in modules.items() if name in packed.taken}
    model.config.quantization_config = FORMATS[NAME].config(schemes, dense_modules(dense, roles, packed.taken, dense.specs))
    if packed.refused and not as_dequantized:
        name, reason = next(iter(packed.refused.items()))
        warnings.warn(f"{checkpoint.label}: {len(packed.refused)} of {len(modules)} packed layers run dequantized: {name} {reason}", stacklevel=3)
    return model


@dataclass(frozen=True)
class _Place:
    """What stands somewhere in a model: made of packed layers, which these weights are."""

    weights: Sequence[str]
    made_of: Callable[[Sequence[QuantLinear]], nn.Module]


class _Packed:
    """Makes the modules that stand in place of a model's own. `taken`: the tensors that they hold, by their names in the dense checkpoint; `refused`:
    why other packed weights are not among them."""

    def __init__(self, modules: Mapping[str, Module], roles: ModelMap, owners: Mapping[str, nn.Module]) -> None:
        """modules: those that are packed, by the names of their weights; owners: those of the model, without weights."""
        self.modules, self.roles, self.owners = modules, roles, owners
        self.by_parameter = {meaning.parameter: name for name, meaning in roles.tensors.items()}
        self.taken: set[str] = set()
        self.refused: dict[str, str] = {}

    def made(self, reader: Reader, dtype: torch.dtype, as_dequantized: bool) -> dict[str, nn.Module]:
        """The modules, by where they stand."""
        found: dict[str, nn.Module] = {}
        for place, planned in self._places().items():
            try:
                layers = [self._layer(name, place, reader, dtype, as_dequantized) for name in planned.weights]
            except _NotSo as reason:
                self.refused |= dict.fromkeys(planned.weights, str(reason))
                continue
            found[place] = planned.made_of(layers)
            self.taken.update(planned.weights)
            if found[place] is layers[0] and layers[0].bias is not None:
                self.taken.add(self.by_parameter[f"{place}.bias"])
        return found

    def _layer(self, name: str, place: str, reader: Reader, dtype: torch.dtype, as_dequantized: bool) -> QuantLinear:
        module, owner = self.modules[name], self.owners[place]
        assert isinstance(module.stored.scheme, Scheme)
        tensors = as_pack_quantized(module, {part: reader.read(f"{module.name}.{part}") for part in module.row_parts})
        bias = reader.read(self.by_parameter[f"{place}.bias"]).to(dtype) if isinstance(owner, nn.Linear) and owner.bias is not None else None
        return QuantLinear(tensors, module.stored.scheme, bias, as_dequantized)

    def _places(self) -> dict[str, _Place]:
        """Where packed weights can stay packed."""
        tied = {name for group in self.roles.tied for name in group}
        found: dict[str, _Place] = {}
        mixtures: dict[str, list[str]] = {}
        for name, module in self.modules.items():
            meaning = self.roles.tensors[name]
            place = str(meaning.parameter).rpartition(".")[0]
            owner = self.owners.get(place)
            if not isinstance(module.stored.scheme, Scheme):
                self.refused[name] = f"holds {module.stored.scheme}, and integers are what is multiplied as it is"
            elif owner is not None and may_be_packed(owner):
                mixtures.setdefault(place, []).append(name)
            elif name in tied or meaning.converted or not _is_linear(owner, module.shape, f"{place}.bias" in self.by_parameter):
                self.refused[name] = f"is no weight of a plain linear layer in the model{f', but of {type(owner).__name__}' if owner else ''}"
            else:
                found[place] = _Place((name,), lambda layers: layers[0])
        return found | {place: mixture for place, names in mixtures.items() if (mixture := self._mixture(place, names))}

    def _mixture(self, place: str, names: Sequence[str]) -> _Place | None:
        """The experts of a layer; None where these weights are not all of them, or by other names than are known."""
        own: Any = self.owners[place]
        table = {tuple(self.modules[name].name.split(".")[-2:]): name for name in names}  # ("7", "up_proj")
        leaves = leaves_of([leaf for _, leaf in table])
        wanted = [(str(number), leaf) for number in range(len(own.down_proj)) for leaf in leaves or ()]
        if leaves is None or table.keys() != set(wanted) or not self._fit(own, [table[key] for key in wanted]):
            self.refused |= dict.fromkeys(names, f"is one of {len(names)} that do not make up {type(own).__name__} by names that are known")
            return None

        def made_of(layers: Sequence[QuantLinear]) -> nn.Module:
            return QuantExperts(own, [dict(zip(leaves, layers[first : first + 3], strict=True)) for first in range(0, len(layers), 3)], leaves)

        return _Place([table[key] for key in wanted], made_of)

    def _fit(self, own: Any, names: Sequence[str]) -> bool:
        gate, up, down = ({self.modules[name].shape for name in names[first::3]} for first in range(3))
        (rows, width), shapes = own.gate_up_proj.shape[1:], len(gate | up)
        return shapes == 1 and gate == {(rows // 2, width)} and down == {tuple(own.down_proj.shape[1:])}


class _NotSo(Exception):
    """Why a weight cannot be stored otherwise than it is."""


def as_pack_quantized(module: Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module of integers as `pack-quantized` stores them, by the last part of their names; nothing is rounded.

    Errors: _NotSo for what no row of codes can hold: inputs in an order of their own.
    """
    shape = {"weight_shape": torch.tensor(module.shape, dtype=torch.int64)}
    if module.stored.layout == NAME:
        return {**tensors, **shape}
    try:
        codes = module.decode(tensors)
    except CheckpointError as error:
        raise _NotSo(f"cannot be laid out as {NAME}: {error}") from None
    assert isinstance(codes, Quantized)
    return {part: tensor.contiguous() for part, tensor in encode(codes).items()} | shape


def _is_linear(owner: nn.Module | None, shape: tuple[int, int], has_bias: bool) -> bool:
    """Whether a module does what nn.Linear does, with a weight of this shape, and with a bias only where there is one."""
    if not isinstance(owner, nn.Linear) or type(owner).forward is not nn.Linear.forward:
        return False
    return (owner.out_features, owner.in_features) == shape and (owner.bias is None or has_bias)
