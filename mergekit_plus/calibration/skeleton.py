"""A transformers model without weights, whose blocks get theirs from a checkpoint one at a time and lose them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..checkpoint import Checkpoint, copy_step
from ..errors import CheckpointError
from ..evaluate import Reader, Unread
from ..model import ModelMap, adapter_reason, describe, layer_of, meta_model, quantized_reason, silent_transformers
from ..progress import quiet


@dataclass(frozen=True)
class Call:
    """What the model hands to a block besides the hidden states: masks, positions, flags."""

    args: tuple[Any, ...]  # after the hidden states, where they come first
    kwargs: Mapping[str, Any]
    named: bool  # the hidden states are given by name

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
        """The hidden states that a block is called with, and the rest."""
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return args[0] if args else kwargs["hidden_states"], cls(args[1:], rest, not args)

    def __call__(self, block: nn.Module, states: Tensor) -> Tensor:
        """The block's output for these hidden states."""
        args, kwargs = tree_map(lambda value: value.to(states.device) if isinstance(value, Tensor) else value, (self.args, dict(self.kwargs)))
        output = block(*args, hidden_states=states, **kwargs) if self.named else block(states, *args, **kwargs)
        found = output if isinstance(output, Tensor) else output[0]
        assert isinstance(found, Tensor)
        return found


class Skeleton:
    """The model of a checkpoint on the meta device, and where its blocks are.

    Errors: CheckpointError for a quantised checkpoint, and for a model that is no one stack of blocks which a text flows through.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        if reason := quantized_reason(checkpoint) or adapter_reason(checkpoint):
            raise CheckpointError(reason)
        self.checkpoint = checkpoint
        self.map: ModelMap = describe(checkpoint)
        self.model: Any = meta_model(checkpoint).eval().requires_grad_(False)
        kind = type(self.model).__name__
        if self.model.config.is_encoder_decoder:
            raise CheckpointError(f"{checkpoint.label}: {kind} has an encoder and a decoder; calibration is for models of one stack of blocks")
        if self.model.main_input_name != "input_ids":
            raise CheckpointError(f"{checkpoint.label}: {kind} reads {self.model.main_input_name}, not text; calibration has text to give only")
        if getattr(self.model.config, "_experts_implementation", "eager") != "eager":
            self.model.set_experts_implementation("eager")  # an expert at a time, each with the weights that are its own
        _fill_buffers(self.model)
        stored: dict[tuple[str, int], list[str]] = {}  # the tensors of each block of the model
        for name, meaning in self.map.tensors.items():
            place = layer_of(meaning.parameter) if meaning.parameter is not None else None
            if place is not None and meaning.stack == self.map.stack and meaning.block is not None:
                stored.setdefault(place, []).append(name)
        stacks = list(dict.fromkeys(stack for stack, _ in stored))
        if len(stacks) != 1:
            raise CheckpointError(f"{checkpoint.label}: {kind} has no stack of blocks that calibration could walk through")
        self.stack = stacks[0]  # by its name in the model
        self.blocks: list[Any] = list(self.model.get_submodule(self.stack))
        if (layers := getattr(self.model.config.get_text_config(), "num_hidden_layers", None)) not in (None, len(self.blocks)):
            raise CheckpointError(f"{checkpoint.label}: {kind} runs {layers} layers with {len(self.blocks)} blocks; calibration needs a block for each")
        self.names = [tuple(stored.get((self.stack, number), ())) for number in range(len(self.blocks))]

    def block_name(self, number: int) -> str:
        """The name of a block in the checkpoint: "model.layers.3"."""
        return f"{self.map.stack}.{number}" if self.map.stack else str(number)

    def load(self, names: Iterable[str]) -> None:
        """Fill the parameters that these tensors stand for, in float32; transformers maps the names. Errors: CheckpointError where they do not fit."""
        reader = Reader(self.checkpoint, quiet())
        try:
            self._fill({name: Unread(reader, name) for name in names})
        except Exception:
            if reader.error is not None:
                raise reader.error from None
            raise

    def _fill(self, state: Mapping[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        with silent_transformers():
            config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=get_model_conversion_mapping(self.model))
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(state), config)
        kind = type(self.model).__name__
        if info.mismatched_keys:
            name, here, there = sorted(info.mismatched_keys)[0]
            raise CheckpointError(f"{self.checkpoint.label} does not fit {kind}: {name} is {list(here)}, not {list(there)}")
        if info.conversion_errors:
            raise CheckpointError(f"{self.checkpoint.label} does not fit {kind}: its experts cannot be packed as the model has them")
        self.model.requires_grad_(False)

    def load_block(self, number: int, device: str = "cpu") -> dict[str, Tensor]:
        """Fill a block, on this device. Its linear weights [out, in] by their names in the checkpoint: views of the module's parameters.

        Experts are slices of what transformers packs; those whose place in it cannot be found are left out.
        """
        names, tensors = self.names[number], self.map.tensors
        linears = [name for name in names if tensors[name].role == "linear"]
        inside = {name for name, _ in self.model.named_parameters()}
        packed = [name for name in linears if tensors[name].parameter in inside and tuple(self._parameter(name).shape) != self.checkpoint.specs[name].shape]
        places = self._places(packed) if packed else {}
        _empty(self.blocks[number])
        self.load(names)
        missing = [name for name, value in self.blocks[number].state_dict().items() if value.is_meta]
        if missing:
            raise CheckpointError(f"{self.checkpoint.label}: {self.block_name(number)} lacks {missing[0]}; is the checkpoint complete?")
        self.blocks[number].to(device)
        found: dict[str, Tensor] = {}
        for name in linears:
            if name in places:
                expert, rows = places[name]
                found[name] = self._parameter(name).data[expert, rows]
            elif name not in packed and tensors[name].parameter is not None:
                weight = self._parameter(name).data
                found[name] = weight.T if tensors[name].transposed else weight
        return found

    def _parameter(self, name: str) -> Any:
        return self.model.get_parameter(self.map.tensors[name].parameter)

    def _places(self, names: Iterable[str]) -> dict[str, tuple[int, slice]]:
        """Which expert and which rows of it each stored weight becomes: each is filled with its own number, and transformers packs the numbers."""
        order = dict(enumerate(names, 1))
        self._fill({name: torch.full((), float(number)).expand(self.checkpoint.specs[name].shape) for number, name in order.items()})
        found: dict[str, tuple[int, slice]] = {}
        for parameter in dict.fromkeys(self.map.tensors[name].parameter for name in order.values()):
            packed = self.model.get_parameter(parameter)
            if packed.dim() != 3 or packed.is_meta:
                continue
            for expert, column in enumerate(packed[:, :, 0]):
                row = 0
                for number, count in zip(*(part.tolist() for part in torch.unique_consecutive(column, return_counts=True)), strict=True):
                    if tuple(self.checkpoint.specs[order[int(number)]].shape) == (count, packed.shape[2]):  # not turned, not interleaved
                        found[order[int(number)]] = expert, slice(row, row + count)
                    row += count
        return found

    def drop_block(self, number: int) -> None:
        """Take a block's weights from memory."""
        _empty(self.blocks[number])

    def record(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Call]]]:
        """For each batch of ids, int64 [windows, window], the hidden states before the first block, and what each block is called with.

        The model's own forward runs, with all that stands before its blocks; the blocks themselves hand on what they get.
        Errors: CheckpointError for a model that does more between its blocks, or does not call each of them once.
        """
        known: dict[Any, Any] = {}  # what is the same for many blocks and batches is kept once
        wrapped: bool | None = None
        with self._front(torch.cat([batch.flatten() for batch in batches])):
            for ids in batches:
                for wrap in (False, True) if wrapped is None else (wrapped,):
                    calls, states, straight = self._record(ids, wrap)
                    if straight:
                        wrapped = wrap
                        break
                else:
                    kind = type(self.model).__name__
                    raise CheckpointError(
                        f"{self.checkpoint.label}: {kind} does more between its blocks than hand hidden states on; it cannot be calibrated block by block"
                    )
                yield states, [Call(_interned(call.args, known), _interned(call.kwargs, known), call.named) for call in calls]

    @contextmanager
    def _front(self, ids: Tensor) -> Iterator[None]:
        """What stands before the blocks has its weights inside; of the table of input embeddings only the rows of these ids."""
        before = self._before()
        table = self.model.get_input_embeddings()
        name = next((name for name in before if self._parameter(name) is getattr(table, "weight", None)), None)
        if name is None or not isinstance(table, nn.Embedding):
            self.load(before)
        else:
            self.load(other for other in before if other != name)
            weight, padding = table.weight, table.padding_idx
            used = torch.unique(ids)
            table.weight, table.padding_idx = nn.Parameter(self._rows(name, used), requires_grad=False), None  # which must be one of its rows
            hook = table.register_forward_pre_hook(lambda _, args: (torch.searchsorted(used, args[0]), *args[1:]))
        try:
            yield
        finally:
            for other in before:
                _empty(self.model.get_submodule(str(self.map.tensors[other].parameter).rpartition(".")[0]))
            if name is not None and isinstance(table, nn.Embedding):
                hook.remove()
                table.weight, table.padding_idx = weight, padding

    def _rows(self, name: str, used: Tensor) -> Tensor:
        """Rows of a tensor in float32, from pieces of it."""
        found = []
        for rows in copy_step(self.checkpoint, name).slabs():
            inside = used[(used >= rows.start) & (used < rows.stop)]
            if len(inside):
                found.append(self.checkpoint.read(name, rows)[inside - rows.start].float())
        return torch.cat(found)

    def _before(self) -> list[str]:
        """The tensors that may stand before the blocks: embeddings, and what the model made before it made the blocks."""
        order = {name: number for number, name in enumerate(self.model.state_dict())}
        first = min(number for name, number in order.items() if name.startswith(f"{self.stack}."))
        loose = [meaning for meaning in self.map.tensors.values() if meaning.parameter in order and not str(meaning.parameter).startswith(f"{self.stack}.")]
        return [each.name for each in loose if each.role == "embedding" or (each.role != "head" and order[str(each.parameter)] < first)]

    def _record(self, ids: Tensor, wrap: bool) -> tuple[list[Call], Tensor, bool]:
        calls: list[Call] = []
        handed: list[Tensor] = []
        straight = True

        def stand_in(number: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal straight
                states, call = Call.of(args, kwargs)
                straight = straight and len(calls) == number and (not handed or states is handed[-1])
                calls.append(call)
                handed.append(states)
                if number == len(self.blocks) - 1 or not straight:
                    raise _Seen
                return (states,) if wrap else states

            return forward

        flags = {"use_cache": False} if hasattr(self.model.config.get_text_config(), "use_cache") else {}
        with _replaced(self.blocks, stand_in), torch.no_grad(), suppress(_Seen):
            self.model(input_ids=ids, **flags)
        return calls, handed[0], straight and len(calls) == len(self.blocks)


class _Seen(Exception):
    """All that was to be seen of a forward."""


@contextmanager
def _replaced(blocks: list[Any], stand_in: Any) -> Iterator[None]:
    """The blocks' forward functions replaced; the blocks keep their attributes, which models look at."""
    for number, block in enumerate(blocks):
        block.forward = stand_in(number)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _fill_buffers(model: Any) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, causal masks), as transformers does when it loads a model."""
    for name, buffer in model.named_non_persistent_buffers():
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    with silent_transformers(), torch.no_grad():
        model.initialize_weights()


def _empty(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                part._buffers[name] = torch.empty_like(buffer, device="meta")


def _interned(value: Any, known: dict[Any, Any]) -> Any:
    """The same, with equal tensors made one."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        raw = leaf.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if leaf.numel() else b""
        key = (leaf.dtype, tuple(leaf.shape), hash(raw))
        kept = known.setdefault(key, leaf)
        return kept if torch.equal(kept, leaf) else leaf

    return tree_map(one, value)
