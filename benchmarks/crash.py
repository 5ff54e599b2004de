"""Kill a merge again and again, at random moments of its progress, and resume it: is the result what an undisturbed run makes?

    python benchmarks/crash.py --kills 50

Whole `compress merge` processes get SIGKILL once the bytes that they have read and written since they locked their output (as /proc counts them)
pass a random goal, so measuring, writing and publishing are all hit, each about as often as it is long. Each run is then resumed, and its output compared
byte for byte. What each kill left is looked at from the outside and counted.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from mergekit_plus.checkpoint.journal import read

LAYERS, ROWS, COLUMNS = 24, 1024, 1024  # of each model: 48 MB in float16
METHODS = {"pcb": ["-m", "pcb", "-b", "base.safetensors"], "linear": []}  # two passes to measure before the writing; none


def write_models(folder: Path) -> None:
    """A base and two models near it."""
    torch.manual_seed(0)
    base = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(ROWS, COLUMNS).half() for n in range(LAYERS)}
    for name in ("base", "a", "b"):
        tensors = {key: value + 0.01 * torch.randn(ROWS, COLUMNS).half() for key, value in base.items()} if name != "base" else base
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})


def start(folder: Path, method: str, resume: bool = False) -> subprocess.Popen[bytes]:
    """A whole program, as a user starts it."""
    merge = ["merge", "a.safetensors", "b.safetensors", *METHODS[method], "-o", "out", "--max-shard-size", "5MB", "--memory", "1GB"]
    command = [sys.executable, "-m", "mergekit_plus", *merge, *(["--resume"] if resume else [])]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def moved(process: subprocess.Popen[bytes]) -> int:
    """Bytes that a process has read and written so far."""
    try:
        counters = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    except OSError:  # it has ended
        return 0
    return int(counters["rchar"]) + int(counters["wchar"])


def follow(process: subprocess.Popen[bytes], folder: Path, goal: float) -> tuple[bool, int]:
    """Kill the process when it has moved so many bytes since it locked its output; whether that happened before it ended, and how many it moved."""
    begun = most = 0
    while process.poll() is None:
        if begun or (folder / ".out.partial" / "lock").exists():
            now = moved(process)
            begun = begun or now
            most = max(most, now - begun)
            if most > goal:
                process.kill()
                process.wait()
                return process.returncode == -9, most
        time.sleep(0.0005)
    if process.returncode:
        sys.exit(f"a run failed: {process.stderr.read().decode() if process.stderr else ''}")
    return False, most


def state(folder: Path, shards: int) -> str:
    """What a kill left."""
    done = read(folder / ".out.partial" / "journal")
    finished = len(done.shards)
    if (folder / "out").exists():
        return "6 published"
    if done.publishing:
        return "5 publishing"
    if finished == shards:
        return "4 all shards finished"
    if finished:
        return f"3 {'less' if finished < shards / 2 else 'more'} than half of the shards"
    return "2 measured" if len(done.statistics) == 2 else "1 no shard finished"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the output."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "out").iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        write_models(folder)
        expected: dict[str, dict[str, str]] = {}
        whole: dict[str, int] = {}
        for method in METHODS:
            begun = time.monotonic()
            _, whole[method] = follow(start(folder, method), folder, float("inf"))
            expected[method] = digests(folder)
            shards = sum(name.endswith(".safetensors") for name in expected[method])
            print(f"{method}, undisturbed: {time.monotonic() - begun:.1f} s, {whole[method] / 1e6:.0f} MB read and written, {shards} shards")
            shutil.rmtree(folder / "out")
        states: Counter[str] = Counter()
        again: dict[str, list[float]] = {}
        same = kills = 0
        while kills < arguments.kills:
            method = list(METHODS)[kills % 2]
            killed, _ = follow(start(folder, method), folder, draw.uniform(0, whole[method]))
            if killed:
                kills += 1
                found = state(folder, shards)
                states[found] += 1
                if not (folder / "out").exists() or (folder / ".out.partial" / "journal").exists():
                    _, moved_again = follow(start(folder, method, resume=True), folder, float("inf"))
                    again.setdefault(found, []).append(moved_again / whole[method])
                same += digests(folder) == expected[method]
            shutil.rmtree(folder / "out")
            shutil.rmtree(folder / ".out.partial", ignore_errors=True)
        for name, number in sorted(states.items()):
            moves = f"resumed, it moves {sum(again[name]) / len(again[name]):4.0%} of an undisturbed run's bytes" if name in again else ""
            print(f"{name[2:]:32} {number:3} {moves}")
        print(f"{same} of {kills} byte-identical")
    sys.exit(same != kills)


if __name__ == "__main__":
    main()
