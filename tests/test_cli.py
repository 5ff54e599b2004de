"""The program as a user meets it: whole processes, their output, their exit codes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_plus import __version__

REPOSITORY = Path(__file__).parent.parent
MODELS = REPOSITORY / "tests" / "models"


def compress(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `compress` in a folder."""
    command = [sys.executable, "-m", "mergekit_plus", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


def refused(run: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line on stderr that says all of this."""
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with a.safetensors and b.safetensors."""
    save_file({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "n": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file({"w": torch.tensor([[3.0, 2.0], [1.0, 0.0]]), "n": torch.zeros(2)}, tmp_path / "b.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_help_loads_no_torch_and_takes_little_time(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-X", "importtime", "-m", "mergekit_plus", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "numpy", "pydantic", "huggingface_hub"}
    assert "quantize" in run.stdout
    assert after.ru_utime - before.ru_utime < 5  # the target is 0.6 s on an idle machine; this only catches a heavy import


def test_the_version_is_told(tmp_path: Path) -> None:
    assert compress("--version", cwd=tmp_path).stdout == f"mergekit-plus {__version__}\n"


def test_two_files_merge_with_no_options_at_all(pair: Path) -> None:
    run = compress("merge", "a.safetensors", "b.safetensors", cwd=pair)
    assert run.returncode == 0, run.stderr
    assert load_file(pair / "merged.safetensors")["w"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert sorted(os.listdir(pair)) == ["a.safetensors", "b.safetensors", "merged.manifest.json", "merged.safetensors"]


def test_a_merge_does_not_overwrite_unless_it_is_told_to(pair: Path) -> None:
    (pair / "merged.safetensors").write_bytes(b"mine")
    refused(compress("merge", "a.safetensors", "b.safetensors", cwd=pair), "merged.safetensors exists already", "--overwrite")
    assert (pair / "merged.safetensors").read_bytes() == b"mine"
    assert compress("merge", "a.safetensors", "b.safetensors", "--overwrite", cwd=pair).returncode == 0
    assert load_file(pair / "merged.safetensors")["n"].tolist() == [0.5, 0.5]


def test_method_options_are_given_by_name(pair: Path) -> None:
    run = compress("merge", "a.safetensors", "b.safetensors", "-s", "weight=3,1", "--dtype", "float16", "-o", "out.safetensors", "--json", cwd=pair)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["outputs"]["out.safetensors"]["bytes"] == (pair / "out.safetensors").stat().st_size
    merged = load_file(pair / "out.safetensors")["w"]
    assert merged.dtype == torch.float16
    assert merged.tolist() == [[1.5, 2.0], [2.5, 3.0]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokenizer", "unoin"], ["--tokenizer: 'unoin' is no model. Did you mean 'union'?"]),
        (["-m", "tied"], ["compress: merge: ", "unknown merge method 'tied'", "Did you mean 'ties'?"]),
        (["-m", "ties"], ["ties", "--base"]),
        (["-m", "ties", "-b", "a.safetensors", "-s", "density=50"], ["density", "less than or equal to 1"]),
        (["-s", "wieght=1"], ["linear has no option 'wieght'", "Did you mean 'weight'?"]),
        (["-s", "weight=1,-1"], ["sum to zero"]),
        (["-s", "weight=1,2,3"], ["3 values for 2 models"]),
        (["-s", "weight"], ["name=value"]),
        (["--dtype", "float17"], ["unknown dtype 'float17'"]),
        (["--memory", "lots"], ["'lots' is not a size"]),
        (["-o", "no/such/folder/out.safetensors"], ["no/such/folder does not exist"]),
        (["-o", "a.safetensors", "--overwrite"], ["one of the inputs"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_leaves_nothing(pair: Path, arguments: list[str], words: list[str]) -> None:
    refused(compress("merge", "a.safetensors", "b.safetensors", *arguments, cwd=pair), *words)
    assert sorted(os.listdir(pair)) == ["a.safetensors", "b.safetensors"]


def test_inputs_that_do_not_exist_or_do_not_fit_are_named(pair: Path) -> None:
    refused(compress("merge", "a.safetensors", "c.safetensors", cwd=pair), "c.safetensors", "no such file")
    save_file({"w": torch.ones(3, 2), "n": torch.ones(2)}, pair / "c.safetensors")
    refused(compress("merge", "a.safetensors", "c.safetensors", cwd=pair), "w", "(2, 2)", "(3, 2)", "--exclude")
    save_file({"w": torch.full((2, 2), torch.nan), "n": torch.ones(2)}, pair / "c.safetensors")
    refused(compress("merge", "a.safetensors", "c.safetensors", cwd=pair), "c.safetensors", "w holds 4 values", "--allow-nonfinite")
    (pair / "c.safetensors").write_bytes((pair / "a.safetensors").read_bytes()[:-3])
    refused(compress("merge", "a.safetensors", "c.safetensors", cwd=pair), "c.safetensors", "truncated")
    torch.save({"w": torch.ones(2, 2)}, pair / "c.bin")
    refused(compress("merge", "a.safetensors", "c.bin", cwd=pair), "c.bin", "pickle", "Convert it first")
    assert not (pair / "merged.safetensors").exists()


def test_a_usage_error_exits_with_2_and_says_what_is_missing(tmp_path: Path) -> None:
    run = compress("merge", cwd=tmp_path)
    assert run.returncode == 2
    assert "models" in run.stderr.splitlines()[-1].lower()


def test_a_model_is_quantized_where_one_stands(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.symlink_to(MODELS / "base")
    inside = compress("quantize", "--bits", "4", "-o", tmp_path / "here", cwd=folder)
    named = compress("quantize", folder, cwd=tmp_path)
    assert inside.returncode == named.returncode == 0, inside.stderr + named.stderr
    config = json.loads((tmp_path / "base-4bit" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == (tmp_path / "base-4bit" / "model.safetensors").read_bytes()
    assert "tokenizer.json" in os.listdir(tmp_path / "here")

    back = compress("dequantize", "base-4bit", "-o", "back", cwd=tmp_path)
    dense = compress("quantize", folder, "--format", "dense", "-o", "dense", cwd=tmp_path)
    assert back.returncode == dense.returncode == 0, back.stderr + dense.stderr
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "dense" / "model.safetensors").read_bytes()
    refused(compress("merge", "base-4bit", "dense", cwd=tmp_path), "quantized already", "compress dequantize base-4bit")


def test_a_packed_model_goes_into_another_format_and_back(tmp_path: Path) -> None:
    assert compress("quantize", MODELS / "base", "--group-size", "32", cwd=tmp_path).returncode == 0
    for model, to in (("base-4bit", "gptq"), ("base-4bit-gptq", "pack-quantized")):
        run = compress("convert", model, "--to", to, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    back = tmp_path / "base-4bit-gptq-pack-quantized"
    assert (back / "model.safetensors").read_bytes() == (tmp_path / "base-4bit" / "model.safetensors").read_bytes()
    assert "all as recorded" in compress("verify", "base-4bit-gptq", cwd=tmp_path).stdout
    refused(compress("convert", "base-4bit", "--to", "gtpq", cwd=tmp_path), "unknown format 'gtpq'. Did you mean 'gptq'?")
    config = json.loads((back / "config.json").read_text())
    del config["quantization_config"]["quantization_status"]
    (back / "config.json").write_text(json.dumps(config))
    (back / "manifest.json").unlink()
    run = compress("verify", back, cwd=tmp_path)
    assert run.returncode == 1
    assert "transformers loads random weights in silence" in run.stdout


def test_a_scheme_goes_by_its_name(tmp_path: Path) -> None:
    run = compress("quantize", MODELS / "base", "--scheme", "NVFP4", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    config = json.loads((tmp_path / "base-nvfp4" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "nvfp4-pack-quantized"
    refused(compress("quantize", MODELS / "base", "--scheme", "FP8", "--bits", "8", cwd=tmp_path), "give bits, or a scheme by its name", "one of these")
    twice = compress("quantize", MODELS / "base", "--scheme", "FP8", "--asymmetric", cwd=tmp_path)
    refused(twice, "FP8 has groups of its own; leave group_size and symmetric out")


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tmp_path: Path) -> None:
    run = compress("merge", MODELS / "code", MODELS / "docs", "-m", "pcb", "-b", MODELS / "base", "--dry-run", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    assert facts["bytes_written"] == pytest.approx(2_892_000, rel=0.01)
    assert facts["bytes_read"] == pytest.approx(3 * 2_886_912)
    assert facts["measurements"] == 1
    assert facts["bytes_measured"] == 2 * facts["bytes_read"]
    assert facts["disk_needed"] == facts["bytes_written"]
    assert 0 < facts["peak_memory"] <= facts["memory"]
    assert facts["from_hub"] == {"bytes": 0, "requests": 0}
    assert os.listdir(tmp_path) == []


def test_eval_prints_a_table_and_json(tmp_path: Path) -> None:
    text = MODELS / "text" / "code.test.txt"
    run = compress("eval", MODELS / "code", "--text", text, "--against", MODELS / "base", "--windows", "4", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    base, code = json.loads(run.stdout)["rows"]
    assert code["ppl code.test"] < base["ppl code.test"]
    assert code["KL code.test"] > 0
    assert 0 < code["top-1 code.test"] < 1
    assert code["bits/weight"] == 16
    refused(compress("eval", MODELS / "code", "--text", "missing.txt", cwd=tmp_path), "missing.txt")


def test_inspect_and_methods_show_what_there_is(tmp_path: Path) -> None:
    shown = compress("inspect", MODELS / "base", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "42 linear" in shown.stdout
    assert "q_proj + k_proj + v_proj" in shown.stdout
    listed = compress("methods", "pcb", cwd=tmp_path)
    assert "-s ratio=" in listed.stdout
    assert "(sum, normalized, pairwise; default sum)" in listed.stdout
    assert "slerp (merge method, from --base, or the first of two models):" in compress("methods", "slerp", cwd=tmp_path).stdout
    refused(compress("methods", "pbc", cwd=tmp_path), "Did you mean 'pcb'?")


def test_diff_exits_with_1_where_models_differ(tmp_path: Path) -> None:
    same = compress("diff", MODELS / "base", MODELS / "base", cwd=tmp_path)
    assert (same.returncode, same.stdout.strip()) == (0, "the same")
    differs = compress("diff", MODELS / "base", MODELS / "code", "--json", cwd=tmp_path)
    assert differs.returncode == 1
    assert len(json.loads(differs.stdout)["tensors"]) == 57


def test_a_failed_check_exits_with_1_and_keeps_the_output(tmp_path: Path) -> None:
    recipe = tmp_path / "strict.yaml"
    steps = "steps: [{quantize: {bits: 2, group_size: 0}}]\nchecks: {limits: {bits_per_weight: 1}}\nout: o\n"
    recipe.write_text(f"inputs: {{m: {MODELS / 'base'}}}\n{steps}")
    run = compress("run", recipe, cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    assert "check failed: bits a weight are" in run.stderr
    assert (tmp_path / "o" / "model.safetensors").is_file()
    recipe.write_text("inputs: {m: nowhere}\nstepz: []\nchecks: {windw: 1}\n")
    refused(compress("run", recipe, cwd=tmp_path), "unknown key 'stepz'", "Did you mean 'steps'?", "unknown key 'windw'")


def test_an_option_may_vary_with_the_layer(tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("tuned", 8.0)):
        save_file({f"layers.{layer}.mlp.weight": torch.full((2, 2), value) for layer in range(3)}, tmp_path / f"{name}.safetensors")
    merge = ("merge", "tuned.safetensors", "-b", "base.safetensors", "-m", "task_arithmetic", "-o", "out.safetensors", "-s")
    run = compress(*merge, "lambda={depth: [0, 1]}", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert [tensor.unique().tolist() for tensor in load_file(tmp_path / "out.safetensors").values()] == [[0], [4], [8]]
    refused(compress(*merge, "lambda={attention: 0.3, mlp: 0.5}", cwd=tmp_path), "lambda={'attention': 0.3, 'mlp': 0.5}: write {depth: [first, ..., last]}")


def test_options_are_searched_and_the_result_stands_beside_others(tmp_path: Path) -> None:
    texts = [part for name in ("code", "docs") for part in ("--text", f"{name}={MODELS / 'text' / f'{name}.val.txt'}")]
    models = (MODELS / "code", MODELS / "docs", "-m", "task_arithmetic", "-b", MODELS / "base")
    run = compress("merge", *models, "--search", "lambda=0..1", *texts, "--budget", "3", "--windows", "1", "-o", "merged", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0].split() == ["search", "lambda", "mean", "code", "docs"]
    assert "found lambda 0." in run.stdout
    refused(compress("merge", *models, *texts, cwd=tmp_path), "say what is searched, as in --search lambda")
    refused(compress("merge", *models, "--search", "lamda", *texts, cwd=tmp_path), "has no option 'lamda'. Did you mean 'lambda'?")

    beside = compress("compare", "merged/recipe.yaml", MODELS / "base", *texts, "--windows", "2", "--plot", "a.svg", cwd=tmp_path)
    assert beside.returncode == 0, beside.stderr
    assert [line.split()[0] for line in beside.stdout.splitlines()] == ["model", "recipe", "base"]
    assert (tmp_path / "a.svg").is_file()


def test_a_mergekit_file_with_a_stray_key_is_refused_or_warned_of(pair: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: a.safetensors, weight: 3}, {model: b.safetensors}]\n"
    (pair / "file.yml").write_text(text)
    refused(compress("run", "file.yml", "-o", "out.safetensors", cwd=pair), "models.0.weight is an option of linear: write it under `parameters`")
    run = compress("run", "file.yml", "-o", "out.safetensors", "--mergekit-lenient", cwd=pair)
    assert run.returncode == 0, run.stderr
    assert "compress: warning: file.yml: models.0.weight is an option of linear" in run.stderr
    assert load_file(pair / "out.safetensors")["w"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
