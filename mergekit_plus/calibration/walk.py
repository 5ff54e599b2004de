"""The walk: block after block is filled, worked on, run and dropped, and what is finished survives a kill."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.deferred import Work
from ..errors import CheckpointError, OptionError
from ..model import ModelMap, vocabulary_size
from .block import Block, with_dense
from .products import multiplies_in_bfloat16
from .skeleton import Call, Skeleton
from .states import TOKENS, HiddenStates, batch_size


def walk(
    checkpoint: Checkpoint, ids: Tensor, process: Callable[[Block], dict[str, Tensor]], work: Work, *, cross: bool = False, device: str = "cpu"
) -> list[Checkpoint]:
    """Work on every block of a model while a text stands before it: int64 ids [windows, window]. What `process` returns, block by block.

    `process` leaves in the block's module the weights that the blocks behind it shall see, and returns the tensors to keep; it is not called
    for a block whose part is finished. With `cross` the text flows through the unchanged blocks too: a block twice in memory, and two files of
    hidden states. Memory: a block in float32, what `process` needs, the hidden states of a batch; the rest of them lie in `work.folder`.
    Errors: CheckpointError for a model that is no one stack of blocks, OptionError for ids that it cannot take.
    """
    skeleton = Skeleton(checkpoint)
    check_ids(checkpoint, skeleton, ids)
    count = len(skeleton.blocks)
    calls: list[list[Call]] = []
    current: dict[str, HiddenStates] = {}

    def keep(kind: str, number: int, batches: Iterator[Tensor]) -> HiddenStates:
        states = HiddenStates.write(work.folder / f"{kind}-{number}", batches)
        work.keep(states.path.name)
        return states

    def begin(number: int) -> None:
        """The hidden states before a block: those before the first, or those that the last run left."""
        first = HiddenStates.write(work.folder / "first", _first(skeleton, ids, calls))
        for kind in ("states", *(["dense"] if cross else [])):
            if number and not work.has(f"{kind}-{number}"):
                raise CheckpointError(f"{work.folder}: the hidden states before block {number} are gone; start again without --resume")
            current[kind] = replace(first, path=work.folder / f"{kind}-{number}") if number else first
        if number:
            first.path.unlink()

    def compute(number: int) -> dict[str, Tensor]:
        if not current:
            begin(number)
        weights, module = skeleton.load_block(number, device), skeleton.blocks[number]
        dense, dense_weights = with_dense(module, weights) if cross else (None, {})
        names = skeleton.names[number]
        bfloat16 = multiplies_in_bfloat16((checkpoint.specs[name] for name in weights), device)
        block = Block(
            number, skeleton.block_name(number), names, module, weights, current["states"], calls, device,
            current.get("dense"), dense, dense_weights, bfloat16,
        )  # fmt: skip
        tensors = process(block)
        if number + 1 < count:
            after = {"states": keep("states", number + 1, block.outputs())}
            if cross:
                after["dense"] = keep("dense", number + 1, block.dense_outputs())
            current.update(after)
        skeleton.drop_block(number)
        return tensors

    found = []
    with work.progress.phase("blocks", count, " blocks"), _set_aside():
        for number in range(count):
            found.append(work.part(f"block-{number}", partial(compute, number)))
            for kind in ("states", "dense"):
                (work.folder / (f"{kind}-{number}" if number else "first")).unlink(missing_ok=True)
            _give_back_memory()
            work.progress.advance(1)
    return found


@contextmanager
def _set_aside() -> Iterator[None]:
    """What is there already is not gone through each time that garbage is collected: with transformers loaded, hundreds of thousands of objects."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _give_back_memory() -> None:
    """What a block leaves behind goes back to the system: references in a circle, and what the C library keeps for later, which comes to several blocks."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)


def memory(checkpoint: Checkpoint, roles: ModelMap, cross: bool = False) -> int:
    """Bytes that a walk takes at most: the largest block in float32 and what its experts are packed from, the Gram matrices of its inputs, and
    what flows through it of a batch; with `cross` all of that twice."""
    most = 0
    shared = {name for group in roles.fused if ".experts." not in group[0] for name in group[1:]}
    for names in roles.blocks.values():
        specs = {name: checkpoint.specs[name] for name in names}
        linears = [name for name in names if roles.tensors[name].role == "linear"]
        widths = [specs[name].shape[0 if roles.tensors[name].transposed else 1] for name in linears if name not in shared]
        experts = [name for name in linears if ".experts." in name]
        weights = sum(spec.numel for spec in specs.values()) + sum(specs[name].numel for name in experts)
        flowing = TOKENS * sum(sum(specs[name].shape) for name in linears if ".experts." not in name)
        most = max(most, 4 * (1 + cross) * (weights + sum(width * width for width in widths) + flowing))
    return most


def check_ids(checkpoint: Checkpoint, skeleton: Skeleton, ids: Tensor) -> None:
    """OptionError for windows that the model cannot take."""
    size = vocabulary_size(checkpoint)
    if size is not None and int(ids.max()) >= size:
        raise OptionError(f"token {int(ids.max())} is outside the model's vocabulary of {size}; is the tokenizer another model's?")
    longest = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    if longest and ids.shape[1] > longest:
        raise OptionError(f"a window of {ids.shape[1]} tokens: the model takes {longest} at most; give a smaller --window")


def _first(skeleton: Skeleton, ids: Tensor, calls: list[list[Call]]) -> Iterator[Tensor]:
    """The hidden states before the first block; `calls` gets what the blocks are called with."""
    for states, of_blocks in skeleton.record(torch.split(ids, batch_size(ids.shape[1]))):
        calls.append(of_blocks)
        yield states
