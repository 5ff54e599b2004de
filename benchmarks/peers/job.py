"""What the peers' drivers share: the job that they are given, and what they hand back. Runs in the peer's interpreter, without this project.

    VENV/bin/python run_llmcompressor.py JOB.json

JOB.json names the model's folder, a safetensors file with the calibration tokens ("ids", int64 [windows, window]), the method, bits and group size, the
number of threads and an output folder. In that folder the driver leaves `dense/`, an ordinary checkpoint in float32 of what the peer made, decoded by its
own code, and `result.json`: the seconds that quantizing took, the bytes of the peer's own file, its versions.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class Job:
    """One quantisation by a peer."""

    def __init__(self) -> None:
        given = json.loads(Path(sys.argv[1]).read_text())
        self.model: str = given["model"]
        self.out = Path(given["out"])
        self.method: str = given["method"]
        self.bits: int = given["bits"]
        self.group_size: int = given["group_size"]
        self.options: dict[str, Any] = given.get("options", {})
        self.ids = load_file(given["tokens"])["ids"]
        self.rows = [{"input_ids": row, "attention_mask": row.new_ones(len(row))} for row in self.ids]  # as tokenizers hand them out
        self.dtype = getattr(torch, given["dtype"])
        self.packed = self.out / "packed"
        self.facts: dict[str, Any] = {}
        torch.set_num_threads(given["threads"])
        torch.manual_seed(0)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The wall and the processor time of quantizing alone: neither imports, nor loading, nor saving."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.facts |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}

    def finish(self, dense: Callable[[str], torch.Tensor | None], packages: list[str], nbytes: int | None = None) -> None:
        """Write the dense checkpoint: the model's own tensors, but for those that `dense` has a decoded value of."""
        folder = self.out / "dense"
        folder.mkdir()
        tensors, replaced = {}, []
        for path in sorted(Path(self.model).glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                decoded = dense(name)
                if decoded is not None:
                    replaced.append(name)
                    assert decoded.shape == tensor.shape, name
                tensors[name] = (tensor if decoded is None else decoded.detach()).float().contiguous().clone()
        save_file(tensors, folder / "model.safetensors")
        for path in Path(self.model).iterdir():
            if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
        if nbytes is None:
            nbytes = sum(path.stat().st_size for path in self.packed.glob("*.safetensors"))
        self.facts |= {"bytes": nbytes, "replaced": sorted(replaced), "versions": {name: version(name) for name in (*packages, "transformers", "torch")}}
        (self.out / "result.json").write_text(json.dumps(self.facts))
