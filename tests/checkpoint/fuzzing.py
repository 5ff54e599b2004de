"""Files and indexes with a few bytes or tokens changed, and what must hold of each. test_fuzzing.py runs some thousands; for a night of them:

    python tests/checkpoint/fuzzing.py --seconds 30000 --seed 1

A file that breaks the rule is kept in corpus/, from where the tests take it too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import safetensors
from safetensors import SafetensorError

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.safetensors import encode_header, file_order, read_header
from mergekit_plus.checkpoint.spec import TensorSpec
from mergekit_plus.errors import CheckpointError

CORPUS = Path(__file__).parent / "corpus"  # ok-*.bin are files that are read, no-*.bin are refused; index-*.bin are indexes
TOKENS = [
    b'"F32"', b'"F4"', b'"BF16"', b'"BOOL"', b"0", b"1", b"2", b"4", b"8", b"16", b"-0", b"1.0", b"1e0", b"00", b"[", b"]", b"{", b"}", b",", b":", b" ",
    b'"w"', b'"a"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"\\u0061"', b'"\\ud83e\\udd99"', b'"\\ud800"', b'"\xc3\xa9"',
    b"null", b"true", b"NaN", b"\n", b"\t", b"\0", b"\xff", b'""', b"281474976710656", b"18446744073709551616", b'"weight_map"', b'"metadata"',
    b'"model-00001-of-00002.safetensors"', b"../", b"/",
]  # fmt: skip
# Where the library reads a file that we refuse, it is for one of these: two programs could read two models from it, or no model has it.
STRICTER = re.compile(
    r"appears twice|must have exactly|name is empty, too long or has control|is not a JSON object|tensors; at most|impossible (shape|offsets|number)"
)

Edit = tuple[float, int, bytes]  # where (a share of the length), how many bytes go, what comes in their place


def edited(raw: bytes, edits: Sequence[Edit]) -> bytes:
    """The bytes with these edits made, one after the other."""
    for share, gone, new in edits:
        start = int(share * len(raw))
        raw = raw[:start] + new + raw[start + gone :]
    return raw


def edited_file(content: bytes, edits: Sequence[Edit], recount: bool) -> bytes:
    """A file with edits in its header, whose length is then told again; or anywhere."""
    length = int.from_bytes(content[:8], "little")
    if not recount or length > len(content) - 8:
        return edited(content, edits)
    header = edited(content[8 : 8 + length], edits)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


class Memory:
    """A file in memory."""

    def __init__(self, content: bytes) -> None:
        self.content, self.size, self.path, self.place, self.name = content, len(content), Path("memory"), "memory", "memory"

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]


def wrong_with_file(content: bytes) -> str | None:
    """What is wrong with how we read a file, beside the safetensors library: we may refuse more (for good reasons), and read nothing else."""
    try:
        theirs = {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in safetensors.deserialize(content)}
        refused = None
    except SafetensorError as error:
        theirs, refused = {}, str(error)
    try:
        header = read_header(Memory(content))  # type: ignore[arg-type]
    except CheckpointError as error:
        return None if refused or STRICTER.search(str(error)) else f"the library reads it, we refuse it: {error}"
    except Exception:
        return traceback.format_exc()
    places = {name: (header.offsets[name], header.offsets[name] + spec.nbytes) for name, spec in header.specs.items()}
    ours = {name: (spec.dtype, spec.shape, content[slice(*places[name])]) for name, spec in header.specs.items()}
    return f"we read it, the library refuses it: {refused}" if refused else None if ours == theirs else f"we read {ours}, the library {theirs}"


SHARDS = {"model-00001-of-00002.safetensors": ("a", "b"), "model-00002-of-00002.safetensors": ("w",)}
WEIGHT_MAP = {name: shard for shard, names in SHARDS.items() for name in names}


def write_shards(folder: Path) -> None:
    """The two shards of `SHARDS`."""
    for shard, names in SHARDS.items():
        header, _ = encode_header(file_order(TensorSpec(name, "U8", (1,)) for name in names))
        (folder / shard).write_bytes(header + b"x" * len(names))


def wrong_with_index(index: bytes, folder: Path) -> str | None:
    """What is wrong with how we read an index beside those shards: only one that says where the tensors are may be read."""
    path = folder / "model.safetensors.index.json"
    path.unlink(missing_ok=True)  # truncating in place makes ext4 flush
    path.write_bytes(index)
    try:
        read = Checkpoint.open(folder)
    except CheckpointError:
        return None
    except Exception:
        return traceback.format_exc()
    told = json.loads(index)["weight_map"]
    return None if told == WEIGHT_MAP and set(read.specs) == set(WEIGHT_MAP) else f"{told} was read"


def random_edits(rng: random.Random) -> list[Edit]:
    """Up to four edits."""
    return [(rng.random(), rng.choice([0, 0, 1, 1, 2, 5, 20]), rng.choice([b"", *rng.sample(TOKENS, 3), rng.randbytes(2)])) for _ in range(rng.randrange(5))]


def main() -> None:
    """Edit seeds until the time is over, and keep what breaks the rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, end, tried = random.Random(arguments.seed), time.monotonic() + arguments.seconds, 0
    indexes, files = ([path.read_bytes() for path in sorted(CORPUS.glob(pattern))] for pattern in ("index-*.bin", "[!i]*.bin"))
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder))
        while time.monotonic() < end:
            tried += 1
            index = rng.random() < 0.1
            content = edited(rng.choice(indexes), random_edits(rng)) if index else edited_file(rng.choice(files), random_edits(rng), rng.random() < 0.8)
            if wrong := wrong_with_index(content, Path(folder)) if index else wrong_with_file(content):
                kept = CORPUS / f"{'index' if index else 'found'}-{hashlib.sha256(content).hexdigest()[:8]}.bin"
                kept.write_bytes(content)
                sys.exit(f"{kept}, after {tried}: {wrong}")
    print(f"{tried} tried, nothing found")


if __name__ == "__main__":
    main()
