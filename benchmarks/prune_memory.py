"""Memory and time of global magnitude pruning of a large checkpoint: `python benchmarks/prune_memory.py [--parameters 2.1]`.

A checkpoint of so many billion parameters in bfloat16 is made up on the disk (the same random weights again and again: each magnitude ties with thousands),
pruned to a half over the whole model in a process of its own, and the result is counted. The anonymous memory of that process is watched from inside
it. The target is under 1 GiB, and two passes over the weights, of which one writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, MLP = 2048, 8192
PRUNE = """
    import json, sys, threading, time
    from pathlib import Path
    from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
    from mergekit_plus.checkpoint.scan import Scan
    from prune import Sparsity
    from prune.plan import prune

    def anonymous():
        return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

    peak, done, passes, mapped = anonymous(), threading.Event(), [], Scan.map
    def watch():
        global peak
        while not done.wait(0.01):
            peak = max(peak, anonymous())
    def counted(self, visit, sample=False, only=None):
        passes.append("a sixteenth" if sample else "all" if only is None else "one piece")
        return mapped(self, visit, sample, only)
    Scan.map = counted
    threading.Thread(target=watch, daemon=True).start()
    before, start = peak, time.monotonic()
    save(prune(Checkpoint.open(sys.argv[1]), Sparsity.of(0.5), scope="global"), Path(sys.argv[2]), SaveOptions(memory=600_000_000))
    done.set()
    print(json.dumps({"before": before, "peak": peak, "seconds": time.monotonic() - start, "passes": passes}))
"""


def write_model(folder: Path, billions: float) -> int:
    """Blocks of a Llama's linear layers; the weights that pruning works on are counted."""
    folder.mkdir()
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 4, HIDDEN), "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
              "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP)}  # fmt: skip
    blocks = round(billions * 1e9 / sum(rows * inputs for rows, inputs in shapes.values()))
    weights = (torch.randn(MLP * HIDDEN, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    weight_map, total = {}, 0
    for block in range(blocks):
        shard = f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"
        tensors = {f"model.layers.{block}.{name}.weight": weights[: rows * inputs].view(rows, inputs).clone() for name, (rows, inputs) in shapes.items()}
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.numel() for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "of-no-library"}))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=2.1, help="billions")
    parser.add_argument("--folder", type=Path, help="where there is room for twice the model (default: the temporary folder)")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from mergekit_plus.checkpoint import Checkpoint

    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        model, out = Path(name, "model"), Path(name, "pruned")
        total = write_model(model, given.parameters)
        command = [sys.executable, "-c", textwrap.dedent(PRUNE), str(model), str(out)]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        found = json.loads(run.stdout)
        pruned = Checkpoint.open(out)
        zeros = sum(int((pruned.read(tensor) == 0).sum()) for tensor in pruned.specs)
    nbytes = 2 * total
    print(f"{total / 1e9:.2f} billion weights, {nbytes / 1e9:.1f} GB; {zeros} zeros, {zeros - total // 2:+d} of the half")
    print(f"peak {found['peak'] / 2**20:.0f} MiB of anonymous memory ({found['before'] / 2**20:.0f} MiB of them before the work)")
    print(f"read: {', '.join(found['passes'])} to measure, then all to write; {found['seconds']:.0f} s, {nbytes / found['seconds'] / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
