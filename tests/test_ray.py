"""`--engine ray`: whatever the cluster does, the bytes are those of one process."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray_toys
import torch
from program import Program
from ray_toys import NAMES, SHARDS, toy
from safetensors.torch import save_file

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.checkpoint import on_ray as on_ray_module
from mergekit_plus.checkpoint.crew import Errand, Finished
from mergekit_plus.checkpoint.journal import read
from mergekit_plus.checkpoint.on_ray import OnRay
from mergekit_plus.errors import CheckpointError, CompressError, OptionError, OutputError
from mergekit_plus.recipe import check, run
from mergekit_plus.steps import Execution

PATIENCE = 200  # seconds until a worker must have begun, on however busy a machine
SHAPES = {"model.embed_tokens.weight": (2100, 2001), "model.norm.weight": (7,), "lm_head.weight": (33, 64)} | {
    f"model.layers.{n}.mlp.up_proj.weight": (32 + n, 64) for n in range(5)
}  # the first is cut: its rows are several units


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of two processors on this machine; its address."""
    import ray

    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONPATH": str(Path(__file__).parent)}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        for name, value in environment.items():
            patch.setenv(name, value)
        warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves files of its daemons to the garbage collector
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=80 << 20)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two models near it, in shards, of shapes that nothing divides."""
    folder = tmp_path_factory.mktemp("models")
    base = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}
    for seed, model in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: (tensor + seed * 0.1 * torch.randn(tensor.shape, generator=generator)).bfloat16() for name, tensor in base.items()}
        (folder / model).mkdir()
        names, files = list(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        for number, file in enumerate(files):
            save_file({name: tensors[name] for name in names[number::2]}, folder / model / file, metadata={"format": "pt"})
        index = {name: files[number % 2] for number, name in enumerate(names)}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (folder / model / "config.json").write_text('{"model_type": "toy"}')
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_file({name: torch.randn(9, 31, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(NAMES)}, tmp_path / "in.safetensors")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith((".safetensors", ".index.json"))}


MERGE = {"merge": {"models": ["a", "b"], "weight": [0.7, 0.3]}}
QUANTIZE = {"quantize": {"bits": 4, "group_size": 32}}
PLANS: dict[str, list[dict[str, Any]]] = {
    "elementwise merge": [MERGE],
    "merge with global statistics": [{"merge": {"method": "pcb", "base": "base", "models": ["a", "b"], "lambda": 0.5, "ratio": 0.3}}],
    "merge that draws at random": [{"merge": {"method": "dare_ties", "base": "base", "models": ["a", "b"], "density": 0.6, "seed": 3}}],
    "quantization": [MERGE, QUANTIZE],
    "merge, prune, quantize": [MERGE, {"prune": {"sparsity": 0.5, "scope": "global"}}, QUANTIZE],
}


@pytest.mark.parametrize("plan", PLANS)
def test_two_workers_write_the_folder_that_one_process_writes(cluster: str, models: Path, tmp_path: Path, plan: str) -> None:
    used = ["base", "a", "b"] if "base" in str(PLANS[plan]) else ["a", "b"]
    recipe = check({"inputs": {name: str(models / name) for name in used}, "steps": PLANS[plan], "max_shard_size": "3MB"}, tmp_path, "test")
    for engine in ("threads", "ray"):
        (tmp_path / engine).mkdir()
        run(recipe, Execution(out=tmp_path / engine / "out", engine=engine))
    assert contents(tmp_path / "ray" / "out") == contents(tmp_path / "threads" / "out")
    assert len(weights(tmp_path / "ray" / "out")) > 2  # several shards


def test_the_commands_have_the_engine_and_find_relative_paths(cluster: str, models: Path, compress: Program, tmp_path: Path) -> None:
    os.symlink(models, tmp_path / "models")
    for engine in ("ray", "threads"):
        assert compress("merge", "models/a", "models/b", "-o", engine, "--engine", engine).returncode == 0
    assert weights(tmp_path / "ray") == weights(tmp_path / "threads")


def test_what_a_killed_worker_was_at_is_computed_by_another(cluster: str, place: Path) -> None:
    save(toy(place), place / "one", SHARDS)

    def kill() -> None:
        os.kill(seen(place), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    by_ray(place, "out", "wait_to_be_killed")
    killer.join()
    assert weights(place / "out") == weights(place / "one")


def seen(place: Path) -> int:
    """The process that waits to be killed, once it does."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if (place / "seen").exists() and (text := (place / "seen").read_text()).endswith("\n"):
            return int(text)
        time.sleep(0.05)
    raise AssertionError("no worker began")


def by_ray(place: Path, out: str, before: str = "", crew: Callable[..., OnRay] = OnRay, **options: Any) -> None:
    made = partial(toy, place, before)
    with crew(made) as here:
        save(made(), place / out, replace(SHARDS, crew=here, **options))


class Far(OnRay):
    """A cluster that does not see the output's folder."""

    def compute(self, errand: Errand, batches: Sequence[Sequence[int]], stop: threading.Event) -> Finished:
        return super().compute(replace(errand, folder=Path("/not/here")), batches, stop)


class Elsewhere(OnRay):
    """A cluster that has other files of the same names."""

    def compute(self, errand: Errand, batches: Sequence[Sequence[int]], stop: threading.Event) -> Finished:
        return super().compute(replace(errand, inodes=dict.fromkeys(errand.inodes, 0)), batches, stop)


@pytest.mark.parametrize("crew", [Far, Elsewhere])
def test_where_the_output_is_not_seen_the_bytes_come_back(cluster: str, place: Path, crew: type[OnRay]) -> None:
    save(toy(place), place / "one", SHARDS)
    by_ray(place, "out", crew=crew)
    assert weights(place / "out") == weights(place / "one")


def test_a_killed_driver_is_resumed(cluster: str, place: Path) -> None:
    save(toy(place), place / "one", SHARDS)
    driver = subprocess.Popen([sys.executable, ray_toys.__file__, str(place), cluster], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen(place)
    journal, until = place / ".out.partial" / "journal", time.monotonic() + PATIENCE
    while not read(journal).shards and time.monotonic() < until:
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    finished = read(journal).shards
    assert 0 < len(finished) < len(weights(place / "one")) - 1  # without the index
    by_ray(place, "out", resume=True)
    assert weights(place / "out") == weights(place / "one")


@pytest.mark.parametrize(("act", "kind"), [("refuse", OptionError), ("fail", RuntimeError)])
def test_what_a_step_raises_is_raised_as_in_one_process(cluster: str, place: Path, act: str, kind: type[Exception]) -> None:
    options = replace(SHARDS, job=None)
    before = contents_of_parent(place)
    told = []
    for crew in (None, OnRay(partial(toy, place, act))):
        with pytest.raises(kind) as caught:
            save(toy(place, act), place / "out", replace(options, crew=crew))
        told.append((type(caught.value), str(caught.value)))
        assert contents_of_parent(place) == before
    assert told[0] == told[1]


def contents_of_parent(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_values_that_are_not_finite_are_refused_in_the_same_words(cluster: str, models: Path, tmp_path: Path) -> None:
    tensors = {"w": torch.tensor([1.0, float("nan"), 3.0])}
    for name in ("a", "b"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    recipe = check({"inputs": {"a": "a.safetensors", "b": "b.safetensors"}, "steps": [{"merge": {"models": ["a", "b"]}}]}, tmp_path, "test")
    told = []
    for engine in ("threads", "ray"):
        with pytest.raises(CompressError) as caught:
            run(recipe, Execution(out=tmp_path / "out", engine=engine))
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert "a.safetensors: w holds a value that is NaN or infinite" in told[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_batch_that_kills_every_worker_ends_the_save(cluster: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray_module, "RETRIES", 0)
    with pytest.raises(OutputError, match="a Ray worker was killed 1 times over one batch"):
        by_ray(place, "out", "die", job=None)
    assert contents_of_parent(place) == ["in.safetensors"]


def test_a_unit_that_fits_no_node_is_refused(cluster: str, place: Path) -> None:
    class Large(OnRay):
        def compute(self, errand: Errand, batches: Sequence[Sequence[int]], stop: threading.Event) -> Finished:
            return super().compute(replace(errand, memory=1 << 50), batches, stop)

    with pytest.raises(OptionError, match="a task takes a processor and 1125899.91 GB, and no node of the cluster has that"):
        by_ray(place, "out", crew=Large, job=None)


def test_a_worker_that_makes_another_plan_refuses(cluster: str, place: Path) -> None:
    save_file({name: torch.zeros(9, 30) for name in NAMES}, place / "other.safetensors")
    options = SaveOptions(workers=2, memory=1 << 30, crew=OnRay(partial(toy, place)))
    with pytest.raises(CheckpointError, match="a worker sees other inputs or runs another version"):
        save(Checkpoint.open(place / "other.safetensors"), place / "out", options)


def test_a_worker_without_our_code_says_so(cluster: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "only_here.py").write_text("from ray_toys import toy\ndef made(place): return toy(place)\n")
    monkeypatch.syspath_prepend(place)
    made = partial(importlib.import_module("only_here").made, place)
    with pytest.raises(OptionError, match="a worker cannot load what it is to compute .*No module named 'only_here'.*; install mergekit-plus on every node"):
        save(made(), place / "out", replace(SHARDS, job=None, crew=OnRay(made)))


def test_a_cluster_that_does_not_answer_is_named_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(OptionError, match=f"--ray-address {address}: no Ray cluster answers there .*Connection refused"):
        by_ray(place, "out", crew=partial(OnRay, address=address))
    assert contents_of_parent(place) == ["in.safetensors"]


def test_without_ray_the_way_to_it_is_said(models: Path, compress: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    told = compress("merge", str(models / "a"), str(models / "b"), "-o", "out", "--engine", "ray")
    assert told.line == "compress: --engine ray: Ray is not installed here; pip install 'mergekit-plus[ray]'"
