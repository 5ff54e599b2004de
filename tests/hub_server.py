"""A small Hub on this machine: what huggingface_hub, transformers and we ask of huggingface.co, over real HTTP, counted, and wrong on request.

    with Hub() as hub:
        hub.commit("org/name", Path("tests/models/code"))            # or {"config.json": b"{}"}; a commit on main
        hub.fault("GET .*safetensors", status=503, times=2)         # the next two such requests
        ...                                                          # a client with HF_ENDPOINT=hub.url
        assert [r.range for r in hub.requests("GET .*resolve")] == ["bytes=0-7"]
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_wire import Refused, Stored, Wire, WireServer

TOKEN = "hf_aTokenOfTheTests"  # may read and write everything


@dataclass
class Repository:
    """Commits by their names, each a table of files; branches point at commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def add(self, files: dict[str, Stored], branch: str, message: str = "a commit") -> str:
        told = [self.branches.get(branch, ""), message, *(f"{name} {file.oid}" for name, file in sorted(files.items()))]
        sha = hashlib.sha1("\n".join(told).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha


class Hub(WireServer):
    """The server; repositories, faults and the log are its attributes, to be read and set while it runs."""

    def __init__(self, cdn: bool = False, page: int = 1000) -> None:
        super().__init__(_Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn_url = f"http://localhost:{self.server_port}"  # another origin to every client
        self.cdn, self.page = cdn, page  # whether large files are redirected there; entries in a page of a listing
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, Stored] = {}
        self.tokens, self.readers = {TOKEN}, set[str]()  # who may write (and read), and who may only read
        self.links = 0  # the generation of signed links; `expire_links` ends all that were given out

    def commit(self, repo: str, files: Path | Mapping[str, bytes | Path], branch: str = "main", private: bool = False, gated: bool = False) -> str:
        """Put a commit of exactly these files on a branch of a (new) repository, and return its name."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path for path in sorted(files.rglob("*")) if path.is_file()}
        with self.lock:
            repository = self.repositories.setdefault(repo, Repository(private, gated))
            stored = {name: Stored(name, content) for name, content in files.items()}
            self.blobs |= {file.sha256: file for file in stored.values() if file.lfs}
            return repository.add(stored, branch)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or commit, as a reader finds them."""
        repository = self.repositories[repo]
        return {name: file.read(0, file.size) for name, file in repository.commits[repository.branches.get(revision, revision)].items()}

    def expire_links(self) -> None:
        """Every signed link given out so far answers 403 from now on."""
        self.links += 1


class _Handler(Wire):
    """What the Hub answers."""

    server: Hub

    def _route(self, body: bytes) -> Callable[[], None]:
        path, _, query = self.path.partition("?")
        path = path.strip("/")
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        if self.request_log.token not in (None, *self.server.tokens, *self.server.readers):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if match := re.fullmatch(r"(cdn|lfs)/(\w+)", path):
            return self._blob(match[1], match[2], asked, body)
        if path in ("api/repos/create", "api/validate-yaml"):
            return self._create(json.loads(body)) if path.endswith("create") else self._json({"warnings": [], "errors": []})
        if match := re.fullmatch(r"api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)|([^/]+/[^/]+)\.git/info/lfs/objects/(batch)", path):
            repo, what = match[1] or match[4], match[2] or match[5]
            return getattr(self, f"_{what}")(repo, self._repository(repo, write=True), unquote(match[3] or ""), body)
        if match := re.fullmatch(r"api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info|auth-check)(?:/([^/]+))?(?:/(.*))?)?", path):
            return self._read(match[1], match[2], unquote(match[3] or "main"), unquote(match[4] or ""), asked, body)
        if match := re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self._repository(match[1])
            if repository.gated and self.request_log.token is None:
                raise Refused(403, "GatedRepo", "Access to this model is restricted.")
            sha, files = self._revision(repository, unquote(match[2]))
            return self._resolve(sha, files, unquote(match[3]))
        raise Refused(404, "", "not here")

    def _repository(self, repo: str, write: bool = False) -> Repository:
        repository, token = self.server.repositories.get(repo), self.request_log.token
        if repository is None or (repository.private and token is None):
            raise Refused(401, "RepoNotFound", "Repository not found")
        if write and token not in self.server.tokens:
            raise Refused(403 if token else 401, "", "you may not write here")
        return repository

    def _revision(self, repository: Repository, revision: str) -> tuple[str, dict[str, Stored]]:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def _read(self, repo: str, what: str | None, revision: str, under: str, asked: Mapping[str, str], body: bytes) -> Callable[[], None]:
        repository = self._repository(repo, write=(what, revision) == ("auth-check", "write"))
        if what == "auth-check":
            return self._json({})
        sha, files = self._revision(repository, revision)
        if what in (None, "revision"):
            siblings = [{"rfilename": name, **(_metadata(file) if asked.get("blobs") else {})} for name, file in files.items()]
            return self._json({"id": repo, "sha": sha, "siblings": siblings, "gated": repository.gated and "auto", "private": repository.private, "tags": []})
        if what == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            return self._json([_entry(name, files[name]) for name in wanted if name in files])
        inside = {name: file for name, file in files.items() if name.startswith(f"{under}/" if under else "")}
        if under and not inside:
            raise Refused(404, "EntryNotFound", f"{under} does not exist on {revision}")
        entries: dict[str, dict[str, Any]] = {}
        for name, file in inside.items():
            depth = 1 + bool(under) + under.count("/")
            top = "/".join(name.split("/")[:depth])
            if top != name:
                entries[top] = {"type": "directory", "path": top, "oid": "0" * 40, "size": 0}
            if top == name or asked.get("recursive", "").lower() == "true":
                entries[name] = _entry(name, file)
        first = int(asked.get("cursor", 0))
        rest = urlsplit(self.path).path + "?" + "&".join(f"{key}={value}" for key, value in {**asked, "cursor": str(first + self.server.page)}.items())
        link = {"Link": f'<{self.server.url}{rest}>; rel="next"'} if first + self.server.page < len(entries) else {}
        return self._json(list(entries.values())[first : first + self.server.page], link)

    def _resolve(self, sha: str, files: Mapping[str, Stored], name: str) -> Callable[[], None]:
        commit = {"X-Repo-Commit": sha}
        if name not in files:
            return lambda: self._answer(404, b"", {**commit, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        file = files[name]
        if not (self.server.cdn and file.lfs):
            return self._file(file, commit)
        where = f"{self.server.cdn_url}/cdn/{file.sha256}?name={quote(name)}&signature={self.server.links}"
        linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size), "ETag": f'"{file.oid}"'}
        return lambda: self._answer(302, b"", {**commit, **linked, "Location": where})

    def _blob(self, kind: str, oid: str, asked: Mapping[str, str], body: bytes) -> Callable[[], None]:
        """Signed links: the download of a large file, or its upload."""
        if asked.get("signature") != str(self.server.links):
            raise Refused(403, "", "Request has expired")
        if kind == "cdn":
            return self._file(self.server.blobs[oid], {})
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "the content is not what was announced")
        self.server.blobs[oid] = Stored("a.safetensors", body)
        return lambda: self._answer(200)

    def _create(self, wanted: Mapping[str, Any]) -> Callable[[], None]:
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if self.request_log.token not in self.server.tokens:
            raise Refused(403 if self.request_log.token else 401, "", "you may not create this repository")
        if repo in self.server.repositories:
            raise Refused(409, "", "You already created this model repo")
        self.server.repositories[repo] = Repository(bool(wanted.get("private")) or wanted.get("visibility") == "private")
        self.server.repositories[repo].add({".gitattributes": Stored(".gitattributes", b"*.safetensors filter=lfs\n")}, "main", "initial commit")
        return self._json({"url": f"{self.server.url}/{repo}"})

    def _branch(self, repo: str, repository: Repository, branch: str, body: bytes) -> Callable[[], None]:
        if branch in repository.branches:
            raise Refused(409, "", "Reference already exists")
        repository.branches[branch] = self._revision(repository, json.loads(body or b"{}").get("startingPoint", "main"))[0]
        return lambda: self._answer(201)

    def _preupload(self, repo: str, repository: Repository, revision: str, body: bytes) -> Callable[[], None]:
        _, files = self._revision(repository, revision)
        told = []
        for file in json.loads(body)["files"]:
            lfs, known = file["path"].endswith(".safetensors"), files.get(file["path"])
            told.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": known and known.etag})
        return self._json({"files": told})

    def _batch(self, repo: str, repository: Repository, revision: str, body: bytes) -> Callable[[], None]:
        objects = []
        for wanted in json.loads(body)["objects"]:
            if wanted["oid"] not in self.server.blobs:
                wanted = {**wanted, "actions": {"upload": {"href": f"{self.server.cdn_url}/lfs/{wanted['oid']}?signature={self.server.links}"}}}
            objects.append(wanted)
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, repository: Repository, branch: str, body: bytes) -> Callable[[], None]:
        head, files = self._revision(repository, branch)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", head) != head:
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = Stored(value["path"], base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise Refused(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif kind == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        sha = repository.add(files, branch, header["summary"])
        return self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "hookOutput": ""})


def _metadata(file: Stored) -> dict[str, Any]:
    """A file as the listing of a whole repository has it, on request."""
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 134}} if file.lfs else {}
    return {"size": file.size, "blobId": file.oid, **lfs}


def _entry(name: str, file: Stored) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.lfs else {}
    return {"type": "file", "path": name, "size": file.size, "oid": file.oid, **lfs}


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something is true of a running hub."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to be"
        threading.Event().wait(0.005)  # `time.sleep` is quicker in these tests, see hub_client
