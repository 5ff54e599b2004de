"""Merge two models straight from a Hub on the loopback: throughput beside a plain loop of range requests, and memory for two sizes of model.

    python benchmarks/hub.py --work /tmp/bench

The Hub is the tests' own (tests/hub_server.py), in a process of its own; large files are redirected to another origin, as on huggingface.co. The
plain loop asks for the same bytes with huggingface_hub's session, 16 MiB at a time, one request after the other, into one buffer, and checks
nothing. "Reader" fetches ahead, checks every answer and hashes every byte, and drops them. "Merge" is a whole linear merge: reading and
hashing as well, computing, writing, hashing what is written, fsync; beside it the same from the disk. Rows take turns; medians are printed. The
machine's speed drifts, so that only the ratios of one run compare; CPU seconds are those of the client, without the Hub's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVE = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from hub_server import Hub
with Hub(cdn=True) as hub:
    for folder in sys.argv[2:]:
        hub.commit(f"org/{Path(folder).name}", Path(folder))
    if float(sys.argv[1]):
        hub.fault("cdn/", throttle=float(sys.argv[1]) * 1e6, times=10**9)
    print(hub.url, flush=True)
    sys.stdin.read()
"""
MEASURE = """
import json, sys, threading, time
from pathlib import Path
from huggingface_hub import HfApi, get_hf_file_metadata, get_session, hf_hub_url

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def measured(work):
    start, peak, done = anonymous(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begun, cpu = time.perf_counter(), time.process_time()
    nbytes = work()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "bytes": nbytes, "anon": peak - start, "cpu": cpu}))
"""
LOOP = """
def loop():
    buffer, total = memoryview(bytearray(16 << 20)), 0
    for repo in sys.argv[2:]:
        for file in HfApi().list_repo_tree(repo):
            if not file.path.endswith(".safetensors"):
                continue
            where = get_hf_file_metadata(hf_hub_url(repo, file.path)).location
            for start in range(0, file.size, len(buffer)):
                stop, at = min(start + len(buffer), file.size), 0
                with get_session().stream("GET", where, headers={"Range": f"bytes={start}-{stop - 1}"}) as answer:
                    for chunk in answer.iter_raw():
                        buffer[at : at + len(chunk)] = chunk
                        at += len(chunk)
                total += at
    return total

measured(loop)
"""
READER = """
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.inputs import input_files
from mergekit_plus.checkpoint.prefetch import Prefetch

def reader():
    buffer, ahead = memoryview(bytearray(16 << 20)), Prefetch(256 << 20)
    opened = [Checkpoint.open(repo) for repo in sys.argv[2:]]
    files = [blob for model in opened for blobs in input_files(model).values() for blob in blobs if blob.name.endswith(".safetensors")]
    parts = [(blob, start, min(len(buffer), blob.size - start)) for blob in files for start in range(0, blob.size, len(buffer))]
    ahead.begin(parts)
    for blob, start, length in parts:
        blob.read_into(buffer[:length], start)
    ahead.finish()
    ahead.close()
    assert all(blob.verified for blob in files)
    return sum(blob.size for blob in files)

measured(reader)
"""
MERGE = """
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.merge.plan import merge

def merged():
    manifest = save(merge([Checkpoint.open(repo) for repo in sys.argv[2:]], "linear"), Path(sys.argv[1]), SaveOptions(memory=1 << 30))
    files = [facts for files in manifest.inputs.values() for name, facts in files.items() if name.endswith(".safetensors")]
    assert all(facts.get("verified", True) for facts in files)
    return sum(facts["bytes"] for facts in files)

measured(merged)
"""


def make(folder: Path, blocks: int, seed: int) -> None:
    """A model of `blocks` blocks of 16 MiB of BF16, in shards of eight."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    weight_map, generator = {}, torch.Generator().manual_seed(seed)
    for first in range(0, blocks, 8):
        file = f"model-{first // 8 + 1:05d}-of-{-(-blocks // 8):05d}.safetensors"
        tensors = {f"layers.{n:03d}.weight": torch.randn(2048, 4096, generator=generator).bfloat16() for n in range(first, min(first + 8, blocks))}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def child(code: str, url: str, work: Path, *arguments: str) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    told = {"HF_ENDPOINT": url, "HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run([sys.executable, "-c", MEASURE + code, str(out), *arguments], env={**os.environ, **told}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Make the models, serve them, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 16 MiB in a model; the small models have a quarter")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--throttle", type=float, default=0, help="MB/s of one connection, as a distant server gives it; by default as fast as it goes")
    options = parser.parse_args()
    folders = {name: options.work / name for name in ("a", "b", "small-a", "small-b")}
    for seed, (name, folder) in enumerate(folders.items()):
        if not folder.exists():
            make(folder, options.blocks // (4 if name.startswith("small") else 1), seed)
    served = [str(options.throttle), *map(str, folders.values())]
    server = subprocess.Popen([sys.executable, "-c", SERVE, *served], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    rows: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.repeat):
        for name, code, models in (("plain loop", LOOP, ("org/a", "org/b")), ("reader", READER, ("org/a", "org/b")), ("merge", MERGE, ("org/a", "org/b")),
                                   ("merge, small", MERGE, ("org/small-a", "org/small-b")),
                                   ("merge from the disk", MERGE, (str(folders["a"]), str(folders["b"])))):  # fmt: skip
            rows.setdefault(name, []).append(child(code, url, options.work, *models))
    server.stdin.close()
    server.wait()
    print("| | input MB | s | CPU s | MB/s | of the plain loop | anon MB |\n|---|---|---|---|---|---|---|")
    loop = [each["bytes"] / each["seconds"] for each in rows["plain loop"]]
    for name, found in rows.items():
        seconds, cpu, anon = (statistics.median(each[key] for each in found) for key in ("seconds", "cpu", "anon"))
        speeds = [each["bytes"] / each["seconds"] for each in found]
        share = statistics.median(speed / plain for speed, plain in zip(speeds, loop, strict=True))
        print(
            f"| {name} | {found[0]['bytes'] / 1e6:.0f} | {seconds:.2f} | {cpu:.2f} | {statistics.median(speeds) / 1e6:.0f} | {share:.2f} | {anon / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
