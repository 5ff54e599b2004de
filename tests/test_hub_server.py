"""The Hub of the tests: the real clients do on it what they do on huggingface.co, and its faults are what they say."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import httpx2
import pytest
import torch
from hub_client import python
from hub_server import TOKEN, Hub
from huggingface_hub import HfApi, HfFileSystem, get_safetensors_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, http_backoff
from safetensors.torch import save_file

MODELS = Path(__file__).parent / "models"
uploads = pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub's own use of its HTTP library


def get(hub: Hub, asked: str | None = None, name: str = "data.safetensors") -> httpx2.Response:
    """One plain range of a file of org/name, without retries."""
    headers = build_hf_headers() | ({"Range": f"bytes={asked}"} if asked else {})
    return http_backoff("GET", hf_hub_url("org/name", name), headers=headers, max_retries=0, timeout=5, follow_redirects=True)


@pytest.fixture
def stored(own_hub: Hub) -> Hub:
    """One small text and one "large" file of 200,000 known bytes."""
    own_hub.commit("org/name", {"a.txt": b"text", "data.safetensors": bytes(range(200)) * 1000, "sub/b.txt": b"below"})
    return own_hub


@pytest.mark.parametrize("cdn", [False, True])
def test_files_are_downloaded_alone_and_together(stored: Hub, cdn: bool) -> None:
    stored.cdn = cdn
    sha = stored.repositories["org/name"].branches["main"]
    path = Path(hf_hub_download("org/name", "data.safetensors"))
    assert path.read_bytes() == stored.files("org/name")["data.safetensors"]
    assert path.parent.name == sha
    folder = Path(snapshot_download("org/name"))
    assert (folder / "sub" / "b.txt").read_bytes() == b"below"
    assert {request.token for request in stored.requests("resolve")} == {TOKEN}
    hosts = {(request.host, request.token) for request in stored.requests("cdn/")}
    assert hosts == ({("localhost", None)} if cdn else set())  # the token goes to the Hub alone


def test_listings_come_in_pages_and_by_folder(stored: Hub) -> None:
    stored.page = 1
    api = HfApi()
    assert [entry.path for entry in api.list_repo_tree("org/name")] == ["a.txt", "data.safetensors", "sub"]
    assert [entry.path for entry in api.list_repo_tree("org/name", "sub")] == ["sub/b.txt"]
    assert [entry.path for entry in api.list_repo_tree("org/name", recursive=True)] == ["a.txt", "data.safetensors", "sub", "sub/b.txt"]
    (info,) = api.get_paths_info("org/name", ["data.safetensors", "absent"])
    assert info.size == info.lfs.size == 200_000
    assert info.lfs.sha256 == stored.repositories["org/name"].commits[api.resolve_revision("org/name").resolved]["data.safetensors"].sha256


def test_ranges_and_metadata(own_hub: Hub, tmp_path: Path) -> None:
    save_file({"w": torch.arange(4.0)}, tmp_path / "model.safetensors")
    own_hub.commit("org/name", tmp_path)
    assert list(get_safetensors_metadata("org/name").files_metadata["model.safetensors"].tensors) == ["w"]
    with HfFileSystem().open("org/name/model.safetensors", cache_type="none") as file:
        file.seek(-16, 2)
        assert torch.frombuffer(bytearray(file.read(16)), dtype=torch.float32).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("asked", "status", "content", "told"),
    [
        (None, 200, 200_000, None),
        ("0-7", 206, 8, "bytes 0-7/200000"),
        ("199990-", 206, 10, "bytes 199990-199999/200000"),
        ("-5", 206, 5, "bytes 199995-199999/200000"),
        ("199999-300000", 206, 1, "bytes 199999-199999/200000"),
        ("200000-200001", 416, 0, "bytes */200000"),
    ],
)
def test_a_range_is_answered_as_http_says(stored: Hub, asked: str | None, status: int, content: int, told: str | None) -> None:
    answer = get(stored, asked)
    assert (answer.status_code, len(answer.content), answer.headers.get("Content-Range")) == (status, content, told)
    (request,) = stored.requests("resolve")
    assert (request.status, request.sent, request.range) == (status, content, asked and f"bytes={asked}")


def test_what_is_refused_is_refused_as_the_hub_does(own_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    own_hub.commit("org/gated", {"a.txt": b""}, gated=True)
    own_hub.commit("org/private", {"a.txt": b""}, private=True)
    api = HfApi(token=False)
    for repo, wanted in {"org/missing": RepositoryNotFoundError, "org/private": RepositoryNotFoundError, "org/gated": GatedRepoError}.items():
        with pytest.raises(wanted):
            api.hf_hub_download(repo, "a.txt")
    assert api.model_info("org/gated").gated == "auto"
    for revision, name, wrong in (("v9", "a.txt", RevisionNotFoundError), ("main", "b.txt", RemoteEntryNotFoundError)):
        with pytest.raises(wrong):
            hf_hub_download("org/private", name, revision=revision)
    own_hub.tokens.clear()
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi().model_info("org/private")


@uploads
def test_a_folder_is_uploaded_in_one_commit_and_a_stale_parent_refused(own_hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100_000))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    api = HfApi()
    api.create_repo("org/new", private=True)
    first = api.resolve_revision("org/new").resolved
    api.upload_folder(repo_id="org/new", folder_path=tmp_path, parent_commit=first)
    assert own_hub.files("org/new").keys() == {".gitattributes", "config.json", "model.safetensors", "README.md"}
    assert own_hub.files("org/new")["model.safetensors"] == bytes(100_000)
    (put,) = own_hub.requests("PUT")
    assert (put.received, put.token) == (100_000, None)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(HfHubHTTPError) as stale:
        api.upload_folder(repo_id="org/new", folder_path=tmp_path, parent_commit=first)
    assert stale.value.response.status_code == 412
    assert len(own_hub.requests("PUT")) == 1  # the large file is there already
    with pytest.raises(HfHubHTTPError):
        HfApi(token=False).auth_check("org/new", write=True)
    (tmp_path / "README.md").unlink()
    api.create_branch("org/new", branch="next")
    api.upload_folder(repo_id="org/new", folder_path=tmp_path, revision="next", delete_patterns="*.md")
    assert own_hub.files("org/new", "next").keys() == {".gitattributes", "config.json", "model.safetensors"}
    assert own_hub.files("org/new")["config.json"] == b"{}"


def test_faults_of_an_answer(stored: Hub) -> None:
    whole = stored.files("org/name")["data.safetensors"]
    stored.fault("GET .*data", status=503)
    stored.fault("GET .*data", status=429, headers={"Retry-After": "0"})
    stored.fault("GET .*data", ignore_range=True)
    stored.fault("GET .*data", flip=102)
    stored.fault("GET .*data", headers={"ETag": '"another"'})
    answers = []
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as caught:
            get(stored, "100-103").raise_for_status()
        answers.append(caught.value.response.status_code)
    assert answers == [503, 429]
    assert get(stored, "100-103").content == whole
    assert get(stored, "100-103").content == bytes([100, 101, 102 ^ 0xFF, 103])
    assert get(stored, "100-103").headers["ETag"] == '"another"'
    assert get(stored, "100-103").content == whole[100:104]


def test_faults_of_a_connection(stored: Hub) -> None:
    stored.fault("GET .*data", truncate=100_000, skip=1)
    stored.fault("GET .*data", reset=100_000, skip=1)
    stored.fault("GET .*data", stall=100_000, skip=1)
    assert get(stored).status_code == 200
    with pytest.raises(httpx2.RemoteProtocolError):
        get(stored)
    with pytest.raises(httpx2.ReadError):
        get(stored)
    with pytest.raises(httpx2.ReadTimeout):
        http_backoff("GET", hf_hub_url("org/name", "data.safetensors"), max_retries=0, timeout=0.2)
    assert [request.sent for request in stored.requests("data")] == [200_000, 100_000, 100_000, 100_000]


def test_retries_do_not_take_seconds_here(stored: Hub) -> None:
    stored.fault("GET .*data", status=500, times=3)
    assert http_backoff("GET", hf_hub_url("org/name", "data.safetensors")).status_code == 200
    stored.fault("GET .*data", status=429, headers={"RateLimit": '"resolvers";r=0;t=2', "RateLimit-Policy": '"fixed window";"resolvers";q=10;w=300'})
    assert http_backoff("GET", hf_hub_url("org/name", "data.safetensors")).status_code == 200
    assert [request.status for request in stored.requests("data")] == [500, 500, 500, 200, 429, 200]


@uploads
def test_a_fault_of_an_upload_comes_in_the_middle_of_its_body(own_hub: Hub, tmp_path: Path) -> None:
    own_hub.commit("org/name", {"a.txt": b""})
    own_hub.fault("PUT", reset=1 << 20)
    HfApi().upload_file(path_or_fileobj=bytes(4 << 20), path_in_repo="model.safetensors", repo_id="org/name")
    cut, whole = own_hub.requests("PUT")
    assert 1 << 20 < cut.received < 4 << 20 == whole.received


def test_links_expire_and_branches_move(stored: Hub) -> None:
    stored.cdn = True
    url = HfApi().get_hf_file_metadata(url=hf_hub_url("org/name", "data.safetensors")).location
    assert http_backoff("GET", url, headers={"Range": "bytes=0-3"}).status_code == 206
    stored.fault("GET .*a.txt", then=lambda: (stored.expire_links(), stored.commit("org/name", {"a.txt": b"moved"})))
    assert get(stored, name="a.txt").content == b"moved"
    assert http_backoff("GET", url).status_code == 403


def test_transformers_loads_a_model_of_three_shards(hub: Hub, hub_home: Path, tmp_path: Path) -> None:
    code = """
    import sys
    from transformers import AutoModelForCausalLM, AutoTokenizer
    AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], max_shard_size="1200KB")
    """
    assert python(hub, code, MODELS / "code", tmp_path / "three", home=hub_home, HF_HUB_OFFLINE="1").returncode == 0
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3
    hub.commit("org/tiny", tmp_path / "three")
    code = """
    from transformers import AutoModelForCausalLM
    print(sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained("org/tiny").parameters()))
    """
    run = python(hub, code, home=hub_home)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 1_000_000
    assert {r.status for r in hub.requests("GET .*safetensors$")} == {200}
    index = json.loads(hub.files("org/tiny")["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] < hub.sent() < index["metadata"]["total_size"] + 100_000


def test_the_server_ends_with_its_threads_though_clients_hang(tmp_path: Path) -> None:
    before = threading.active_count()
    with Hub() as hub, httpx2.Client() as client:
        hub.commit("org/name", {"a.txt": b"text"})
        hub.fault("GET .*resolve", stall=1)
        assert client.get(hub.url + "/api/models/org/none").status_code == 401  # kept alive
        with pytest.raises(httpx2.ReadTimeout):
            client.get(hub.url + "/org/name/resolve/main/a.txt", timeout=0.1)
    assert threading.active_count() == before
