"""A crew on a Ray cluster: each batch of units is a task, which Ray runs again elsewhere where its worker is killed.

Nothing but the numbers of units passes through Ray where all nodes see the output's folder; where they do not, the computed bytes do.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch

from ..errors import OptionError, OutputError
from .checkpoint import Checkpoint
from .crew import Errand, Finished, Member, Piece

RETRIES = 5  # times that a batch is computed anew after its worker was killed
AHEAD = 2  # batches that are given out for each processor: one that is computed, one that waits
OBJECTS = 256 << 20  # bytes of the object store of a cluster that is started here: one machine's disk is seen by all its workers
FOREIGN = "failed to import on the worker"  # how Ray says that a node has not our package
KNOCK = 10.0  # seconds in which a cluster must answer
TICK = 1.0  # seconds after which it is looked whether the save has failed elsewhere


class OnRay:
    """A connection to a cluster, or a cluster of this machine, for as long as the `with` lasts.

    remake: makes the checkpoint again in a worker; it is pickled. address: of the cluster, by default what RAY_ADDRESS says, else a cluster of this
    machine's processors is started. workers: tasks at once, at most. gpu: a GPU for each task.
    Errors: OptionError where Ray is not installed, or no cluster answers.
    """

    def __init__(self, remake: Callable[[], Checkpoint], address: str | None = None, workers: int | None = None, gpu: bool = False) -> None:
        try:
            import ray
        except ImportError:
            raise OptionError("--engine ray: Ray is not installed here; pip install 'mergekit-plus[ray]'") from None
        self.ray: Any = ray
        self.remake, self.workers, self.gpu = remake, workers, gpu
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._own = False

    def __enter__(self) -> OnRay:
        if not self.ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here calls nobody
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's new default, of which it warns
            local = {"num_cpus": self.workers, "object_store_memory": OBJECTS, "include_dashboard": False} if self.address == "local" else {}
            try:
                _knock(self.address)
                self.ray.init(self.address, log_to_driver=False, logging_level="ERROR", **local)
            except (OSError, ValueError, RuntimeError) as error:
                raise OptionError(f"--ray-address {self.address}: no Ray cluster answers there ({str(error).splitlines()[0]})") from None
            self._own = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._own:
            self.ray.shutdown()

    def compute(self, errand: Errand, batches: Sequence[Sequence[int]], stop: threading.Event) -> Finished:
        """As `Crew.compute` says. Errors: OptionError where no node has the memory for a unit; OutputError where a worker is killed again and again."""
        ray = self.ray
        self._check(errand.memory)
        task = ray.remote(num_cpus=1, num_gpus=int(self.gpu), memory=errand.memory, max_retries=RETRIES, scheduling_strategy="SPREAD")(_compute)
        job = ray.put((self.remake, errand))
        waiting, running = list(reversed(batches)), dict[Any, Sequence[int]]()
        try:
            while (waiting or running) and not stop.is_set():
                room = self.workers or AHEAD * int(ray.cluster_resources().get("CPU", 1))  # nodes come and go
                while waiting and len(running) < room:
                    batch = waiting.pop()
                    running[task.remote([job], batch)] = batch
                for done in ray.wait(list(running), timeout=TICK)[0]:
                    yield running.pop(done), self._result(done)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _result(self, reference: Any) -> list[Piece]:
        errors = self.ray.exceptions
        try:
            return [(name, at, memoryview(data)) for name, at, data in self.ray.get(reference)]
        except errors.RayTaskError as error:
            if isinstance(error.cause, errors.RayError | ImportError) or FOREIGN in str(error.cause):
                told = str(error.cause).splitlines()[0]
                raise OptionError(f"--engine ray: a worker cannot load what it is to compute ({told}); install mergekit-plus on every node") from None
            raise error.cause from None
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
            times = f"{RETRIES + 1} times over one batch ({type(error).__name__})"
            raise OutputError(f"a Ray worker was killed {times}; try fewer --workers or less --memory") from None

    def _check(self, memory: int) -> None:
        """Refuse what Ray would wait for without end."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        fit = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("memory", 0) >= memory and node.get("GPU", 0) >= self.gpu]
        if not fit:
            most = max((node.get("memory", 0) for node in nodes), default=0)
            raise OptionError(
                f"--engine ray: a task takes a processor{' and a GPU' * self.gpu} and {memory / 1e9:.2f} GB, and no node of the cluster has that "
                f"(the largest has {most / 1e9:.2f} GB); try a smaller --memory"
            )


def _knock(address: str) -> None:
    """Find out at once whether anybody is there: Ray tries for minutes. Errors: OSError."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), KNOCK).close()


@lru_cache(maxsize=1)
def _member(job: Any) -> Member:
    """The plan, made once in each process of the job."""
    import ray

    remake, errand = ray.get(job)
    return Member(remake(), errand)


def _compute(job: Sequence[Any], numbers: Sequence[int]) -> list[tuple[str, int, Any]]:
    """A task; in a list the job comes as its reference, not as its content."""
    import numpy as np

    torch.set_num_threads(1)  # a task has one processor
    return [(name, at, np.frombuffer(data, np.uint8)) for name, at, data in _member(job[0]).compute(numbers)]
