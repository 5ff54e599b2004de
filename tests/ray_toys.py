"""Checkpoints that a Ray worker can make again, with steps that wait to be killed, kill, or fail. Beside it: a save that is killed with its process.

    python ray_toys.py FOLDER ADDRESS
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, Plan, SaveOptions, Step, TensorSpec, save
from mergekit_plus.checkpoint.on_ray import OnRay
from mergekit_plus.errors import OptionError

NAMES = [f"layers.{number}.weight" for number in range(8)]
SHARDS = SaveOptions(workers=2, memory=1 << 30, max_shard_size=2000, job="toy")


def toy(folder: Path, before: str = "") -> Checkpoint:
    """Eight tensors, each the double of one of the file `in.safetensors`; the sixth is computed after what `before` names."""
    source = Checkpoint.open(folder / "in.safetensors")
    specs = [source.specs[name] for name in NAMES]
    act = ACTS[before] if before else None
    return Checkpoint("toy", Plan(_step(source, spec, partial(act, folder / "seen") if act and spec.name == NAMES[5] else None) for spec in specs))


def _step(source: Checkpoint, spec: TensorSpec, act: Callable[[], None] | None) -> Step:
    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        if act is not None:
            act()
        return [tensors[0] * 2]

    return Step(((source, spec.name),), (spec,), run, multiple=1)


def wait_to_be_killed(seen: Path) -> None:
    """Whoever comes first says who it is, and goes no further."""
    try:
        fd = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return
    os.write(fd, f"{os.getpid()}\n".encode())
    os.close(fd)
    time.sleep(600)


def die(seen: Path) -> None:
    os.kill(os.getpid(), 9)


def refuse(seen: Path) -> None:
    raise OptionError("layers.5: three is not a bit width; write 2")


def fail(seen: Path) -> None:
    torch.ones(2) + torch.ones(3)


ACTS: dict[str, Callable[[Path], None]] = {act.__name__: act for act in (wait_to_be_killed, die, refuse, fail)}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    made = partial(toy, place, "wait_to_be_killed")
    with OnRay(made, sys.argv[2]) as crew:
        save(made(), place / "out", SaveOptions(**{**{name: getattr(SHARDS, name) for name in ("workers", "memory", "max_shard_size", "job")}, "crew": crew}))
