"""The blocks of a model in memory, each of which can be weakened or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError
from mergekit_plus.evaluate import load_model, windows
from mergekit_plus.model import describe, layer_of
from mergekit_plus.progress import Progress

from .surgery import shareable, stack_of


@dataclass(frozen=True)
class Blocks:
    """The blocks of a transformers model, each of which can be weakened or left out."""

    model: Any
    modules: Sequence[nn.Module]
    shared: frozenset[str] = frozenset()  # the parameters of a block that a group has in common, by their names in it

    def __len__(self) -> int:
        return len(self.modules)

    @contextmanager
    def changed(self, change: Callable[[int, Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Of every block leaves `change(number, entering, leaving)`, hidden states [windows, window, width]."""

        def hook(number: int) -> Callable[..., Any]:
            def forward_hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                entering = args[0] if args else kwargs["hidden_states"]
                leaving = change(number, entering, output if isinstance(output, Tensor) else output[0])
                return leaving if isinstance(output, Tensor) else (leaving, *output[1:])

            return forward_hook

        handles = [module.register_forward_hook(hook(number), with_kwargs=True) for number, module in enumerate(self.modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gated(self, gates: Tensor) -> AbstractContextManager[None]:
        """What each block adds to the hidden states goes through its gate, float [blocks]; at 0 and 1 to the bit as without the block, and as with it."""
        return self.changed(lambda number, entering, leaving: entering.lerp(leaving, gates[number].to(entering.dtype)))

    def shared_of(self, number: int) -> dict[str, nn.Parameter]:
        """The parameters of a block that a group has in common, by their names in it."""
        return {name: parameter for name, parameter in self.modules[number].named_parameters() if name in self.shared}


def load_blocks(checkpoint: Checkpoint, rows: Tensor, device: str, progress: Progress) -> Blocks:
    """The blocks of a checkpoint's model, which is to read these rows, int64 [windows, window]; it is in memory in float32.

    Errors: as `blocks_of`, and CheckpointError for a model that predicts no next token, or cannot read the rows.
    """
    model = load_model(checkpoint, progress=progress).to(device)
    windows(model, rows.flatten(), rows.shape[1])
    return blocks_of(model, checkpoint)


def blocks_of(model: Any, checkpoint: Checkpoint) -> Blocks:
    """The blocks of the model that was loaded from a checkpoint. Errors: CheckpointError for one without a stack of blocks."""
    known = describe(checkpoint)
    places = {place[0] for meaning in known.tensors.values() if meaning.stack == known.stack and (place := layer_of(meaning.parameter or ""))}
    if len(places) != 1:
        raise CheckpointError(f"{checkpoint.label}: {type(model).__name__} has no stack of blocks to fold")
    stack = places.pop()
    shared = {parameter for name in shareable(checkpoint, stack_of(checkpoint)) if (parameter := known.tensors[name].parameter)}
    return Blocks(model, list(model.get_submodule(stack)), frozenset(parameter.removeprefix(f"{stack}.").partition(".")[2] for parameter in shared))
