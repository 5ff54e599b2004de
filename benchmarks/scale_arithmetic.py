"""Minutes of a save on machines that are not here, term by term: bytes over bandwidths, and the CPU seconds that docs/benchmarks.md measured over cores.

    python benchmarks/scale_arithmetic.py

The terms of a phase overlap, so the longest is the phase; phases follow each other. Nothing here was run at these sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZES = {"70 B": 140, "405 B": 810, "1 T": 2000}  # GB in bfloat16
SHA256 = 1.4  # GB/s a core


@dataclass(frozen=True)
class Job:
    """CPU seconds for a GB of one bfloat16 model, hashing and imports left out; `measuring` on the driver alone. models: inputs. out: size to input."""

    models: int
    cpu: float
    out: float = 1.0
    passes: int = 0
    measuring: float = 0.0


JOBS = {
    "linear, 2 models": Job(2, 3.0),
    "ties, base and 2": Job(3, 12.0),
    "pcb, base and 2": Job(3, 12.0, passes=2, measuring=13.0),
    "4 bits, clip search": Job(1, 8.3, 0.26),
}


@dataclass(frozen=True)
class Machines:
    """nodes of so many cores; GB/s of each node's link to the storage, and of the storage to all of them."""

    nodes: int
    cores: int
    link: float
    storage: float


MACHINES = {
    "1 node, 16 cores, NVMe 3 GB/s": Machines(1, 16, 3.0, 3.0),
    "1 node, 16 cores, 10 Gbit/s": Machines(1, 16, 1.25, 10.0),
    "8 nodes, 16 cores, 10 Gbit/s": Machines(8, 16, 1.25, 10.0),
    "1 node, 16 cores, 100 Gbit/s": Machines(1, 16, 12.5, 40.0),
    "8 nodes, 16 cores, 100 Gbit/s": Machines(8, 16, 12.5, 40.0),
}


def terms(size: float, job: Job, on: Machines) -> dict[str, float]:
    """Seconds of each term for a model of `size` GB."""
    read, written = job.models * size, job.out * size
    hashed = read + written  # by the driver, which reads all of it for that
    moved = read + written + hashed  # to and from the storage, where no page cache holds a file until it is hashed
    return {
        "measuring": max(job.passes * read / min(on.link, on.storage), job.measuring * size / on.cores),
        "storage": moved / on.storage,
        "links": ((read + written) / on.nodes + hashed) / on.link,  # the driver's, which carries most
        "hash": hashed / (SHA256 * on.cores / 2),
        "cores": (job.cpu * size + hashed / SHA256) / (on.nodes * on.cores),
    }


def main() -> None:
    for machines, on in MACHINES.items():
        print(f"\n{machines}\n\n| job | {' | '.join(f'{size}: minutes, and what takes them' for size in SIZES)} |\n|---|{'---|' * len(SIZES)}")
        for name, job in JOBS.items():
            cells = []
            for size in SIZES.values():
                found = terms(size, job, on)
                measuring = found.pop("measuring")
                longest = max(found, key=found.__getitem__)
                before = f"{measuring / 60:.0f} measuring + " if measuring else ""
                cells.append(f"{before}{found[longest] / 60:.0f} {longest}")
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
