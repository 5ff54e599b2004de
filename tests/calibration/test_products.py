"""A model in bfloat16 multiplies in it while a text flows through, where the processor has instructions for that; everything else stays float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch.nn import functional

from mergekit_plus.calibration import Block, walk
from mergekit_plus.calibration.products import Bfloat16Products, multiplies_in_bfloat16
from mergekit_plus.checkpoint import Checkpoint, TensorSpec, Work

IDS = (torch.arange(4 * 40) * 7 % 61 + 3).view(4, 40)
FLAG = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture
def flag() -> Iterator[None]:
    before = FLAG.fp32_precision
    yield
    assert FLAG.fp32_precision == before


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("flag")
def test_factors_are_rounded_and_sums_are_not() -> None:
    x, w = random(300, 256), random(64, 256)
    with Bfloat16Products():
        rounded, exact = functional.linear(x, w), functional.linear(x.bfloat16().float(), w.bfloat16().float())
    torch.testing.assert_close(exact, (x.bfloat16().double() @ w.bfloat16().double().T).float(), rtol=1e-5, atol=1e-4)
    assert float((rounded - x @ w.T).norm() / (x @ w.T).norm()) < 2**-8
    assert rounded.dtype == torch.float32


@pytest.mark.usefixtures("flag")
def test_a_product_that_fails_leaves_the_precision_as_it_was() -> None:
    with Bfloat16Products(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        functional.linear(random(2, 3), random(4, 5))


@pytest.mark.usefixtures("flag")
def test_attention_is_near_that_in_float32_and_the_same_under_a_mask_of_its_own() -> None:
    q = random(2, 2, 32, 8)
    mask = torch.zeros(32, 32).masked_fill_(torch.ones(32, 32).triu(1).bool(), torch.finfo(torch.float32).min)
    expected, masked = functional.scaled_dot_product_attention(q, q, q, is_causal=True), functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    with Bfloat16Products():
        found = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert torch.equal(functional.scaled_dot_product_attention(q, q, q, attn_mask=mask), masked)
        silu = functional.silu(q)
    torch.testing.assert_close(silu, q * torch.sigmoid(q))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("dtype", "device"), [("F32", "cpu"), ("F16", "cpu"), ("BF16", "cuda")])
def test_other_checkpoints_and_devices_multiply_in_float32(dtype: str, device: str) -> None:
    assert not multiplies_in_bfloat16([TensorSpec("w", dtype, (2, 2)), TensorSpec("v", "BF16", (2, 2))], device)


def test_moments_of_a_model_in_bfloat16_are_near_those_in_float32(tmp_path: Path) -> None:
    tiny = tiny_model("LlamaForCausalLM", under=tmp_path)
    half = Checkpoint("half", Checkpoint.from_tensors({name: tiny.read(name).bfloat16() for name in tiny.specs}).source, tiny.files)
    full = Checkpoint("full", Checkpoint.from_tensors({name: half.read(name).float() for name in tiny.specs}).source, tiny.files)
    measured = []
    for checkpoint in (half, full):
        found = {}

        def process(block: Block, found=found) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
            found.update(block.moments())
            return {}

        walk(checkpoint, IDS, process, Work(tmp_path / checkpoint.label))
        measured.append(found)
    for name, expected in measured[1].items():
        own = measured[0][name]
        assert torch.equal(own.gram, own.gram.T)
        assert float((own.gram - expected.gram).norm() / expected.gram.norm()) < 0.02, name
        assert float(torch.linalg.eigvalsh(own.gram.double())[0]) > -1e-6 * float(own.gram.trace())
