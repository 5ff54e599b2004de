"""Whether an output, and what it was made of, still are what its manifest says."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .checkpoint.hub import HubFolder, parse_reference, pin, way_back
from .checkpoint.layout import is_file, manifest_name
from .digests import sha256 as sha256_of
from .errors import CheckpointError, ReadError
from .model import quantized_reason
from .progress import Progress, quiet

Facts = Mapping[str, Any]  # {"bytes": size, "sha256": digits}, as a manifest has them
Check = Callable[[], str]  # what is wrong with one file; empty where nothing is


@dataclass
class Verification:
    """What was checked; a problem says which file and what, a note is about what could not be a fault."""

    out: str
    files: int = 0
    bytes: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # with how packed weights are described: engines would load something else
    notes: list[str] = field(default_factory=list)


def verify(out: Path, inputs: bool = False, progress: Progress | None = None) -> Verification:
    """Compare every file of an output with its manifest; with `inputs`, also the files that it was made of. Packed weights are checked against
    config.json, also those in a folder that another program wrote, without a manifest.

    Inputs on a disk are looked for where they were, seen from the output; inputs on the Hub are compared with what the Hub lists for their commit.
    Errors: CheckpointError where there is no manifest, or none that can be read; ReadError where the Hub cannot be asked.
    """
    progress = progress or quiet()
    path = (out.parent if is_file(out) else out) / manifest_name(out)
    found = Verification(str(out))
    if not is_file(out) and not path.exists() and _validate(found, out):
        found.notes.append(f"there is no {path.name}, so that only the description of its packed weights was checked")
        return found
    manifest = _read(path)
    checks = {name: (facts, _of_file(path.parent / name, facts)) for name, facts in manifest["outputs"].items()}
    if not is_file(out):
        extra = sorted(each.name for each in path.parent.iterdir() if each.name not in {*manifest["outputs"], path.name})
        found.notes += [f"{name} is not in the manifest" for name in extra]
    if inputs:
        for ref, files in manifest["inputs"].items():
            checks |= _of_input(ref, files, manifest["places"].get(ref), path.parent, found)
    found.files, found.bytes = len(checks), sum(facts["bytes"] for facts, _ in checks.values())
    with progress.phase("verifying", found.bytes), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = {name: pool.submit(check) for name, (_, check) in checks.items()}
        for name, (facts, _) in checks.items():
            if problem := results[name].result():
                found.problems.append({"file": name, "problem": problem})
            progress.advance(facts["bytes"])
    if not is_file(out) and not found.problems:
        _validate(found, out)
    return found


def _validate(found: Verification, folder: Path) -> bool:
    """Check how packed weights are described; whether there are any."""
    from quant.validate import validate

    if not (folder / "config.json").exists():
        return False
    opened = Checkpoint.open(folder)
    if quantized_reason(opened) is None:
        return False
    result = validate(opened)
    found.wrong += result.problems
    found.notes += result.warnings
    return True


def _read(path: Path) -> dict[str, Any]:
    """A manifest, with names that are names and facts that are facts."""
    try:
        parsed = json.loads(path.read_bytes())
        for files in (parsed["outputs"], *parsed["inputs"].values()):
            for name, facts in files.items():
                if "/" in name or name in ("", ".", "..") or not isinstance(facts["bytes"], int) or not isinstance(facts["sha256"], str):
                    raise ValueError(f"{name!r}: {facts}")
        if not all(isinstance(place, str) for place in parsed.setdefault("places", {}).values()):
            raise ValueError("places must be paths")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; an output without its manifest cannot be verified") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a manifest ({error})") from None
    return dict(parsed)


def _of_input(ref: str, files: Mapping[str, Facts], place: str | None, beside: Path, found: Verification) -> dict[str, tuple[Facts, Check]]:
    """The checks of one input's files."""
    if place is not None:
        folder = Path(os.path.normpath(beside.resolve() / place))
        return {str(folder / name): (facts, _of_file(folder / name, facts)) for name, facts in files.items()}
    reference = parse_reference(ref)
    if reference is None or not reference.revision:
        found.notes.append(f"{ref}: the manifest does not say where it was")
        return {}
    pinned = pin(reference)
    if pinned is None:
        raise ReadError(f"{ref}: the Hub cannot be reached, which is asked for the digests of inputs that lie there ({way_back()})")
    there, listed = pinned
    folder_there = HubFolder(there, listed)
    return {f"{ref}/{name}": (facts, _on_hub(folder_there, name, facts)) for name, facts in files.items()}


def _of_file(path: Path, facts: Facts) -> Check:
    def check() -> str:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    return "it is not a regular file"
                size = status.st_size
                return _differs(size, facts) or _differs(size, facts, str(sha256_of(fd)))
            finally:
                os.close(fd)
        except FileNotFoundError:
            return "it is missing"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"

    return check


def _on_hub(folder: HubFolder, name: str, facts: Facts) -> Check:
    def check() -> str:
        if name not in folder.names:
            return "it is missing"
        file = folder.open(name)
        return _differs(file.size, facts, file.sha256 or sha256(file.read_bytes()).hexdigest())

    return check


def _differs(size: int, facts: Facts, digest: str = "") -> str:
    if size != facts["bytes"]:
        return f"it is {size} bytes long, not {facts['bytes']}"
    return f"its SHA-256 is {digest}, not {facts['sha256']}" if digest and digest != facts["sha256"] else ""
