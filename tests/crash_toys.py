"""Runs that are killed in a process of their own, at a moment that the test chooses, and then go on in this one."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import mergekit_plus.checkpoint.plan as plans
import mergekit_plus.checkpoint.shards as shards
from mergekit_plus.checkpoint import SaveOptions
from mergekit_plus.recipe import check, run
from mergekit_plus.steps import Execution

layouts = importlib.import_module("mergekit_plus.checkpoint.layout")

SMALL = [(plans, "PIECE", 100), (plans, "SLAB", 300), (layouts, "SLAB", 300), (shards, "READ_BACK", 500), (shards, "CHECKPOINT", 1000)]
CALLS = ("mkdir", "rmdir", "unlink", "replace", "fsync", "write", "pwrite", "posix_fallocate")  # what changes a disk

MERGE = {"models": ["a", "b"], "base": "base"}
# what is done; the name of the output; whether one is there already
CASES: dict[str, tuple[list[dict[str, Any]], str, bool]] = {
    "linear": ([{"merge": {"models": ["a", "b"], "method": "linear"}}], "out", False),
    "pcb": ([{"merge": {**MERGE, "method": "pcb", "ratio": 0.3, "exclude_frozen": True}}], "out", False),
    "ties": ([{"merge": {**MERGE, "method": "ties", "density": 0.5}}], "out", False),
    "quantize": ([{"merge": {"models": ["a", "b"]}}, {"quantize": {"bits": 4, "group_size": 32}}], "out", False),
    "overwrite": ([{"merge": {"models": ["a", "b"]}}], "out", True),
    "file": ([{"merge": {"models": ["a", "b"]}}], "out.safetensors", False),
    "overwritten file": ([{"merge": {"models": ["a", "b"]}}], "out.safetensors", True),
}


def write_inputs(folder: Path) -> Path:
    """A base and two models near it, 12 kB each in two shards."""
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(32, 32, generator=generator).half() for n in range(6)}
        (folder / name).mkdir(parents=True)
        index = {}
        for number, names in enumerate((list(tensors)[:2], list(tensors)[2:]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in names}, folder / name / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (folder / name / "config.json").write_text("{}")
    return folder


@dataclass
class Counted:
    """Progress that knows how many bytes were computed, and how many were finished before."""

    label: str = ""
    amounts: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, label: str, total: int | None, unit: str = "B", done: int = 0) -> Iterator[None]:
        self.label, self.before[label] = label, done
        self.amounts.setdefault(label, 0)
        yield

    def advance(self, amount: int) -> None:
        self.amounts[self.label] += amount


def carry_out(case: str, folder: Path, **options: Any) -> Counted:
    """Run a case on the inputs in this folder; the output lies beside them."""
    steps, out, overwrite = CASES[case]
    used = {name for step in steps for name in (*step.get("merge", {}).get("models", []), step.get("merge", {}).get("base")) if name}
    inputs = {name: str(folder / "in" / name) for name in ("base", "a", "b") if name in used}
    progress = Counted()
    how = Execution(SaveOptions(**{"overwrite": overwrite, "max_shard_size": 5000, "workers": 2, "progress": progress, **options}), out=folder / out)
    run(check({"inputs": inputs, "steps": steps}, folder, case), how)
    return progress


class Killer:
    """Counts the calls that change the disk, and kills the process before the n-th; of a write, half is done."""

    def __init__(self, number: int | None, calls: tuple[str, ...] = CALLS) -> None:
        self.number, self.seen, self.lock = number, 0, threading.Lock()
        for name in calls:
            setattr(os, name, self.watched(name, getattr(os, name)))

    def watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            with self.lock:
                self.seen += 1
                now = self.seen == self.number
            if now:
                if name in ("write", "pwrite"):
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return watched


def _child(case: str, folder: Path, number: int | None, calls: tuple[str, ...], options: dict[str, Any]) -> None:
    for module, name, value in SMALL:
        setattr(module, name, value)
    killer = Killer(number, calls)
    carry_out(case, folder, **options)
    (folder / "calls").write_text(str(killer.seen))


def in_a_child(case: str, folder: Path, number: int | None = None, calls: tuple[str, ...] = CALLS, **options: Any) -> int:
    """Run a case in a process that has torch already; -9 where it was killed. `folder/calls` says how many calls it made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mergekit_plus.recipe", "quant.plan"])
    process = context.Process(target=_child, args=(case, folder, number, calls, options))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode
