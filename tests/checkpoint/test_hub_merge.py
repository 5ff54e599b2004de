"""Merging models that lie on the Hub: the bytes of the local merge, read once, checked, and nothing but the output on the disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_toys import files_in, random_tensor, write_model
from hub_client import compress, python
from hub_server import TOKEN, Hub, wait_until
from memory import PEAK_OF

import mergekit_plus.checkpoint.layout as layout
import mergekit_plus.checkpoint.ranges as ranges
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.checkpoint.journal import read
from mergekit_plus.checkpoint.stage import partial_of
from mergekit_plus.errors import Unreachable
from mergekit_plus.merge import METHODS
from mergekit_plus.merge.plan import MergeOptions, merge
from mergekit_plus.recipe import check, plan, run
from mergekit_plus.steps import Execution

LAYERS = 6
MODELS = Path(__file__).parents[1] / "models"


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Blocks of 256 KiB and a little, beside an embedding of 128 KiB."""
    table = {"model.embed_tokens.weight": random_tensor("BF16", (256, 256), seed)}
    for n in range(LAYERS):
        table[f"model.layers.{n}.mlp.weight"] = random_tensor("BF16", (512, 256), seed + n)
        table[f"model.layers.{n}.norm.weight"] = random_tensor("F32", (256,), seed - n)
    return table


@pytest.fixture
def models(own_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """org/base, org/a and org/b in three shards each, and the same beside it on the disk."""
    monkeypatch.chdir(tmp_path)
    for seed, name in ((0, "base"), (1, "a"), (2, "b")):
        write_model(tmp_path / name, tensors(seed), 3)
        own_hub.commit(f"org/{name}", tmp_path / name)
    return own_hub


def opened(prefix: str, *names: str) -> list[Checkpoint]:
    return [Checkpoint.open(f"{prefix}{name}") for name in names]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_gives_the_bytes_of_the_local_merge(models: Hub, tmp_path: Path, method: str) -> None:
    chosen = METHODS[method]
    names = ("a",) if chosen.models[1] == 1 else ("a", "b")
    options = {name: 0.5 for name, option in chosen.options.table.items() if option.required}
    for prefix, out in (("org/", "hub"), ("", "disk")):
        base = opened(prefix, "base")[0] if chosen.needs_base or len(names) < 2 else None
        save(merge(opened(prefix, *names), method, base, options), tmp_path / out, SaveOptions(workers=2, max_shard_size=700_000))
    hub, disk = files_in(tmp_path / "hub"), files_in(tmp_path / "disk")
    assert {name: content for name, content in hub.items() if name != "manifest.json"} == {name: disk[name] for name in disk if name != "manifest.json"}


@pytest.mark.parametrize("cdn", [False, True])
def test_each_byte_is_read_once_and_verified(models: Hub, tmp_path: Path, cdn: bool) -> None:
    models.cdn = cdn
    manifest = save(merge(opened("org/", "a", "b"), "linear"), tmp_path / "out", SaveOptions(max_shard_size=700_000))
    total = sum(path.stat().st_size for name in ("a", "b") for path in (tmp_path / name).glob("*.safetensors"))
    assert models.sent("GET .*(cdn/|resolve.*-of-0000)") == total
    assert models.sent() <= 1.02 * sum(Checkpoint.open(tmp_path / name).nbytes for name in ("a", "b"))
    for name in ("a", "b"):
        sha = models.repositories[f"org/{name}"].branches["main"]
        facts = manifest.inputs[f"org/{name}@{sha}"]
        listed = models.repositories[f"org/{name}"].commits[sha]
        assert all(facts[file] == {"bytes": listed[file].size, "sha256": listed[file].sha256, "verified": True} for file in facts)
        assert len([file for file in facts if file.endswith(".safetensors")]) == 3


def test_one_block_costs_one_blocks_bytes(models: Hub, tmp_path: Path) -> None:
    how = MergeOptions(include=("layers.3.*",))
    manifest = save(merge(opened("org/", "a", "b"), "linear", how=how), tmp_path / "out")
    result = Checkpoint.open(tmp_path / "out")
    assert sorted(result.specs) == ["model.layers.3.mlp.weight", "model.layers.3.norm.weight"]
    heads = 2 * 3 * (64 << 10)
    small = 20_000  # listings, indexes and configs
    assert models.sent() <= heads + 2 * result.nbytes + small
    whole = merge(opened("", "a", "b"), "linear")
    assert all(torch.equal(result.read(name), whole.read(name)) for name in result.specs)
    facts = [file for files in manifest.inputs.values() for name, file in files.items() if name.endswith(".safetensors")]
    assert not any(file["verified"] for file in facts)  # known by the Hub's digest, but not read whole


def test_what_measures_the_whole_model_reads_it_again_and_a_dry_run_says_so(models: Hub, tmp_path: Path) -> None:
    recipe = check(
        {"inputs": {"base": "org/base", "a": "org/a", "b": "org/b"}, "steps": [{"merge": {"method": "pcb", "base": "base", "models": ["a", "b"]}}]},
        tmp_path, "a test",
    )  # fmt: skip
    facts = plan(recipe, Execution(out=tmp_path / "out"))
    read = models.sent("GET .*safetensors$")
    assert read == 3 * 3 * (64 << 10)  # heads
    assert facts["bytes_measured"] == 2 * facts["bytes_read"]
    assert facts["from_hub"]["bytes"] == pytest.approx(3 * (facts["bytes_read"] - read), rel=0.01)
    assert 9 <= facts["from_hub"]["requests"] <= 60
    assert facts["disk_needed"] == facts["bytes_written"]
    assert facts["peak_memory"] <= facts["memory"]
    models.log.clear()
    run(recipe, Execution(out=tmp_path / "out"))
    assert 0.7 < models.sent("GET .*safetensors$") / (facts["from_hub"]["bytes"] + read) < 1.3


def test_the_recipe_of_the_output_names_the_commit_and_runs_again(models: Hub, tmp_path: Path) -> None:
    recipe = check({"inputs": {"a": "hf://org/a@main", "b": "org/b"}, "steps": [{"merge": {"models": ["a", "b"]}}]}, tmp_path, "a test")
    run(recipe, Execution(out=tmp_path / "out"))
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    sha = {name: models.repositories[f"org/{name}"].branches["main"] for name in ("a", "b")}
    assert {name: source["ref"] for name, source in written["inputs"].items()} == {name: f"org/{name}@{sha[name]}" for name in ("a", "b")}
    assert all(len(source["sha256"]) == 4 for source in written["inputs"].values())  # three shards and the config
    for name in ("a", "b"):
        models.commit(f"org/{name}", {"model.safetensors": b"other"})
    again = compress(models, "run", "out/recipe.yaml", "-o", "again", home=tmp_path / "home", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    first, second = files_in(tmp_path / "out"), files_in(tmp_path / "again")
    same = [name for name in first if name not in ("README.md", "manifest.json")]  # the card says how the models were called
    assert {name: second[name] for name in same} == {name: first[name] for name in same}


def test_a_merge_that_the_network_interrupts_goes_on_later_and_reads_only_the_rest(models: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PAUSE", 0.001)
    monkeypatch.setattr(layout, "AHEAD", 8 << 16)  # eight spans of 64 KiB
    for seed, name in ((1, "a"), (2, "b")):  # one file each, so that the first of the output's files is finished first
        write_model(tmp_path / f"{name}-whole", tensors(seed))
        models.commit(f"org/{name}", tmp_path / f"{name}-whole")
    recipe = check({"inputs": {"a": "org/a", "b": "org/b"}, "steps": [{"merge": {"models": ["a", "b"]}}]}, tmp_path, "a test")
    options = SaveOptions(workers=1, memory=400 << 20, max_shard_size=400_000)
    run(recipe, Execution(options, out=tmp_path / "whole"))
    data = "GET .*safetensors$"
    everything = models.sent(data)
    journal = partial_of(tmp_path / "out") / "journal"
    fault = models.fault(data, skip=45, status=503, times=999, then=lambda: wait_until(lambda: read(journal).worth_keeping))
    with pytest.raises(Unreachable, match="the Hub answers 503, the last of 6 tries.*--resume"):
        run(recipe, Execution(options, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    fault.times = 0
    models.log.clear()
    run(recipe, Execution(replace(options, resume=True), out=tmp_path / "out"))
    assert {name: facts for name, facts in files_in(tmp_path / "out").items() if name.endswith(".safetensors")} == {
        name: facts for name, facts in files_in(tmp_path / "whole").items() if name.endswith(".safetensors")
    }
    assert models.sent(data) < everything


def test_a_digest_in_a_recipe_holds_for_a_file_that_nobody_had_to_read(models: Hub, tmp_path: Path) -> None:
    models.commit("org/b", {**{path.name: path for path in (tmp_path / "b").iterdir()}, "tokenizer.json": b"{}"})
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}
    for sha256, error in ((digest, None), ("0" * 64, "tokenizer.json is not the file that the recipe was made with")):
        source = {"ref": "org/b", "sha256": {"tokenizer.json": sha256}}
        recipe = check({"inputs": {"a": "org/a", "b": source}, "steps": [{"merge": {"models": ["a", "b"]}}]}, tmp_path, "a test")
        if error is None:
            run(recipe, Execution(out=tmp_path / "out"))
        else:
            with pytest.raises(Exception, match=error):
                run(recipe, Execution(out=tmp_path / "never"))


def test_the_commands_leave_nothing_on_the_disk_but_the_output_and_say_no_token(hub: Hub, tmp_path: Path) -> None:
    for name in ("base", "code"):
        hub.commit(f"org/{name}", MODELS / name)
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    cwd.mkdir()
    told = [compress(hub, "merge", "org/base", "org/code", "-o", "merged", home=home, cwd=cwd)]
    told.append(compress(hub, "quantize", "org/code", "--group-size", "32", "--memory", "400MB", home=home, cwd=cwd))
    told.append(compress(hub, "quantize", "org/code", "--include", "layers.1.*", "--group-size", "32", "-o", "block", "--dry-run", home=home, cwd=cwd))
    told.append(compress(hub, "inspect", "org/code", "--json", home=home, cwd=cwd))
    told.append(compress(hub, "diff", "org/code", str(MODELS / "code"), home=home, cwd=cwd))
    assert [answer.returncode for answer in told] == [0] * 5, told
    assert sorted(path.name for path in cwd.iterdir()) == ["code-4bit", "merged"]
    assert not list(home.rglob("*.safetensors"))
    assert "from the Hub: " in told[2].stdout
    assert json.loads(told[3].stdout)["files"] == 3
    assert told[4].stdout == "the same\n"
    local = compress(hub, "quantize", MODELS / "code", "--group-size", "32", "-o", "local", home=home, cwd=cwd)
    assert local.returncode == 0, local.stderr
    for name in ("model.safetensors", "config.json"):
        assert (cwd / "local" / name).read_bytes() == (cwd / "code-4bit" / name).read_bytes()
    manifest = json.loads((cwd / "code-4bit" / "manifest.json").read_text())
    assert all(file["verified"] for files in manifest["inputs"].values() for file in files.values())
    assert not any(TOKEN in text for answer in told for text in (answer.stdout, answer.stderr))
    assert not any(TOKEN.encode() in path.read_bytes() for path in cwd.rglob("*") if path.is_file())


PEAK = PEAK_OF + """
import sys
from pathlib import Path
import torch
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.merge.plan import merge

torch.set_num_threads(1)
options = SaveOptions(workers=2, memory=int(sys.argv[2]))
save(merge([Checkpoint.open("org/warm"), Checkpoint.open("org/warm")], "linear"), Path(f"warm {sys.argv[1]}"), options)
start = anonymous()
name = sys.argv[1]
models = [Checkpoint.open(f"org/{name}"), Checkpoint.open(f"org/{name}")]
print(peak_of(lambda: save(merge(models, "linear"), Path(name), options)) - start)
"""
MIB = 1 << 20


def test_peak_memory_is_the_budgets_whatever_the_size_of_the_model(hub: Hub, tmp_path: Path) -> None:
    sizes = {"warm": 1, "small": 4, "large": 12}
    for name, count in sizes.items():
        blocks = {f"layers.{n}.w": torch.zeros(4096, 1024, dtype=torch.bfloat16) for n in range(count)}  # 8 MiB each
        hub.commit(f"org/{name}", write_model(tmp_path / f"of {name}", blocks))
    growth = {}
    for name in ("small", "large"):
        result = python(hub, PEAK, name, 150 * MIB, home=tmp_path / "home", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        growth[name] = int(result.stdout)
    assert 8 * MIB < growth["small"] < 150 * MIB, growth
    assert growth["large"] < 150 * MIB, growth
    assert growth["large"] < growth["small"] + 48 * MIB, growth
