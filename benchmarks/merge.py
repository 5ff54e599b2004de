"""Merge and quantize Llama-shaped bf16 checkpoints: ours beside mergekit and llm-compressor, and beside the floor, in one run.

    python benchmarks/merge.py --work /tmp/bench --mergekit venv-mk/bin/mergekit-yaml --llmcompressor venv-lc/bin/python

The floor reads every input and writes the output with plain reads and writes (and one fsync), nothing else. Every row is a whole process, imports
included; "peak" is its largest anonymous memory (RssAnon, sampled every 10 ms). Page caches are in the same state for every row: warm, or
with --cold dropped before each. Numbers that compare are the ratios: the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {  # hidden, layers, MLP, key/value width, vocabulary
    "1B": (2048, 22, 5632, 256, 32000),  # TinyLlama's, 1.1 B parameters
    "500M": (2048, 8, 5632, 256, 32000),  # the same largest tensor, fewer layers
}
FLOOR = """
import os, sys
buffer = memoryview(bytearray(16 << 20))
*inputs, out, size = sys.argv[1:]
for path in inputs:
    fd = os.open(path, os.O_RDONLY)
    while os.readv(fd, [buffer]): pass
    os.close(fd)
fd, left = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), int(size)
while left: left -= os.write(fd, buffer[: min(left, len(buffer))])
os.fsync(fd)
"""
PTQ = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="W4A16", ignore=["lm_head", "re:.*embed_tokens.*"], max_workers=2, device="cpu")
"""


def make(folder: Path, shape: str, seed: int, base: Path | None = None) -> None:
    """Write a checkpoint of random weights, or of `base` with a little added to every weight, in shards of 500 MB."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    hidden, layers, mlp, kv, vocab = SHAPES[shape]
    block = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
             "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp), "input_layernorm": (hidden,),
             "post_attention_layernorm": (hidden,)}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}

    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in shapes.items():
        nbytes = 2 * size[0] * (size[1] if len(size) > 1 else 1)
        if filled + nbytes > 500e6:
            groups.append({})
            filled = 0
        groups[-1][name] = size
        filled += nbytes
    folder.mkdir(parents=True)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        tensors = {name: torch.empty(size).normal_(0, 0.02, generator=generator) for name, size in group.items()}
        if base is not None:
            with safe_open(base / file, "pt") as source:
                tensors = {name: source.get_tensor(name) + tensor * 0.05 for name, tensor in tensors.items()}
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp,
              "num_attention_heads": hidden // 64, "num_key_value_heads": kv // 64, "head_dim": 64, "vocab_size": vocab, "dtype": "bfloat16",
              "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "silu"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def run(command: list[str], cold: list[Path]) -> dict[str, float]:
    """Run a process to its end: seconds of wall and CPU, and its peak anonymous memory in MB."""
    for path in cold:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    before = os.times()
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        except (OSError, ValueError, TypeError):
            pass
        time.sleep(0.01)
    wall, after = time.perf_counter() - start, os.times()
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "cpu": cpu, "peak": peak / 1024}


def shards(*folders: Path) -> list[Path]:
    """The tensor files of these folders."""
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs, about 15 GB")
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--compress", default=str(Path(sys.executable).with_name("compress")))
    parser.add_argument("--mergekit", help="mergekit-yaml of a venv with mergekit==0.1.5")
    parser.add_argument("--llmcompressor", help="python of a venv with llmcompressor")
    parser.add_argument("--jobs", default="linear,ties,pcb,quantize")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before every run")
    options = parser.parse_args()

    models = options.work / options.shape
    base, a, b = models / "base", models / "a", models / "b"
    for seed, (folder, origin) in enumerate([(base, None), (a, base), (b, base)]):
        if not folder.exists():
            make(folder, options.shape, seed, origin)
    for path in shards(base, a, b):  # warm
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    out, config = options.work / "out", options.work / "mergekit.yaml"
    entries = "".join(f"  - {{model: {model}, parameters: {{weight: {weight}, density: 0.5}}}}\n" for model, weight in ((a, 0.6), (b, 0.4)))
    both = f"models:\n{entries}dtype: bfloat16\n"
    yaml = {"linear": "merge_method: linear\n" + both.replace(", density: 0.5", ""), "ties": f"merge_method: ties\nbase_model: {base}\n" + both}
    merge = [options.compress, "merge", str(a), str(b), "-o", str(out)]
    task = ["-b", str(base), "-s"]
    ours = {
        "linear": [*merge, "-s", "weight=0.6,0.4"],
        "ties": [*merge, "-m", "ties", *task, "weight=0.6,0.4", "-s", "density=0.5"],
        "pcb": [*merge, "-m", "pcb", *task, "lambda=0.5"],
        "quantize": [options.compress, "quantize", str(a), "--bits", "4", "-o", str(out)],
        "quantize, no clip search": [options.compress, "quantize", str(a), "--bits", "4", "-s", "clip=0", "-o", str(out)],
    }
    print(f"{options.shape}, {len(shards(base))} shards a model, {sum(p.stat().st_size for p in shards(base)) / 1e9:.2f} GB each, "
          f"{'cold' if options.cold else 'warm'} cache, {len(os.sched_getaffinity(0))} cores, median of {options.runs}")  # fmt: skip
    print("| job | tool | wall s | CPU s | peak anon MB | wall / floor | ours / it |\n|---|---|---|---|---|---|---|")
    for job in options.jobs.split(","):
        names = [job, "quantize, no clip search"] if job == "quantize" else [job]
        inputs = shards(a) if job == "quantize" else shards(a, b) if job == "linear" else shards(base, a, b)
        rows: dict[str, list[dict[str, float]]] = {}
        written = 0
        for _ in range(options.runs):
            for name in names:
                shutil.rmtree(out, ignore_errors=True)
                rows.setdefault(f"ours ({name})" if len(names) > 1 else "ours", []).append(run(ours[name], inputs if options.cold else []))
            written = sum(path.stat().st_size for path in shards(out))
            shutil.rmtree(out)
            if job in yaml and options.mergekit:
                config.write_text(yaml[job])
                rows.setdefault("mergekit 0.1.5", []).append(
                    run([options.mergekit, str(config), str(out), "--no-copy-tokenizer", "--quiet"], inputs if options.cold else []))  # fmt: skip
                shutil.rmtree(out)
            if job == "quantize" and options.llmcompressor:
                rows.setdefault("llm-compressor model_free_ptq", []).append(
                    run([options.llmcompressor, "-c", PTQ, str(a), str(out)], inputs if options.cold else []))  # fmt: skip
                shutil.rmtree(out)
            floor = [sys.executable, "-c", FLOOR, *map(str, inputs), str(out), str(written)]
            rows.setdefault("floor", []).append(run(floor, inputs if options.cold else []))
            out.unlink()
        medians = {tool: {key: statistics.median(row[key] for row in found) for key in found[0]} for tool, found in rows.items()}
        first = next(iter(medians.values()))
        for tool, row in medians.items():
            ratio = f"{first['wall'] / row['wall']:.2f}" if not tool.startswith("ours") else ""
            over = row["wall"] / medians["floor"]["wall"]
            print(f"| {job} | {tool} | {row['wall']:.2f} | {row['cpu']:.2f} | {row['peak']:.0f} | {over:.2f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
