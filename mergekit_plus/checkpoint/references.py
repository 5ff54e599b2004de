"""How a checkpoint with adapters is referred to: `model+lora+lora`. What exists on the disk under a name with a `+` in it goes by that name."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError


def split_reference(ref: str, folder: Path = Path()) -> list[str]:
    """The model and the adapters of a reference, one item where there are none; paths are looked up relative to `folder`.

    Errors: CheckpointError where nothing stands on one side of a `+`.
    """
    words = ref.split("+")
    for count in range(len(words), 0, -1):  # the longest path that there is
        head = "+".join(words[:count])
        if head and (folder / Path(head).expanduser()).exists():
            break
    else:
        head, count = words[0], 1
    if not head or words[count:] == [""]:
        raise CheckpointError(f"{ref}: a '+' stands between a model and an adapter, as in org/model+org/lora")
    return [head, *(split_reference("+".join(words[count:]), folder) if count < len(words) else [])]
