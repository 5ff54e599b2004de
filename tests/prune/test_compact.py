"""Compact checkpoints: what blocks share is stored once, and every way to run one gives the logits of the model that it stands for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from program import Program
from tiny import ARCHITECTURES, EXPERTS, GROUPED, tiny_model

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.checkpoint.folder import COMPACT
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model
from prune.fold import Fold, compact, compacted, expanded, fold_of, folded, mapped, modeling_compact, stack_of

MODELS = Path(__file__).parents[1] / "models"
BASE = Checkpoint.open(MODELS / "base")
PAIRS = mapped(range(6), 2)
ROWS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
WINDOWED = {**GROUPED, "sliding_window": 6, "head_dim": 8}
DEEP: dict[str, dict[str, Any]] = {  # four blocks each; windows of six tokens where the architecture has windows
    "LlamaForCausalLM": {**GROUPED, "attention_bias": True, "mlp_bias": True},
    "MistralForCausalLM": WINDOWED,
    "Qwen2ForCausalLM": {**GROUPED, "sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": {**WINDOWED, "use_sliding_window": True, "max_window_layers": 3},
    "Gemma2ForCausalLM": {**WINDOWED, "query_pre_attn_scalar": 8},
    "Gemma3ForCausalLM": {**WINDOWED, "query_pre_attn_scalar": 8},
    "Gemma4ForCausalLM": {**WINDOWED, "hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2},
    "MixtralForCausalLM": ARCHITECTURES["MixtralForCausalLM"],
    "Qwen3MoeForCausalLM": {**EXPERTS, "head_dim": 8},
    "GPT2LMHeadModel": ARCHITECTURES["GPT2LMHeadModel"],
    "OPTForCausalLM": ARCHITECTURES["OPTForCausalLM"],
}
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deep")


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """`AutoModelForCausalLM.from_pretrained` with the code in the model's folder; what transformers imports is forgotten afterwards."""
    modules, path = set(sys.modules), list(sys.path)
    for module in (transformers.dynamic_module_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    yield lambda where, **how: transformers.AutoModelForCausalLM.from_pretrained(where, **{"trust_remote_code": True, "dtype": torch.float32, **how}).eval()
    sys.path[:] = path
    for name in [name for name in sys.modules if name not in modules and name.startswith("transformers_modules")]:
        del sys.modules[name]


def deep(name: str, folder: Path) -> Checkpoint:
    """Four blocks of random weights, biases among them."""
    (folder / "four").mkdir(exist_ok=True)
    count = {"GPT2LMHeadModel": "n_layer"}.get(name, "num_hidden_layers")
    made = tiny_model(name, folder / "four", {**DEEP[name], count: 4})
    drawn = torch.Generator().manual_seed(1)
    tensors = {name: made.read(name) + 0.02 * torch.randn(made.specs[name].shape, generator=drawn) for name in made.specs}
    return replace(made, source=Checkpoint.from_tensors(tensors).source)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ROWS, use_cache=False).logits
        return found


def greedy(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(input_ids=ROWS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return found


def voices(model: Checkpoint, *modules: str, rank: int = 2, size: float = 0.1) -> dict[str, tuple[Checkpoint, str, str]]:
    """Random factors for these modules, by the shapes of weights of the model."""
    drawn = torch.Generator().manual_seed(2)
    shapes = {module: model.specs[f"{module}.weight"].shape for module in modules}
    pairs = {module: (torch.randn(rank, cols, generator=drawn), size * torch.randn(rows, rank, generator=drawn)) for module, (rows, cols) in shapes.items()}
    return {module: (Checkpoint.from_tensors({"A": a, "B": b}), "A", "B") for module, (a, b) in pairs.items()}


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return a.specs.keys() == b.specs.keys() and all(torch.equal(a.read(name), b.read(name)) for name in a.specs)


# ---- the form ----


def test_nothing_removed_and_nothing_shared_stands_for_the_model_itself() -> None:
    made = compacted(BASE, Fold.of(range(6)))
    assert made.specs.keys() == BASE.specs.keys()
    assert same(expanded(made), BASE)
    assert expanded(made).config == BASE.config
    assert torch.equal(logits(load_model(expanded(made))), logits(load_model(BASE)))


@pytest.mark.parametrize("parent", ["first", "average"])
def test_it_expands_to_what_folding_writes(parent: Any) -> None:
    fold = mapped([0, 1, 2, 4, 5], 2, parent=parent)
    made = compacted(BASE, fold)
    assert "model.layers.1.self_attn.q_proj.weight" not in made.specs
    assert "model.layers.1.input_layernorm.weight" in made.specs
    assert made.config["num_hidden_layers"] == 5
    assert fold_of(made) == fold
    assert same(expanded(made), folded(BASE, fold))
    assert expanded(made).config == folded(BASE, fold).config


def test_it_stores_as_many_parameters_as_the_formula_says() -> None:
    """Embeddings, head and last norm; the linears of ceil(R / G) groups; the norms, and the voices, of R blocks."""
    size = {name: spec.numel for name, spec in BASE.specs.items()}
    block = stack_of(BASE).layers[0]
    norms = sum(size[name] for name in block if "norm" in name)
    outside = sum(size.values()) - 6 * sum(size[name] for name in block)
    factors = voices(BASE, "model.layers.1.mlp.up_proj", "model.layers.4.mlp.up_proj", rank=3)
    voice = 3 * (BASE.config["hidden_size"] + BASE.config["intermediate_size"])
    for kept, share in (([0, 1, 2, 3, 4, 5], 1), ([0, 1, 2, 3, 5], 2), ([0, 1, 2, 3, 4], 3)):
        made = compacted(BASE, mapped(kept, share), factors)
        groups = -(-len(kept) // share)
        linears = sum(size[name] for name in block) - norms
        assert sum(spec.numel for spec in made.specs.values()) == outside + groups * linears + len(kept) * norms + 2 * voice


def test_what_config_said_of_the_model_itself_comes_back() -> None:
    custom = BASE.with_config(auto_map={"AutoModelForCausalLM": "modeling.Own"}, architectures=None)
    assert "architectures" not in custom.config
    assert expanded(compacted(custom, PAIRS)).config == custom.config


def test_what_is_equal_already_is_folded_without_loss_and_folded_again_is_the_same() -> None:
    once = expanded(compacted(BASE, PAIRS))
    made = compacted(once, PAIRS)
    assert same(expanded(made), once)
    assert same(compacted(expanded(made), PAIRS), made)
    assert compacted(expanded(made), PAIRS).config == made.config


def test_a_voice_is_added_to_what_is_shared_in_float32_and_rounded_once() -> None:
    up = "model.layers.{}.mlp.up_proj"
    factors = voices(BASE, up.format(1), up.format(2))
    made = compacted(BASE, PAIRS, factors)
    assert made.config["compact"]["ranks"] == {"mlp.up_proj": [0, 2, 2, 0, 0, 0]}
    source, a, b = factors[up.format(1)]
    wanted = (BASE.read(up.format(0) + ".weight").float() + source.read(b) @ source.read(a)).to(torch.bfloat16)
    assert torch.equal(expanded(made).read(up.format(1) + ".weight"), wanted)
    assert torch.equal(expanded(made).read(up.format(1) + ".weight", slice(64, 128)), wanted[64:128])
    assert torch.equal(expanded(made).read(up.format(0) + ".weight"), BASE.read(up.format(0) + ".weight"))


# ---- transformers ----


@pytest.mark.parametrize("name", list(DEEP))
def test_transformers_runs_it_with_shared_memory_as_the_expanded_model(name: str, folder: Path, tmp_path: Path, load: Load) -> None:
    model = deep(name, folder)
    made = compacted(model, mapped(range(4), 2))
    save(made, tmp_path / "small")
    small, big = load(tmp_path / "small"), load_model(Checkpoint.open(tmp_path / "small"))
    assert torch.equal(logits(small), logits(big))
    assert torch.equal(logits(big), logits(load_model(folded(model, mapped(range(4), 2)))))
    assert torch.equal(greedy(small), greedy(big))
    held = {tensor.data_ptr(): tensor.numel() for tensor in small.state_dict().values()}
    assert sum(held.values()) == sum(spec.numel for spec in made.specs.values())
    blocks = max((m for m in small.modules() if isinstance(m, torch.nn.ModuleList)), key=lambda stack: sum(p.numel() for p in stack.parameters()))
    for local, own in dict(blocks[1].named_parameters()).items():
        assert (own is blocks[0].get_parameter(local)) == (local not in made.config["compact"]["private"])


def test_transformers_runs_the_voices_of_blocks(folder: Path, tmp_path: Path, load: Load) -> None:
    model = deep("LlamaForCausalLM", folder)
    made = compacted(model, mapped(range(4), 2), voices(model, "model.layers.1.mlp.up_proj", "model.layers.3.self_attn.v_proj"))
    save(made, tmp_path / "small")
    small = load(tmp_path / "small")
    torch.testing.assert_close(logits(small), logits(load_model(expanded(made))))
    assert not torch.allclose(logits(small), logits(load_model(expanded(compacted(model, mapped(range(4), 2))))), atol=1e-3)
    assert torch.equal(greedy(small), greedy(load_model(expanded(made))))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM", "MixtralForCausalLM"])
def test_what_transformers_saves_is_the_same_compact_model(name: str, folder: Path, tmp_path: Path, load: Load) -> None:
    model = deep(name, folder)
    factors = voices(model, "model.layers.1.self_attn.q_proj")
    made = compacted(model, mapped(range(4), 2), factors)
    save(made, tmp_path / "small")
    load(tmp_path / "small").save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(tmp_path / "small")))
    assert same(Checkpoint.open(tmp_path / "again"), expanded(made))
    assert json.loads((tmp_path / "again" / "config.json").read_bytes())["compact"] == made.config["compact"]
    assert sum(spec.numel for spec in made.specs.values()) * 4 == Checkpoint.open(tmp_path / "again" / "model.safetensors").nbytes


def test_without_its_code_transformers_refuses_it(tmp_path: Path, load: Load) -> None:
    save(compacted(BASE, PAIRS), tmp_path / "small")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load(tmp_path / "small", trust_remote_code=False)
    with pytest.raises(OSError, match="compact-needs-trust_remote_code-or-expanding"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small")
    (tmp_path / "small" / modeling_compact.__file__.rpartition("/")[2]).unlink()
    with pytest.raises(OSError, match=r"modeling_compact\.py"):
        load(tmp_path / "small")


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, load: Load) -> None:
    made = compacted(BASE, PAIRS)
    tensors = {name: made.read(name) for name in made.specs if name != "model.layers.2.mlp.up_proj.weight"}
    save(replace(made, source=Checkpoint.from_tensors(tensors).source), tmp_path / "small")
    with pytest.raises(ValueError, match=r"missing_keys.*layers\.2\.mlp\.up_proj"):
        load(tmp_path / "small")


def test_the_file_for_transformers_writes_what_the_library_does() -> None:
    assert (modeling_compact.KEY, modeling_compact.MODEL_TYPE, modeling_compact.DISK) == (compact.KEY, COMPACT, compact.DISK)
    assert modeling_compact.CompactModelForCausalLM.__name__ == compact.ARCHITECTURE


# ---- errors ----


def with_said(**changes: Any) -> Checkpoint:
    """A compact checkpoint whose config.json says something else."""
    made = compacted(BASE, PAIRS, voices(BASE, "model.layers.1.mlp.up_proj"))
    return made.with_config(compact={key: value for key, value in {**made.config["compact"], **changes}.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 2}, "its version is 2, and 1 is the one that is known here"),
        ({"groups": None}, "the key 'groups' is missing"),
        ({"groups": [0, 0, 1, 1, 2]}, "each of the 6 blocks has a group, 0 to 2"),
        ({"groups": [0, 0, 0, 1, 2, 2]}, r"model\.layers\.2\.mlp\.down_proj\.weight is one too many"),
        ({"groups": [0, 0, 1, 1, 2, -1]}, "numbers, from 0, are wanted"),
        ({"groups": [0] * 100_000}, "lists of at most 16384 numbers"),
        ({"kept": [0, 1, 2, 3, 4], "groups": [0, 0, 1, 1, 2], "ranks": {"mlp.up_proj": [0, 2, 0, 0, 0]}}, "is in a block of which nothing is said"),
        ({"kept": "012345"}, "numbers, from 0, are wanted"),
        ({"kept": [0, 1, 2, 3, 4, True]}, "numbers, from 0, are wanted"),
        ({"parents": [0, 2]}, "each of the 6 blocks has a group"),
        ({"private": ["input_layernorm.weight"]}, r"model\.layers\.1\.post_attention_layernorm\.weight is one too many"),
        ({"private": [["x"]]}, "unhashable"),
        ({"stack": "transformer.h"}, r"transformer\.h\.0\.\*, has no tensors"),
        ({"stack": 3}, "stack is a name"),
        ({"ranks": None}, r"model\.layers\.1\.mlp\.up_proj\.lora_A\.weight is one too many"),
        ({"ranks": {"mlp.up_proj": [0, 3, 0, 0, 0, 0]}}, "are no voice of rank 3 beside"),
        ({"ranks": {"mlp.up_proj": [0, 2]}}, "ranks are a number for every block"),
        ({"ranks": {"mlp.up_proj": [0, 2, 0, 0, 0, 0], "mlp.down_proj": [0, 0, 0, 2, 0, 0]}}, r"3\.mlp\.down_proj\.lora_A\.weight is missing"),
        ({"ranks": [1]}, "no attribute 'items'"),
        ({"expanded": {"model_type": ["llama"], "architectures": None}}, "expanded has the model_type of an ordinary model"),
        ({"expanded": {"model_type": COMPACT}}, "expanded has the model_type of an ordinary model"),
        ({"expanded": {}}, "the key 'model_type' is missing"),
    ],
)
def test_a_map_that_does_not_fit_the_tensors_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'compact' in config\.json does not describe its tensors \(.*{problem}") as caught:
        expanded(with_said(**changes))
    assert "\n" not in str(caught.value)


def test_a_compact_model_without_its_map_is_refused() -> None:
    for said in (None, 3, [], "x"):
        with pytest.raises(CheckpointError, match="does not describe its tensors"):
            expanded(compacted(BASE, PAIRS).with_config(compact=said))


def test_a_private_tensor_and_a_voice_that_are_missing_are_named() -> None:
    made = with_said()
    for lost in ("model.layers.3.input_layernorm.weight", "model.layers.1.mlp.up_proj.lora_B.weight"):
        tensors = {name: made.read(name) for name in made.specs if name != lost}
        with pytest.raises(CheckpointError, match=rf"{lost} is missing"):
            expanded(replace(made, source=Checkpoint.from_tensors(tensors).source))


def test_what_cannot_be_compact_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a compact model already"):
        compacted(compacted(BASE, PAIRS), PAIRS)
    with pytest.raises(CheckpointError, match=r"has no config\.json with a model_type"):
        compacted(Checkpoint.from_tensors({name: BASE.read(name) for name in BASE.specs}), PAIRS)
    wide = {name: BASE.read(name) for name in BASE.specs}
    wide["model.layers.1.mlp.up_proj.weight"] = torch.zeros(400, 128, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight and .*layers\.1\.mlp\.up_proj\.weight are to be one weight, but are not alike"):
        compacted(replace(BASE, source=Checkpoint.from_tensors(wide).source), PAIRS)
    del wide["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight is in one block of a group alone"):
        compacted(replace(BASE, source=Checkpoint.from_tensors(wide).source), PAIRS)


def test_voices_that_do_not_fit_are_refused(folder: Path) -> None:
    up = voices(BASE, "model.layers.1.mlp.up_proj")["model.layers.1.mlp.up_proj"]
    with pytest.raises(OptionError, match=r"A and B must be \[rank, 384\] and \[128, rank\], not \(2, 128\) and \(384, 2\)"):
        compacted(BASE, PAIRS, {"model.layers.1.mlp.down_proj": up})
    with pytest.raises(OptionError, match="is not a module of the blocks 0 to 5"):
        compacted(BASE, PAIRS, {"model.layers.6.mlp.up_proj": up})
    with pytest.raises(OptionError, match=r"has no tensor 'model\.layers\.0\.mlp\.upp_proj\.weight'\. Did you mean"):
        compacted(BASE, PAIRS, {"model.layers.1.mlp.upp_proj": up})
    with pytest.raises(OptionError, match="is no plain linear layer"):
        compacted(BASE, PAIRS, {"model.layers.1.input_layernorm": up})
    gpt2, mixtral = deep("GPT2LMHeadModel", folder), deep("MixtralForCausalLM", folder)
    for model, leaf in ((gpt2, "attn.c_attn.weight"), (mixtral, "experts.0.w1.weight")):  # stored transposed; packed by transformers
        name = next(name for name in model.specs if ".1." in name and name.endswith(leaf))
        with pytest.raises(OptionError, match="is no plain linear layer"):
            compacted(model, mapped(range(4), 2), {name.removesuffix(".weight"): up})


# ---- the program ----


def test_the_program_writes_inspects_measures_and_expands_it(compress: Program, tmp_path: Path) -> None:
    done = compress("fold", MODELS / "base", "--share", 2, "--compact", "-o", "small")
    assert done.returncode == 0, done.stderr
    assert "6 blocks in 3 groups (0,0,1,1,2,2); above is what it expands to" in compress("inspect", "small").stdout
    assert compress("fold", MODELS / "base", "--share", 2, "-o", "plain").returncode == 0
    assert compress("diff", "small", "plain").returncode == 0
    assert compress("fold", "small", "--expand", "-o", "big").returncode == 0
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "big" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert not (tmp_path / "big" / "modeling_compact.py").exists()
    assert compress("run", "small/recipe.yaml", "-o", "again").returncode == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "small" / "model.safetensors").read_bytes()
    assert "big is not a compact model" in compress("fold", "big", "--expand").line
    assert "fold that in a run of its own" in compress("fold", "small", "--expand", "--compact").line
    assert "say how many share" in compress("fold", MODELS / "base", "--keep", "0,1", "--compact").line
    assert "write to the folder" in compress("fold", MODELS / "base", "--share", 2, "--compact", "-o", "x.safetensors").line


def test_the_code_beside_a_compact_model_is_ours_whatever_lay_beside_the_input(compress: Program, tmp_path: Path) -> None:
    save(compacted(BASE, PAIRS), tmp_path / "small")
    (tmp_path / "small" / "modeling_compact.py").write_text("raise SystemExit('this ran')")
    (tmp_path / "small" / "other.py").write_text("raise SystemExit('this ran')")
    assert compress("fold", "small", "--share", 2, "--compact", "-o", "again").returncode == 0
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == ["modeling_compact.py"]
    assert (tmp_path / "again" / "modeling_compact.py").read_bytes() == Path(modeling_compact.__file__).read_bytes()
    assert compress("fold", "small", "--expand", "-o", "big").returncode == 0
    assert not list((tmp_path / "big").glob("*.py"))


def test_a_step_after_a_compact_one_is_refused(compress: Program, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"inputs: {{m: {MODELS / 'base'}}}\nsteps: [{{fold: {{share: 2, compact: true}}}}, {{quantize: {{bits: 4}}}}]\n")
    wanted = "step 1, fold: compact says how the output is stored; retrain, which keeps it so, and export_fold may follow alone"
    assert wanted in compress("run", "recipe.yaml", "-o", "x").line


def test_a_compact_model_that_does_not_fit_is_one_line_and_stays_as_it_was(compress: Program, tmp_path: Path) -> None:
    save(with_said(), tmp_path / "bad")
    said = json.loads((tmp_path / "bad" / "config.json").read_bytes())
    said["compact"]["groups"] = [0, 0, 0, 1, 1, 2]
    (tmp_path / "bad" / "config.json").write_text(json.dumps(said))
    shutil.copytree(tmp_path / "bad", tmp_path / "before")
    for command in (("fold", "bad", "--expand", "-o", "out"), ("inspect", "bad"), ("quantize", "bad", "--bits", 4, "-o", "out")):
        assert "bad: 'compact' in config.json does not describe its tensors" in compress(*command).line
    assert not (tmp_path / "out").exists()
    assert all(path.read_bytes() == (tmp_path / "bad" / path.name).read_bytes() for path in (tmp_path / "before").iterdir())
