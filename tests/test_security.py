"""What docs/security.md promises, against models and recipes made to break it; through the program, from the outside."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from program import Program
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_tensors
from test_imports import MODULES, ROOT

from mergekit_plus.checkpoint import Checkpoint, TensorTable, save
from mergekit_plus.errors import CheckpointError

MODELS = ROOT / "tests" / "models"
SECRET = "nobody-must-see-this"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small real model in a folder of its own, beside a secret."""
    (tmp_path / "secret.json").write_text(SECRET)
    save(Checkpoint.open(MODELS / "code"), tmp_path / "model")
    return tmp_path / "model"


def changed(path: Path, **changes: Any) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))



# ---- code ----


def calls() -> list[tuple[str, ast.Call, str]]:
    """Every call in the project: the module, the call, and what is called as it is written."""
    return [
        (name, node, ast.unparse(node.func))
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_no_module_unpickles_evaluates_or_renders_what_it_reads() -> None:
    forbidden = r"(torch\.|np\.|numpy\.|yaml\.|\w*pickle\.)(load|loads|load_all|unsafe_load|full_load|Loader|UnsafeLoader|FullLoader)"
    forbidden += r"|eval|exec|compile|__import__|os\.(system|popen|exec\w*)|subprocess\.\w+|\w+\.apply_chat_template|Template|Environment"
    forbidden += r"|yaml\.(safe_load|safe_load_all)"  # safe_yaml bounds what they do not
    found = [f"{name}: {called}" for name, call, called in calls() if re.fullmatch(forbidden, called) and not _of_weights_only(call, called)]
    assert found == ["mergekit_plus.generate: tokenizer.apply_chat_template"]  # with --chat, in a sandbox: see below


def _of_weights_only(call: ast.Call, called: str) -> bool:
    """A training's own state in the output's partial folder, read by torch's restricted unpickler, which makes nothing but tensors and plain containers."""
    return called == "torch.load" and any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in call.keywords)


def test_transformers_is_never_told_to_trust_remote_code() -> None:
    for name, call, called in calls():
        told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert told.get("trust_remote_code", "False") == "False", name
        if re.search(r"\bAuto\w+\.from_(pretrained|config)$", called):
            assert told.get("trust_remote_code") == "False", f"{name}: {called} does not say trust_remote_code=False"


def test_code_beside_the_weights_neither_runs_nor_travels(compress: Program, model: Path, tmp_path: Path) -> None:
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name, maps in (("config.json", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config.json", ("AutoTokenizer",))):
        entry = {key: ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil" for key in maps}
        changed(model / name, auto_map=entry) if (model / name).exists() else (model / name).write_text(json.dumps({"auto_map": entry}))
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 200)
    for arguments in (["inspect", model], ["quantize", model, "--group-size", 32, "-o", "out"], ["eval", model, "-t", "text.txt", "--windows", 1]):
        code, _, err = compress(*arguments)
        assert code == 0, err
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "out").glob("*.py"))


def test_a_chat_template_is_copied_and_never_rendered(compress: Program, model: Path, tmp_path: Path) -> None:
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path}/ran') }}}}"
    (model / "chat_template.jinja").write_text(template)
    (tmp_path / "text.txt").write_text("x = 1\n" * 500)
    for arguments in (["merge", model, MODELS / "docs", "-o", "out"], ["eval", "out", "-t", "text.txt", "--windows", 1]):
        code, _, err = compress(*arguments)
        assert code == 0, err
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("reach", ["cycler.__init__.__globals__.os.system('touch {}')", "messages.append('{}')", "''.__class__.__mro__[1].__subclasses__()"])
def test_a_chat_template_that_is_asked_for_is_rendered_in_a_sandbox(compress: Program, model: Path, tmp_path: Path, reach: str) -> None:
    (model / "chat_template.jinja").write_text(f"{{{{ {reach.format(tmp_path / 'ran')} }}}}")
    assert re.search(r"model: its chat template fails \(Security", compress("generate", model, "-p", "hello", "-n", 1, "--chat").line)
    assert not (tmp_path / "ran").exists()


def test_what_a_model_says_does_not_steer_a_terminal(model: Path) -> None:
    from mergekit_plus.evaluate import load_tokenizer
    from mergekit_plus.generate import _shown

    parts: list[str] = []
    shown = _shown(load_tokenizer(Checkpoint.open(model)), parts.append)
    shown.on_finalized_text("a\x1b[2Jb\tc\nd\x07", stream_end=True)
    assert "".join(parts) == "a\ufffd[2Jb\tc\nd\ufffd\n"


# ---- paths ----


@pytest.mark.parametrize(
    "shard", ["../secret.json", "../model/model.safetensors", "/etc/passwd", "a/../model.safetensors", "..", "", "model.safetensors\n", "m\\..\\x.safetensors"]
)
def test_an_index_names_files_in_its_folder_only(compress: Program, model: Path, shard: str) -> None:
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    line = compress("merge", model, MODELS / "docs").line
    assert "names the shard" in line or "is missing" in line
    assert not Path("merged").exists()


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret.json", "/proc/self/environ"])
def test_a_shard_that_is_a_link_to_something_else_is_refused_and_not_quoted(compress: Program, model: Path, target: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(target)
    line = compress("quantize", model).line
    assert "outside of the model's folder" in line
    assert SECRET[:8] not in line
    assert "root:" not in line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "config.json", "chat_template.jinja"])
def test_a_small_file_that_is_a_link_out_of_its_folder_is_not_carried(compress: Program, model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../secret.json")
    line = compress("merge", model, MODELS / "docs").line
    assert f"{name} is a link to" in line
    assert "outside of the model's folder" in line
    assert SECRET not in line
    assert not Path("merged").exists()


def test_links_within_a_folder_and_into_the_blobs_of_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").rename(model / "real")
    (model / "tokenizer.json").symlink_to("real")
    assert b"model" in Checkpoint.open(model).file("tokenizer.json")
    cache = tmp_path / "hub"
    for blobs in (cache / "models--org--name" / "blobs", cache / "blobs" / "ab"):  # a repository's own, and those that repositories share
        snapshot = cache / "models--org--name" / "snapshots" / "0123"
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir(parents=True)
        blobs.mkdir(parents=True)
        shutil.copy(model / "model.safetensors", snapshot)
        (blobs / "cd").write_text("{}")
        (snapshot / "config.json").symlink_to(os.path.relpath(blobs / "cd", snapshot))
        assert Checkpoint.open(snapshot).file("config.json") == b"{}"
    (snapshot / "tokenizer.json").symlink_to("../../../../secret.json")
    with pytest.raises(CheckpointError, match="outside of the model's folder"):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/b.json", "..", ".", "", "evil\x1b[2J.json", "a\nb.json"])
def test_no_checkpoint_carries_a_file_under_a_name_that_leads_elsewhere(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not the name of a file beside the weights"):
        Checkpoint("x", TensorTable({}), {name: b"{}"})


def test_a_tensors_name_is_a_name_and_no_path(compress: Program, tmp_path: Path) -> None:
    for file, factor in (("a", 1.0), ("b", 3.0)):
        save_file({"../../w": torch.full((2,), factor), "/etc/x": torch.zeros(1), "C:\\y": torch.zeros(1)}, tmp_path / f"{file}.safetensors")
    before = set(tmp_path.parent.iterdir())
    code, _, err = compress("merge", "a.safetensors", "b.safetensors", "--max-shard-size", "8", "-o", "out")
    assert code == 0, err
    assert torch.cat([load_file(path)["../../w"] for path in Path("out").glob("*.safetensors") if "../../w" in load_file(path)]).tolist() == [2, 2]
    assert set(tmp_path.parent.iterdir()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors", "out"}


# ---- sizes ----


def test_small_files_are_small(compress: Program, model: Path) -> None:
    os.truncate(model / "config.json", 17 << 20)  # sparse; zeros
    assert "config.json is not JSON that can be read (it is longer than 16777216 bytes)" in compress("quantize", model).line
    os.truncate(model / "tokenizer.json", 1 << 40)
    assert "tokenizer.json is 1099511627776 bytes long; at most 268435456" in compress("quantize", model).line


@pytest.mark.parametrize("content", ["[" * 1_000_000, '{"a":' * 1_000_000, "9" * 100_000, '{"a": ' + "9" * 100_000 + "}", "\x00", "NaN"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_deep_or_strange_is_refused(compress: Program, model: Path, name: str, content: str) -> None:
    if "index" in name:
        (model / "model.safetensors").unlink()
    (model / name).write_text(content)
    assert name in compress("merge", model, MODELS / "docs").line


@pytest.mark.parametrize(("kind", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer"), ("bert", "num_hidden_layers")])
def test_a_config_cannot_ask_for_a_billion_layers(compress: Program, model: Path, kind: str, key: str) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": kind, key: 10**9}))
    code, out, err = compress("inspect", model, "--json")
    assert code == 0, err
    assert json.loads(out)["tensors"] > 0


def test_what_a_manifest_names_is_read_only_where_it_is_a_file(compress: Program, model: Path) -> None:
    manifest = json.loads((model / "manifest.json").read_text())
    nothing = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    os.mkfifo(model / "pipe")
    (model / "link").symlink_to("/dev/zero")
    manifest["outputs"] = {"pipe": nothing, "link": nothing}
    manifest["inputs"], manifest["places"] = {"x": {"zero": nothing}}, {"x": "/dev"}
    (model / "manifest.json").write_text(json.dumps(manifest))
    run = compress("verify", model, "--inputs")
    assert run.returncode == 1
    assert run.stdout.count("it is not a regular file") == 3
    manifest["outputs"] = {"../secret.json": nothing}
    (model / "manifest.json").write_text(json.dumps(manifest))
    assert "is not a manifest" in compress("verify", model).line


# ---- recipes ----

BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))])
MERGED = "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40))])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("inputs: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor for the tag"),
        ("!!python/name:os.system {}", "could not determine a constructor for the tag"),
        (BOMB, "more than 100000 values, aliases counted as often as they stand"),
        (MERGED, "more than 100000 values, aliases counted as often as they stand"),
        ("[" * 10_000, "nested too deeply, or holds itself"),
        ("inputs: &a {x: *a}", "nested too deeply, or holds itself"),
        ("inputs: {a: a}\ninputs: {a: b}", "line 2: the key 'inputs' is there twice"),
        ("a: 1\n---\nb: 2", "holds 2 YAML documents, where one is expected"),
        ("9" * 10_000, "not YAML that can be read"),
        ("a: \0", "not YAML that can be read"),
        ("a: \ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "not YAML that can be read"),
        ("#" * (1 << 20) + "#", "longer than 1048576 bytes"),
    ],
)
def test_a_recipe_is_data(compress: Program, tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert reason in compress("run", "recipe.yaml").line
    if len(text) < 1000:
        assert "-s x" in compress("merge", "a", "b", "-s", f"x={text}".replace("\0", "\x01").replace(",", " ")).line
    assert not (tmp_path / "ran").exists()


def test_a_recipe_that_never_ends_is_not_read_to_its_end(compress: Program) -> None:
    assert "longer than 1048576 bytes" in compress("run", "/dev/zero").line


# ---- terminals ----


def test_what_a_file_says_does_not_steer_the_terminal(compress: Program, model: Path, tmp_path: Path) -> None:
    changed(model / "config.json", model_type="\x1b]0;owned\x07", architectures=["\x1b[2J\nwrote out: all is well"])
    code, out, err = compress("inspect", model)
    assert code == 0, err
    assert "\x1b" not in out + err
    assert "\nwrote" not in out
    (tmp_path / "a\x1b[2J\nb.safetensors").write_bytes(b"no")
    assert "a\ufffd[2J b.safetensors" in compress("inspect", "a\x1b[2J\nb.safetensors").line


# ---- the Hub ----


def toy(**files: bytes) -> dict[str, bytes]:
    """A model in a repository, and more files in it."""
    return {"model.safetensors": save_tensors({"w": torch.ones(4, 4)}), "config.json": b"{}", **files}


def test_an_index_on_the_hub_leads_to_no_other_repository(own_hub: Hub, compress: Program) -> None:
    own_hub.commit("org/secret", toy(), private=True)
    for shard in ("../../../../org/secret/resolve/main/model.safetensors", "/org/secret/resolve/main/model.safetensors", "model.safetensors?x"):
        index = json.dumps({"weight_map": {"w": shard}}).encode()
        own_hub.commit("org/evil", {"model.safetensors.index.json": index, "config.json": b"{}"})
        assert "names the shard" in compress("dequantize", "org/evil").line
    assert own_hub.requests("secret") == []


@pytest.mark.parametrize("cache", [[], ["--cache"]])
def test_names_on_the_hub_that_lead_elsewhere_are_not_followed(own_hub: Hub, compress: Program, tmp_path: Path, hub_home: Path, cache: list[str]) -> None:
    own_hub.commit("org/evil", toy(**{"../tokenizer.model": b"x", "a/../../tokenizer.json": b"x", "/tmp/vocab.json": b"x"}))
    own_hub.commit("org/good", toy())
    run = compress("merge", "org/evil", "org/good", *cache, "-o", "out")
    assert run.returncode == 0, run.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "manifest.json", "model.safetensors", "recipe.yaml"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [path for path in hub_home.rglob("*") if path.name in ("tokenizer.model", "tokenizer.json", "vocab.json")]
    own_hub.commit("org/evil", toy(**{"evil\x1b[2J.model": b"x"}))
    assert "is not the name of a file beside the weights" in compress("merge", "org/evil", "org/good", "-o", "out2").line


# ---- the page ----


def test_every_promise_on_the_page_names_a_test_that_is_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
