"""A compact model for peft: what stock peft loads computes what the expanded model does, with a KV cache and without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError
from mergekit_plus.evaluate import load_model
from prune.fold import Fold, Map, compacted, expanded, mapped, relaxed, stack_of
from prune.fold.export import exported

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries that load; what they load is what is tested
MODELS = Path(__file__).parents[1] / "models"
STORED = Checkpoint.open(MODELS / "base")
BASE = replace(STORED, source=Checkpoint.from_tensors({name: STORED.read(name).float() for name in STORED.specs}).source)
BLOCKS = len(stack_of(BASE).layers)
ROWS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def through_peft(compact: Checkpoint, layout: Any, folder: Path) -> Any:
    """The exported model, as peft loads it."""
    import peft
    import transformers

    for part, name in zip(exported(compact, layout, str(folder / "base")), ("base", "adapter"), strict=True):
        save(part, folder / name)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / "adapter").eval()


def agree(model: Any, wanted: Any) -> None:
    """Equal logits, and equal greedy continuations with a KV cache."""
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ROWS, use_cache=False).logits, wanted(input_ids=ROWS, use_cache=False).logits, atol=3e-4, rtol=1e-4)
        ours, theirs = (each.generate(input_ids=ROWS, max_new_tokens=8, do_sample=False, pad_token_id=0) for each in (model, wanted))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("map_", ["sequence", "cycle", "middle_cycle"])
def test_peft_replicates_the_layers_and_gives_each_its_norms_and_its_voice(map_: Map, rank: int, tmp_path: Path) -> None:
    fold = mapped(range(BLOCKS), 2, map_, "average")
    compact = relaxed(BASE, fold, rank) if rank else compacted(BASE, fold)
    loaded = through_peft(compact, "peft", tmp_path)
    agree(loaded, load_model(expanded(compact)))
    layers = loaded.base_model.model.model.layers
    stored = Checkpoint.open(tmp_path / "base").config["num_hidden_layers"]
    assert (len(layers), stored) == (BLOCKS, len(fold.parents))
    a, b = (place for place in range(BLOCKS) if fold.groups[place] == fold.groups[1])
    linears = [getattr(layers[place].mlp.up_proj, "base_layer", layers[place].mlp.up_proj) for place in (a, b)]
    assert linears[0].weight.data_ptr() == linears[1].weight.data_ptr()


def test_transformers_alone_finds_the_base_of_the_adapter(tmp_path: Path) -> None:
    import transformers

    compact = relaxed(BASE, mapped(range(BLOCKS), 2, "cycle"), 2)
    through_peft(compact, "peft", tmp_path)
    agree(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval(), load_model(expanded(compact)))


def test_a_plain_adapter_stands_on_a_base_of_all_blocks_without_extras(tmp_path: Path) -> None:
    compact = relaxed(BASE, mapped(range(BLOCKS), 2, "cycle", "average"), 4)
    agree(through_peft(compact, "lora", tmp_path), load_model(expanded(compact)))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"], config["r"], config["lora_alpha"], config.get("layer_replication")) == (None, "none", 4, 4, None)
    again = Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")  # and this program applies it
    name = f"model.layers.{BLOCKS - 1}.mlp.up_proj.weight"
    torch.testing.assert_close(again.read(name), expanded(compact).read(name))


def test_ranges_are_as_long_as_the_layers_follow_each_other() -> None:
    def ranges(fold: Fold) -> Any:
        return json.loads(exported(compacted(BASE, fold), "peft", None)[1].file("adapter_config.json"))["layer_replication"]

    assert ranges(mapped(range(6), 2, "cycle")) == [[0, 3], [0, 3]]
    assert ranges(mapped(range(6), 2, "middle_cycle")) == [[0, 3], [1, 4]]
    assert ranges(mapped(range(6), 2)) == [[0, 1], [0, 2], [1, 3], [2, 3]]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.endswith("ForCausalLM")])
def test_every_architecture_is_replicated_rightly_or_refused(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, tmp_path)
    compact = compacted(model, mapped(range(2), 2))
    try:
        loaded = through_peft(compact, "peft", tmp_path)
    except CheckpointError as error:
        assert "use --export lora, or --expand" in str(error)
        assert name not in ("LlamaForCausalLM", "MistralForCausalLM", "GemmaForCausalLM")
        return
    agree(loaded, load_model(expanded(compact)))


def test_what_is_not_compact_or_has_no_voices_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is not a compact model, which `compress fold --compact` makes"):
        exported(BASE, "peft", None)
    with pytest.raises(CheckpointError, match="has no voices for an adapter to hold; write out the expanded model with --expand"):
        exported(compacted(BASE, mapped(range(BLOCKS), 2)), "lora", None)
