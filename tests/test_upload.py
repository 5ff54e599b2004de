"""Outputs on the Hub: the real client against a Hub on this machine; what is visible when, and what goes wrong."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from hub_client import COMPRESS, finish, start
from hub_server import TOKEN, Hub, wait_until
from huggingface_hub import constants, get_session
from program import Program
from safetensors.torch import load, save, save_file

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub's own use of its HTTP library
SHARDS = 6
NAMES = [f"layers.{n}.weight" for n in range(SHARDS)]
ROWS = 1 << 10  # of 4 kB: 4 MB a tensor, and a shard
MERGE = ("merge", "a", "b", "--max-shard-size", "4200kB")
HUB_FILES = {".gitattributes", "README.md", "config.json", "manifest.json", "model.safetensors.index.json", "recipe.yaml"}


def write(folder: Path, value: float) -> None:
    """A model of some megabytes."""
    folder.mkdir()
    save_file({name: torch.full((ROWS, 1024), value + n) for n, name in enumerate(NAMES)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the models a and b."""
    write(tmp_path / "a", 1.0)
    write(tmp_path / "b", 3.0)
    return tmp_path


def merged(hub: Hub, repo: str = "org/new", revision: str = "main") -> dict[str, torch.Tensor]:
    """The tensors that a reader finds in the repository."""
    files = hub.files(repo, revision)
    index = json.loads(files["model.safetensors.index.json"])["weight_map"]
    return {name: load(files[shard])[name] for name, shard in index.items()}


def test_a_merge_goes_to_the_hub_in_one_commit_and_leaves_nothing_here(own_hub: Hub, compress: Program, here: Path) -> None:
    before = sorted(path.name for path in here.iterdir())
    run = compress(*MERGE, "-o", "hf://org/new", "--private")
    assert run.returncode == 0, run.stderr
    commit = own_hub.repositories["org/new"].branches["main"]
    assert f"published hf://org/new: 25.17 MB, commit {commit[:7]}" in run.stdout
    assert own_hub.repositories["org/new"].private
    assert own_hub.repositories["org/new"].messages == ["initial commit", "Upload a model with mergekit-plus"]
    shards = {name for name in own_hub.files("org/new") if name.endswith(".safetensors")}
    assert len(shards) == SHARDS
    assert own_hub.files("org/new").keys() == HUB_FILES | shards
    assert {name: tensor[0, 0].item() for name, tensor in merged(own_hub).items()} == {name: 2.0 + n for n, name in enumerate(NAMES)}
    outputs = json.loads(own_hub.files("org/new")["manifest.json"])["outputs"]
    assert outputs.keys() == own_hub.files("org/new").keys() - {".gitattributes", "manifest.json"}
    assert len(own_hub.requests("PUT")) == SHARDS
    assert sorted(path.name for path in here.iterdir()) == before


def sharded(value: float) -> dict[str, bytes]:
    """The files of the same model in a shard for each tensor."""
    shards = {f"model-{n + 1:05d}-of-{SHARDS:05d}.safetensors": save({name: torch.full((ROWS, 1024), value + n)}) for n, name in enumerate(NAMES)}
    index = {"metadata": {}, "weight_map": dict(zip(NAMES, shards, strict=True))}
    return {**shards, "model.safetensors.index.json": json.dumps(index).encode(), "config.json": b'{"model_type": "toy"}'}


def test_shards_go_up_while_later_ones_are_read_and_written(own_hub: Hub, compress: Program) -> None:
    """From the Hub to the Hub: the last shard of an input is not given out before the first of the output has arrived."""
    own_hub.commit("org/a", sharded(1.0))
    own_hub.commit("org/b", sharded(3.0))
    own_hub.fault(f"GET /org/b/resolve/.*{SHARDS:05d}-of-{SHARDS:05d}", skip=1, then=lambda: wait_until(lambda: own_hub.requests("PUT")))  # after its header
    run = compress("merge", "org/a", "org/b", "--max-shard-size", "4200kB", "-o", "hf://org/new")
    assert run.returncode == 0, run.stderr
    assert {name: tensor[0, 0].item() for name, tensor in merged(own_hub).items()} == {name: 2.0 + n for n, name in enumerate(NAMES)}
    assert own_hub.faults[0].times == 0
    (commit,) = own_hub.requests("POST .*/commit/")
    assert own_hub.log.index(commit) > max(own_hub.log.index(put) for put in own_hub.requests("PUT"))
    card = yaml.safe_load(own_hub.files("org/new")["README.md"].decode().split("---\n")[1])
    assert card == {"base_model": ["org/a", "org/b"], "base_model_relation": "merge", "library_name": "transformers", "tags": ["mergekit-plus", "merge"]}


def test_push_keeps_the_local_folder_and_the_hub_has_the_same_files(own_hub: Hub, compress: Program, here: Path) -> None:
    own_hub.commit("org/old", {".gitattributes": b""})
    run = compress(*MERGE, "-o", "out", "--push", "org/old@next")
    assert run.returncode == 0, run.stderr
    local = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    published = own_hub.files("org/old", "next")
    assert {name: published[name] for name in local} == local
    assert published.keys() - local.keys() == {".gitattributes"}
    assert own_hub.files("org/old").keys() == {".gitattributes"}  # main stays


def test_an_existing_model_is_replaced_only_with_overwrite_and_then_whole(own_hub: Hub, compress: Program, here: Path) -> None:
    old = {"model-00009-of-00009.safetensors": b"old", "tokenizer.json": b"{}", "LICENSE": b"mine", "images/a.png": b"p", "config.json": b"{}"}
    before = own_hub.commit("org/new", old)
    told = compress(*MERGE, "-o", "hf://org/new").line
    assert told == "compress: hf://org/new is not empty; name another repository or branch, or replace the model in it with --overwrite"
    dry = compress(*MERGE, "-o", "hf://org/new", "--overwrite", "--dry-run")
    assert "would write hf://org/new: 6 computed" in dry.stdout
    assert own_hub.repositories["org/new"].branches["main"] == before
    run = compress(*MERGE, "-o", "hf://org/new", "--overwrite")
    assert run.returncode == 0, run.stderr
    assert own_hub.files("org/new").keys() & old.keys() == {"LICENSE", "images/a.png", "config.json"}
    assert len(merged(own_hub)) == SHARDS
    again = compress(*MERGE, "-o", "hf://org/new", "--overwrite")
    assert again.returncode == 0, again.stderr
    assert len(own_hub.requests("PUT")) == SHARDS  # the Hub had them
    assert len(own_hub.repositories["org/new"].commits) == 2
    own_hub.commit("org/new", {**own_hub.files("org/new"), "README.md": b"edited by hand"})
    assert compress(*MERGE, "-o", "hf://org/new", "--overwrite").returncode == 0
    assert b"mergekit-plus" in own_hub.files("org/new")["README.md"]


def test_what_should_be_private_does_not_become_public(own_hub: Hub, compress: Program, here: Path) -> None:
    own_hub.commit("org/new", {".gitattributes": b""})
    assert "hf://org/new is public" in compress(*MERGE, "-o", "hf://org/new", "--private").line
    own_hub.repositories["org/new"].private = True
    assert compress(*MERGE, "-o", "hf://org/new", "--private").returncode == 0


def test_a_branch_that_moved_is_one_line_and_nothing_is_visible(own_hub: Hub, compress: Program, here: Path) -> None:
    own_hub.commit("org/new", {".gitattributes": b""})
    own_hub.fault("PUT", skip=2, then=lambda: own_hub.commit("org/new", {"theirs.txt": b""}))
    told = compress(*MERGE, "-o", "hf://org/new").line
    assert "hf://org/new: somebody else committed to main meanwhile; nothing was published; 25.2 of 25.2 MB are kept, go on with --resume" in told
    assert own_hub.files("org/new") == {"theirs.txt": b""}
    told = compress(*MERGE, "-o", "hf://org/new", "--resume").line
    assert "hf://org/new is not empty" in told
    run = compress(*MERGE, "-o", "hf://org/new", "--resume", "--overwrite")
    assert run.returncode == 0, run.stderr
    assert len(own_hub.requests("PUT")) == SHARDS
    assert len(merged(own_hub)) == SHARDS
    assert not (here / ".new.partial").exists()


def test_a_push_that_fails_leaves_the_local_output_and_says_how_to_send_it(own_hub: Hub, compress: Program, here: Path) -> None:
    own_hub.fault("POST .*commit", status=403)
    told = compress(*MERGE, "-o", "out", "--push", "org/new").line
    assert "the Hub does not let you write there: 403 (a fault of the tests)" in told
    assert told.endswith("out is complete, and `hf upload org/new out` sends it")
    assert (here / "out" / "manifest.json").exists()
    assert own_hub.files("org/new").keys() == {".gitattributes"}


def test_a_token_that_is_revoked_while_it_runs_ends_the_work_soon(own_hub: Hub, compress: Program, here: Path) -> None:
    own_hub.fault("POST .*preupload", skip=1, then=own_hub.tokens.clear)
    run = compress(*MERGE, "-o", "hf://org/new", "--workers", "1")
    told = run.line
    assert "hf://org/new: the Hub does not let you write there: 401" in told
    assert "`hf auth login` with a token that may" in told
    assert TOKEN not in run.stdout + run.stderr
    assert own_hub.files("org/new").keys() == {".gitattributes"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-o", "hf://org"], "does not name a repository to write to; write hf://org/name"),
        (["-o", "hf://org/../name"], "does not name a repository to write to"),
        (["--push", "org/a--b", "-o", "out"], "is not a name that a repository can have"),
        (["--push", "org/new", "-o", "out.safetensors"], "--push: a repository is a folder; write to the folder out with -o"),
        (["--push", "org/new", "-o", "hf://org/new"], "give one of them, or a local folder with -o"),
        (["--push", "org/new", "-o", "a"], "a is one of the inputs"),
        (["-o", "hf://org/new", "--memory", "1MB"], "--memory 1 MB is too little"),
        (["-o", "hf://org/new", "-b", "c"], "c: no such file or folder"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(own_hub: Hub, compress: Program, here: Path, arguments: list[str], told: str) -> None:
    assert told in compress(*MERGE, *arguments).line
    assert own_hub.repositories == {}
    assert sorted(path.name for path in here.iterdir()) == ["a", "b"]


def test_a_hub_that_does_not_let_one_write_is_known_before_any_work(
    own_hub: Hub, compress: Program, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_hub.commit("org/theirs", {"a.txt": b""})
    own_hub.readers.add("hf_reader")
    for token, repo in (("hf_wrong", "org/new"), ("hf_reader", "org/new"), ("hf_reader", "org/theirs")):
        monkeypatch.setenv("HF_TOKEN", token)
        assert f"hf://{repo}: the Hub does not let you write there: 40" in compress(*MERGE, "-o", f"hf://{repo}").line
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "hf://org/new: the upload failed (ConnectError" in compress(*MERGE, "-o", "hf://org/new").line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "hf://org/new cannot be written to while HF_HUB_OFFLINE is set" in compress(*MERGE, "-o", "hf://org/new").line
    assert own_hub.repositories.keys() == {"org/theirs"}
    assert sorted(path.name for path in here.iterdir()) == ["a", "b"]


def test_what_passes_is_tried_again(own_hub: Hub, compress: Program, here: Path) -> None:
    own_hub.fault("PUT", status=503, times=2)
    own_hub.fault("PUT", reset=1 << 20)
    own_hub.fault("PUT", then=own_hub.expire_links)
    own_hub.fault("POST .*batch", status=500)
    own_hub.fault("POST .*commit", status=502, times=2)
    run = compress(*MERGE, "-o", "hf://org/new")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert own_hub.repositories["org/new"].messages == ["initial commit", "Upload a model with mergekit-plus"]
    assert len(merged(own_hub)) == SHARDS


def test_a_hub_that_falls_silent_is_not_waited_for(own_hub: Hub, compress: Program, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_plus.checkpoint.upload.SILENCE", 0.5)
    own_hub.fault("PUT", delay=60)
    own_hub.fault("GET .*auth-check", stall=0)
    run = compress(*MERGE, "-o", "hf://org/new")
    assert run.returncode == 0, run.stderr
    assert len(merged(own_hub)) == SHARDS
    assert get_session().timeout.read is None  # as it was


def test_a_commit_whose_answer_is_lost_is_not_made_twice(own_hub: Hub, compress: Program, here: Path) -> None:
    lost = own_hub.fault("POST .*/commit/main", truncate=0)
    run = compress(*MERGE, "-o", "hf://org/new")
    assert run.returncode == 0, run.stderr
    assert lost.times == 0
    assert len(own_hub.requests("POST .*/commit/main")) == 1
    assert len(own_hub.repositories["org/new"].commits) == 2


@pytest.mark.parametrize("at", ["PUT", "POST .*/commit/"])
def test_killed_while_it_uploads_it_goes_on_and_sends_nothing_twice(own_hub: Hub, compress: Program, hub_home: Path, here: Path, at: str) -> None:
    own_hub.fault(at, skip=3 if at == "PUT" else 0, delay=60)
    process = start(own_hub, COMPRESS, *MERGE, "-o", "hf://org/new", home=hub_home, cwd=here)
    wait_until(lambda: len(own_hub.requests(at)) > (3 if at == "PUT" else 0))
    process.send_signal(signal.SIGKILL)
    finish(process)
    own_hub.faults.clear()
    there = len(own_hub.blobs)
    assert own_hub.files("org/new").keys() == {".gitattributes"}
    assert "continue it with --resume" in compress(*MERGE, "-o", "hf://org/new").line
    before = len(own_hub.requests("PUT"))
    run = compress(*MERGE, "-o", "hf://org/new", "--resume")
    assert run.returncode == 0, run.stderr
    assert len(own_hub.requests("PUT")) - before == SHARDS - there
    assert len(merged(own_hub)) == SHARDS
    assert not (here / ".new.partial").exists()


def test_killed_after_its_commit_it_finds_that_all_is_done(own_hub: Hub, compress: Program, hub_home: Path, here: Path) -> None:
    own_hub.fault("GET .*/tree/", skip=2, delay=60)  # the look at what was published
    process = start(own_hub, COMPRESS, *MERGE, "-o", "hf://org/new", home=hub_home, cwd=here)
    wait_until(lambda: len(own_hub.repositories) == 1 and len(own_hub.repositories["org/new"].commits) == 2)
    process.send_signal(signal.SIGKILL)
    finish(process)
    own_hub.faults.clear()
    run = compress(*MERGE, "-o", "hf://org/new", "--resume")
    assert run.returncode == 0, run.stderr
    assert len(own_hub.repositories["org/new"].commits) == 2
    assert not (here / ".new.partial").exists()


def test_the_token_is_in_no_file_and_no_line(own_hub: Hub, compress: Program, here: Path) -> None:
    own_hub.fault("PUT", status=503)
    runs = [
        compress(*MERGE, "-o", "out", "--push", "org/new", "--json"),
    ]
    own_hub.fault("POST .*commit", status=403, headers={"X-Error-Message": f"{TOKEN} Bearer secret-word https://cdn/x?signature=secret-word"})
    runs.append(compress(*MERGE, "-o", "hf://org/other"))
    assert runs[0].returncode == 0, runs[0].stderr
    told = "".join(run.stdout + run.stderr for run in runs)
    files = [path for path in here.rglob("*") if path.is_file()]
    assert here / ".other.partial" / "journal" in files
    for secret in (TOKEN, "secret-word", "signature="):
        assert secret not in told
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        assert not [name for repo in own_hub.repositories for name, content in own_hub.files(repo).items() if secret.encode() in content]


def test_a_check_that_fails_keeps_the_model_from_the_hub(own_hub: Hub, compress: Program, here: Path) -> None:
    (here / "recipe.yaml").write_text(yaml.safe_dump({
        "inputs": {"a": "./a", "b": "./b"}, "steps": [{"merge": {"models": ["a", "b"]}}], "checks": {"limits": {"bits_per_weight": 16}}, "out": "hf://org/new",
    }))  # fmt: skip
    run = compress("run", "recipe.yaml")
    assert run.returncode == 1
    assert "check failed: bits a weight are 32, at most 16 are wanted; nothing was published" in run.stderr
    assert own_hub.files("org/new").keys() == {".gitattributes"}
    (here / "recipe.yaml").write_text((here / "recipe.yaml").read_text().replace("16", "32"))
    run = compress("run", "recipe.yaml", "--resume")
    assert run.returncode == 0, run.stderr
    published = own_hub.files("org/new")
    assert "model.safetensors" in published
    assert published["README.md"].decode().endswith("| model | MB | bits/weight |\n| --- | ---: | ---: |\n| this model | 25.17 | 32 |\n")
    assert "out" not in yaml.safe_load(published["recipe.yaml"])


def test_the_card_says_what_the_model_is_made_of(own_hub: Hub, compress: Program, here: Path) -> None:
    run = compress(*MERGE, "-o", "hf://org/new")
    assert run.returncode == 0, run.stderr
    card = own_hub.files("org/new")["README.md"].decode()
    front = re.fullmatch(r"---\n(.*?)\n---\n.*", card, re.DOTALL)
    assert front is not None
    assert yaml.safe_load(front[1]) == {"library_name": "transformers", "tags": ["mergekit-plus", "merge"]}  # local models have no name on the Hub
    assert own_hub.files("org/new")["recipe.yaml"].decode().rstrip() in card
