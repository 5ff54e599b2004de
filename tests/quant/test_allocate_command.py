"""`compress allocate` and `compress quantize --allocation` as a user runs them, on a small real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from program import Program

from mergekit_plus.checkpoint import Checkpoint
from quant.plan import dequantize, quantize
from quant.quantized import Scheme

MODELS = Path(__file__).parents[1] / "models"
BASE = MODELS / "base"
QUICK = ("--choices", "2,3,4", "--group-size", 64, "--calibration", MODELS / "text" / "code.val.txt", "--windows", 6, "--window", 32)


def test_from_a_model_and_a_budget_to_a_file_of_that_size(compress: Program, tmp_path: Path) -> None:
    ended = compress("allocate", BASE, "--bits-per-weight", 3.3, *QUICK, "--sensitivities", "s.json", "--candidates", 4, "--plot", "bits.svg", "--json")
    assert ended.returncode == 0, ended.stderr
    facts: dict[str, Any] = json.loads(ended.stdout)
    assert facts["proven"]
    assert facts["bits_per_weight"] <= 3.3
    assert len(facts["layers"]) == 24
    assert (tmp_path / "bits.svg").read_text().startswith("<?xml")
    content = yaml.safe_load((tmp_path / "bits.yaml").read_text())
    assert len(content["groups"]) == 24
    assert set(content["made"]["model"]["sha256"]) == {path.name for path in BASE.glob("*.safetensors")}
    assert content["made"]["reference"] == "3 bits, groups of 64, symmetric"

    assert compress("quantize", BASE, "--allocation", "bits.yaml").returncode == 0
    made = tmp_path / "base-mixed"
    assert sum(path.stat().st_size for path in made.glob("*.safetensors")) == facts["file_bytes"]
    packed = Checkpoint.open(made)
    schemes = {module: Scheme(group["bits"], 64) for group in content["groups"] for module in group["modules"]}
    expected = quantize(Checkpoint.open(BASE), schemes, format_name="dense")
    back = dequantize(packed)
    assert all(back.read(name).equal(expected.read(name)) for name in expected.specs)

    assert compress("run", made / "recipe.yaml", "-o", "again").returncode == 0  # the recipe holds the allocation itself
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()

    size = facts["file_bytes"] + 40_000  # another budget, from the same measurements
    second = compress("allocate", BASE, "--size", size, *QUICK, "--sensitivities", "s.json", "--candidates", 1, "-o", "b2.yaml")
    assert second.returncode == 0, second.stderr
    assert "proven optimal by" in second.stdout
    assert f"wrote b2.yaml: {yaml.safe_load((tmp_path / 'b2.yaml').read_text())['made']['bits_per_weight']:.4f} stored bits" in second.stdout
    assert facts["file_bytes"] < yaml.safe_load((tmp_path / "b2.yaml").read_text())["made"]["file_bytes"] <= size


def test_a_recipe_quantizes_by_an_allocation(compress: Program, tmp_path: Path) -> None:
    ended = compress("allocate", BASE, "--max-loss", 0.2, *QUICK, "--sensitivity", "fisher", "--candidates", 1)
    assert ended.returncode == 0, ended.stderr
    assert " bits, bound " in ended.stdout
    (tmp_path / "sub").mkdir()
    (tmp_path / "bits.yaml").rename(tmp_path / "sub" / "bits.yaml")
    (tmp_path / "sub" / "recipe.yaml").write_text(f"inputs: {{base: {BASE}}}\nsteps: [{{quantize: {{allocation: bits.yaml}}}}]\nout: out\n")
    assert compress("run", tmp_path / "sub" / "recipe.yaml").returncode == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} <= {2, 3, 4}
    assert "allocation:" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_wrong_is_said_in_one_line(compress: Program, tmp_path: Path) -> None:
    assert "allocate measures on a text: give one with --calibration FILE" in compress("allocate", BASE, "--bits-per-weight", 3).line
    assert "give one of --bits-per-weight, --size and --max-loss" in compress("allocate", BASE, *QUICK).line
    assert "'x' is not a size; write 5GB" in compress("allocate", BASE, *QUICK, "--size", "x").line
    gram = ("allocate", BASE, *QUICK, "--sensitivity", "gram", "--candidates", 1)
    assert "--bits-per-weight 2 cannot be met: the narrowest choices take 2.2546, scales and all" in compress(*gram, "--bits-per-weight", 2).line
    assert compress(*gram, "--bits-per-weight", 3, "--sensitivities", "s.json").returncode == 0
    assert "bits.yaml exists already; name another output with -o, or replace it with --overwrite" in compress(*gram, "--bits-per-weight", 3).line
    again = ("allocate", BASE, *QUICK, "--bits-per-weight", 3, "--candidates", 1, "--sensitivities", "s.json", "-o", "b.yaml")
    assert "--sensitivities s.json were measured with another sensitivity; measure again, into another file" in compress(*again).line
    assert "s.json lack the choice 8 bits" in compress(*again, "--choices", "2,8", "--sensitivity", "gram").line
    assert "s.json were measured for other layers" in compress(*again, "--exclude", "*.o_proj.weight", "--sensitivity", "gram").line
    assert "s.json were measured with another model" in compress("allocate", MODELS / "code", *again[2:], "--sensitivity", "gram").line
    both = compress("quantize", BASE, "--bits", 3, "--allocation", "bits.yaml").line
    assert "quantize: give bits, or a scheme by its name (W8A8, FP8, FP8_BLOCK, NVFP4, MXFP4), or an allocation: one of these" in both
    alone = "an allocation says the group size and the symmetry of each layer; leave group_size and symmetric out"
    assert alone in compress("quantize", BASE, "--group-size", 32, "--allocation", "bits.yaml").line
    assert "missing.yaml: No such file or directory" in compress("quantize", BASE, "--allocation", "missing.yaml").line
    content = yaml.safe_load((tmp_path / "bits.yaml").read_text())
    (tmp_path / "half.yaml").write_text(yaml.safe_dump({"groups": content["groups"][:12]}))
    assert "it says nothing of model.layers.3.mlp.down_proj" in compress("quantize", BASE, "--allocation", "half.yaml").line


def test_a_calibrated_method_allocates_and_quantizes(compress: Program, tmp_path: Path) -> None:
    text = QUICK[4:]
    ended = compress("allocate", BASE, "--bits-per-weight", 3.6, "--choices", "3,4", "--group-size", 64, *text, "-m", "gptq", "--candidates", 2, "--json")
    assert ended.returncode == 0, ended.stderr
    assert yaml.safe_load((tmp_path / "bits.yaml").read_text())["made"]["quantizer"] == {"method": "gptq"}
    assert compress("quantize", BASE, "--allocation", "bits.yaml", "-m", "gptq", *text).returncode == 0
    written = sum(path.stat().st_size for path in (tmp_path / "base-mixed").glob("*.safetensors"))
    assert written == json.loads(ended.stdout)["file_bytes"]


def test_a_bound_in_nats_is_not_for_errors_of_outputs(compress: Program) -> None:
    refused = compress("allocate", BASE, *QUICK, "--sensitivity", "gram", "--max-loss", 0.05).line
    assert "--max-loss is a KL in nats a token, and gram measures errors of outputs; give --sensitivity kl or fisher" in refused
