"""Outputs on the Hub: the real client against a Hub on this machine, whole processes, what is visible when, and what goes wrong."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from hub_client import COMPRESS, compress, finish, start
from hub_server import TOKEN, Hub, wait_until
from safetensors.torch import load, save_file

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


def line(run: CompletedProcess[str]) -> str:
    """The one line of a run that was refused."""
    assert run.returncode == 2, run.stderr
    (told,) = run.stderr.strip().splitlines()
    return told


def merged(hub: Hub, repo: str = "org/new", revision: str = "main") -> dict[str, torch.Tensor]:
    """The tensors that a reader finds in the repository."""
    files = hub.files(repo, revision)
    index = json.loads(files["model.safetensors.index.json"])["weight_map"]
    return {name: load(files[shard])[name] for name, shard in index.items()}


def test_a_merge_goes_to_the_hub_in_one_commit_and_leaves_nothing_here(hub: Hub, hub_home: Path, here: Path) -> None:
    before = sorted(path.name for path in here.iterdir())
    run = compress(hub, *MERGE, "-o", "hf://org/new", "--private", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    commit = hub.repositories["org/new"].branches["main"]
    assert f"published hf://org/new: 25.17 MB, commit {commit[:7]}" in run.stdout
    assert hub.repositories["org/new"].private
    assert hub.repositories["org/new"].messages == ["initial commit", "Upload a model with mergekit-plus"]
    shards = {name for name in hub.files("org/new") if name.endswith(".safetensors")}
    assert len(shards) == SHARDS
    assert hub.files("org/new").keys() == HUB_FILES | shards
    assert {name: tensor[0, 0].item() for name, tensor in merged(hub).items()} == {name: 2.0 + n for n, name in enumerate(NAMES)}
    outputs = json.loads(hub.files("org/new")["manifest.json"])["outputs"]
    assert outputs.keys() == hub.files("org/new").keys() - {".gitattributes", "manifest.json"}
    assert len(hub.requests("PUT")) == SHARDS
    assert sorted(path.name for path in here.iterdir()) == before


def test_shards_go_up_while_later_ones_are_written(hub: Hub, hub_home: Path, here: Path) -> None:
    """The first shard is on the Hub before the second model, a pipe's worth of which the merge still waits for, can have been read to its end."""
    watched: list[float] = []
    partial = here / ".new.partial" / "files"

    def look() -> None:
        last = partial / f"model-{SHARDS:05d}-of-{SHARDS:05d}.safetensors"
        watched.append(last.stat().st_blocks * 512 if last.exists() else -1)
        watched.append((partial / "manifest.json").exists())

    hub.fault("PUT", then=look)
    run = compress(hub, *MERGE, "-o", "hf://org/new", "--workers", "1", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    assert watched[1] == 0
    order = [request.method + request.path for request in hub.requests("PUT|commit")]
    assert order[-1].startswith("POST/api/models/org/new/commit")


def test_push_keeps_the_local_folder_and_the_hub_has_the_same_files(hub: Hub, hub_home: Path, here: Path) -> None:
    hub.commit("org/old", {".gitattributes": b""})
    run = compress(hub, *MERGE, "-o", "out", "--push", "org/old@next", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    local = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    published = hub.files("org/old", "next")
    assert {name: published[name] for name in local} == local
    assert published.keys() - local.keys() == {".gitattributes"}
    assert hub.files("org/old").keys() == {".gitattributes"}  # main stays


def test_an_existing_model_is_replaced_only_with_overwrite_and_then_whole(hub: Hub, hub_home: Path, here: Path) -> None:
    old = {"model-00009-of-00009.safetensors": b"old", "tokenizer.json": b"{}", "LICENSE": b"mine", "images/a.png": b"p", "config.json": b"{}"}
    before = hub.commit("org/new", old)
    told = line(compress(hub, *MERGE, "-o", "hf://org/new", home=hub_home, cwd=here))
    assert told == "compress: hf://org/new is not empty; name another repository or branch, or replace the model in it with --overwrite"
    dry = compress(hub, *MERGE, "-o", "hf://org/new", "--overwrite", "--dry-run", home=hub_home, cwd=here)
    assert "would write hf://org/new: 6 computed" in dry.stdout
    assert hub.repositories["org/new"].branches["main"] == before
    run = compress(hub, *MERGE, "-o", "hf://org/new", "--overwrite", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    assert hub.files("org/new").keys() & old.keys() == {"LICENSE", "images/a.png", "config.json"}
    assert len(merged(hub)) == SHARDS
    again = compress(hub, *MERGE, "-o", "hf://org/new", "--overwrite", home=hub_home, cwd=here)
    assert again.returncode == 0, again.stderr
    assert len(hub.requests("PUT")) == SHARDS  # the Hub had them
    assert len(hub.repositories["org/new"].commits) == 2


def test_a_branch_that_moved_is_one_line_and_nothing_is_visible(hub: Hub, hub_home: Path, here: Path) -> None:
    hub.commit("org/new", {".gitattributes": b""})
    hub.fault("PUT", skip=2, then=lambda: hub.commit("org/new", {"theirs.txt": b""}))
    told = line(compress(hub, *MERGE, "-o", "hf://org/new", home=hub_home, cwd=here))
    assert "hf://org/new: somebody else committed to main meanwhile; nothing was published; 25.2 of 25.2 MB are kept, go on with --resume" in told
    assert hub.files("org/new") == {"theirs.txt": b""}
    told = line(compress(hub, *MERGE, "-o", "hf://org/new", "--resume", home=hub_home, cwd=here))
    assert "hf://org/new is not empty" in told
    run = compress(hub, *MERGE, "-o", "hf://org/new", "--resume", "--overwrite", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    assert len(hub.requests("PUT")) == SHARDS
    assert len(merged(hub)) == SHARDS
    assert not (here / ".new.partial").exists()


def test_a_push_that_fails_leaves_the_local_output_and_says_how_to_send_it(hub: Hub, hub_home: Path, here: Path) -> None:
    hub.fault("POST .*commit", status=403)
    told = line(compress(hub, *MERGE, "-o", "out", "--push", "org/new", home=hub_home, cwd=here))
    assert "the Hub does not let you write there: 403 (a fault of the tests)" in told
    assert told.endswith("out is complete, and `hf upload org/new out` sends it")
    assert (here / "out" / "manifest.json").exists()
    assert hub.files("org/new").keys() == {".gitattributes"}


def test_a_token_that_is_revoked_while_it_runs_ends_the_work_soon(hub: Hub, hub_home: Path, here: Path) -> None:
    hub.fault("POST .*preupload", skip=1, then=hub.tokens.clear)
    run = compress(hub, *MERGE, "-o", "hf://org/new", "--workers", "1", home=hub_home, cwd=here)
    told = line(run)
    assert "hf://org/new: the Hub does not let you write there: 401" in told
    assert "`hf auth login` with a token that may" in told
    assert TOKEN not in run.stdout + run.stderr
    assert hub.files("org/new").keys() == {".gitattributes"}


@pytest.mark.parametrize(
    ("arguments", "more", "told"),
    [
        (["-o", "hf://org/new"], {"HF_TOKEN": "hf_wrong"}, "does not let you write there: 401"),
        (["-o", "hf://org/new"], {"HF_HUB_OFFLINE": "1"}, "cannot be written to while HF_HUB_OFFLINE is set"),
        (["-o", "hf://org/new"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the upload failed (ConnectError"),
        (["-o", "hf://org"], {}, "does not name a repository to write to; write hf://org/name"),
        (["-o", "hf://org/../name"], {}, "does not name a repository to write to"),
        (["--push", "org/a--b", "-o", "out"], {}, "is not a name that a repository can have"),
        (["--push", "org/new", "-o", "out.safetensors"], {}, "--push: a repository is a folder; write to the folder out with -o"),
        (["--push", "org/new", "-o", "hf://org/new"], {}, "give one of them, or a local folder with -o"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(hub: Hub, hub_home: Path, here: Path, arguments: list[str], more: dict[str, str], told: str) -> None:
    assert told in line(compress(hub, *MERGE, *arguments, home=hub_home, cwd=here, **more))
    assert hub.repositories == {}
    assert sorted(path.name for path in here.iterdir()) == ["a", "b"]


def test_what_passes_is_tried_again(hub: Hub, hub_home: Path, here: Path) -> None:
    hub.fault("PUT", status=503, times=2)
    hub.fault("PUT", reset=1 << 20)
    hub.fault("PUT", then=hub.expire_links)
    hub.fault("POST .*batch", status=500)
    hub.fault("POST .*commit", status=502, times=2)
    run = compress(hub, *MERGE, "-o", "hf://org/new", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert hub.repositories["org/new"].messages == ["initial commit", "Upload a model with mergekit-plus"]
    assert len(merged(hub)) == SHARDS


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: Hub, hub_home: Path, here: Path) -> None:
    hub.fault("POST .*commit", reset=0, skip=0, times=0)
    lost = hub.fault("POST .*/commit/main", truncate=0)
    run = compress(hub, *MERGE, "-o", "hf://org/new", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    assert lost.times == 0
    assert len(hub.requests("POST .*/commit/main")) == 1
    assert len(hub.repositories["org/new"].commits) == 2


@pytest.mark.parametrize("at", ["PUT", "POST .*/commit/"])
def test_killed_while_it_uploads_it_goes_on_and_sends_nothing_twice(hub: Hub, hub_home: Path, here: Path, at: str) -> None:
    hub.fault(at, skip=3 if at == "PUT" else 0, delay=60)
    process = start(hub, COMPRESS, *MERGE, "-o", "hf://org/new", home=hub_home, cwd=here)
    wait_until(lambda: len(hub.requests(at)) > (3 if at == "PUT" else 0))
    process.send_signal(signal.SIGKILL)
    finish(process)
    hub.faults.clear()
    there = len(hub.blobs)
    assert hub.files("org/new").keys() == {".gitattributes"}
    assert "continue it with --resume" in line(compress(hub, *MERGE, "-o", "hf://org/new", home=hub_home, cwd=here))
    before = len(hub.requests("PUT"))
    run = compress(hub, *MERGE, "-o", "hf://org/new", "--resume", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    assert len(hub.requests("PUT")) - before == SHARDS - there
    assert len(merged(hub)) == SHARDS
    assert not (here / ".new.partial").exists()


def test_killed_after_its_commit_it_finds_that_all_is_done(hub: Hub, hub_home: Path, here: Path) -> None:
    hub.fault("GET .*/tree/", skip=2, delay=60)  # the look at what was published
    process = start(hub, COMPRESS, *MERGE, "-o", "hf://org/new", home=hub_home, cwd=here)
    wait_until(lambda: len(hub.repositories.get("org/new", hub).__dict__.get("commits", ())) == 2)
    process.send_signal(signal.SIGKILL)
    finish(process)
    hub.faults.clear()
    run = compress(hub, *MERGE, "-o", "hf://org/new", "--resume", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    assert len(hub.repositories["org/new"].commits) == 2
    assert not (here / ".new.partial").exists()


def test_the_token_is_in_no_file_and_no_line(hub: Hub, hub_home: Path, here: Path) -> None:
    hub.fault("PUT", status=503)
    runs = [
        compress(hub, *MERGE, "-o", "out", "--push", "org/new", "--json", home=hub_home, cwd=here),
        compress(hub, *MERGE, "-o", "hf://org/gone", home=hub_home, cwd=here, HF_ENDPOINT=hub.url.replace("http://", "http://user:secret-word@")),
    ]
    hub.fault("POST .*commit", status=403, headers={"X-Error-Message": f"Bearer {TOKEN} https://cdn/x?signature=secret-word"})
    runs.append(compress(hub, *MERGE, "-o", "hf://org/other", home=hub_home, cwd=here))
    assert runs[0].returncode == 0, runs[0].stderr
    told = "".join(run.stdout + run.stderr for run in runs)
    files = [path for path in here.rglob("*") if path.is_file()]
    assert here / ".other.partial" / "journal" in files
    for secret in (TOKEN, "secret-word", "signature="):
        assert secret not in told
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        assert not [name for repo in hub.repositories for name, content in hub.files(repo).items() if secret.encode() in content]


def test_a_check_that_fails_keeps_the_model_from_the_hub(hub: Hub, hub_home: Path, here: Path) -> None:
    (here / "recipe.yaml").write_text(yaml.safe_dump({
        "inputs": {"a": "./a", "b": "./b"}, "steps": [{"merge": {"models": ["a", "b"]}}], "checks": {"limits": {"bits_per_weight": 16}}, "out": "hf://org/new",
    }))  # fmt: skip
    run = compress(hub, "run", "recipe.yaml", home=hub_home, cwd=here)
    assert run.returncode == 1
    assert "check failed: bits a weight are 32, at most 16 are wanted; nothing was published" in run.stderr
    assert hub.files("org/new").keys() == {".gitattributes"}
    (here / "recipe.yaml").write_text((here / "recipe.yaml").read_text().replace("16", "32"))
    run = compress(hub, "run", "recipe.yaml", "--resume", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    assert "model.safetensors" in hub.files("org/new")


def test_the_card_says_what_the_model_is_made_of(hub: Hub, hub_home: Path, here: Path) -> None:
    run = compress(hub, *MERGE, "-o", "hf://org/new", home=hub_home, cwd=here)
    assert run.returncode == 0, run.stderr
    card = hub.files("org/new")["README.md"].decode()
    front = re.fullmatch(r"---\n(.*?)\n---\n.*", card, re.DOTALL)
    assert front is not None
    assert yaml.safe_load(front[1]) == {"library_name": "transformers", "tags": ["mergekit-plus", "merge"]}  # local models have no name on the Hub
    assert hub.files("org/new")["recipe.yaml"].decode().rstrip() in card
