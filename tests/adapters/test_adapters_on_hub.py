"""Adapters and their bases on the Hub: read by ranges, pinned, published, and the same bytes again from the recipe of the output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from adapter_toys import adapted, model_of, saved
from hub_client import compress
from hub_server import Hub

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.recipe import check, load, run
from mergekit_plus.steps import Execution

WEIGHTS = "GET .*safetensors$"


@pytest.fixture
def toys(own_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """org/base, org/tuned, and the adapters org/one and org/two; nothing of them in the folder where one stands."""
    saved(model_of(), tmp_path / "made/base")
    wrapped = adapted(model_of(), tmp_path / "made/one", target_modules=["q_proj", "down_proj"])
    adapted(model_of(), tmp_path / "made/two", seed=2, target_modules=["q_proj", "v_proj"], r=2)
    saved(wrapped.merge_and_unload(), tmp_path / "made/tuned")
    for name in ("base", "tuned", "one", "two"):
        own_hub.commit(f"org/{name}", tmp_path / "made" / name)
    monkeypatch.chdir(tmp_path)
    return own_hub


def made(steps: list[object], out: str, **inputs: str) -> Path:
    run(check({"inputs": inputs, "steps": steps}, Path(), "test"), Execution(out=Path(out)))
    return Path(out)


def made_again(toys: Hub, out: Path) -> Path:
    """What the recipe of an output makes after all branches have moved."""
    for name in ("base", "tuned", "one", "two"):
        toys.commit(f"org/{name}", {"config.json": b"{}"})
    again = out.with_name(f"{out.name}-again")
    run(load(out / "recipe.yaml"), Execution(out=again))
    return again


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_a_model_with_an_adapter_is_read_once_and_pinned_in_both_parts(toys: Hub) -> None:
    merged = made([{"merge": {"method": "linear", "models": ["lora", "tuned"]}}], "merged", lora="org/base+org/one", tuned="org/tuned")
    there = {name: toys.repositories[f"org/{name}"].branches["main"] for name in ("base", "one", "tuned")}
    inputs = yaml.safe_load((merged / "recipe.yaml").read_text())["inputs"]
    assert inputs["lora"]["ref"] == f"org/base@{there['base']}+org/one@{there['one']}"
    assert toys.sent(WEIGHTS) == sum(len(toys.files(f"org/{name}")[file]) for name in there for file in toys.files(f"org/{name}") if file.endswith("tensors"))
    assert "base_model:\n- org/base\n- org/one\n- org/tuned\n" in (merged / "README.md").read_text()
    assert files(made_again(toys, merged)) == files(merged)


def test_adapters_are_merged_from_the_hub(toys: Hub) -> None:
    merged = made([{"merge_adapters": {"method": "ties", "models": ["one", "two"]}}], "merged", one="org/one", two="org/two")
    assert files(made_again(toys, merged)) == files(merged)


def test_an_extracted_adapter_names_its_base_as_peft_finds_it(toys: Hub) -> None:
    steps: list[object] = [{"extract_adapter": {"base": "base", "tuned": "tuned", "rank": 2}}]
    adapter = made(steps, "adapter", base="org/base", tuned="org/tuned")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", toys.repositories["org/base"].branches["main"])
    merged = made([{"merge_adapters": {"models": ["a", "b"]}}], "merged", a="adapter", b="adapter")
    kept = json.loads((merged / "adapter_config.json").read_text())
    assert (kept["base_model_name_or_path"], kept["revision"]) == (config["base_model_name_or_path"], config["revision"])
    assert files(made_again(toys, adapter)) == files(adapter)


def test_extract_reports_on_what_it_read_and_publishes_it(toys: Hub, hub_home: Path, tmp_path: Path) -> None:
    toys.fault("POST .*/commit/", then=lambda: toys.commit("org/base", {"config.json": b"{}"}))  # before the report is made
    found = compress(toys, "adapter", "extract", "org/base", "org/tuned", "--rank", "4", "-o", "adapter", "--push", "org/adapter", home=hub_home, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "relative error" in found.stdout
    assert "published hf://org/adapter" in found.stdout
    assert Checkpoint.open("org/adapter").specs == Checkpoint.open("adapter").specs


def test_packed_adapters_are_read_by_ranges_and_pinned(toys: Hub) -> None:
    packed = made([{"quantize_adapter": {"bits": 1}}], "packed", one="org/one")
    toys.commit("org/packed", packed)
    there = {name: toys.repositories[f"org/{name}"].branches["main"] for name in ("base", "packed")}
    merged = made([], "merged", model="org/base+org/packed")
    written = yaml.safe_load((merged / "recipe.yaml").read_text())["inputs"]["model"]
    assert written["ref"] == f"org/base@{there['base']}+org/packed@{there['packed']}"
    assert {"0/model.safetensors", "1/adapter_model.packed.safetensors", "1/adapter_quant.json"} <= set(written["sha256"])
    here = Checkpoint.open(f"made/base+{packed}")
    assert all(Checkpoint.open(merged).read(name).equal(here.read(name)) for name in here.specs)
    assert files(made_again(toys, merged)) == files(merged)
