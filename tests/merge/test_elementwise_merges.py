"""`sce`, `ram`, `nearswap`, `arcee_fusion`, `passthrough`, `consensus` and `emr`, with numbers one can check in the head."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from merge_toys import merge_tensors, near, random
from torch import tensor, zeros

from mergekit_plus.merge import arcee_fusion as fusion
from mergekit_plus.statistics import order_statistics


def of(method: str, *vectors: list[float], **options: object) -> list[float]:
    """The merged task vector of these task vectors."""
    return merge_tensors(method, zeros(len(vectors[0])), *[tensor(vector, dtype=torch.float32) for vector in vectors], **options).tolist()


def test_sce_weighs_models_by_their_energy() -> None:
    assert of("sce", [3.0, 0.0], [1.0, 0.0]) == pytest.approx([0.9 * 3 + 0.1 * 1, 0])


def test_sce_does_so_for_the_small_changes_of_a_fine_tune_too() -> None:
    assert of("sce", [3e-5, 0.0], [1e-5, 0.0]) == pytest.approx([2.8e-5, 0])  # mergekit: weights of a half each below 1e-6


def test_sce_keeps_where_the_models_differ_most_and_erases_the_minority() -> None:
    assert of("sce", [4.0, 1.0, 1.0], [0.0, 1.0, 0.0], select_topk=0.5) == [4, 0, 0]
    assert of("sce", [4.0, 1.0], [-2.0, 1.0]) == pytest.approx([4, 1])
    assert of("sce", [1.0, 1.0], [1.0, 1.0], select_topk=0.9) == [0, 0]  # nothing differs
    assert of("sce", [0.0, 0.0], [0.0, 0.0]) == [0, 0]


def test_ram_keeps_what_one_model_changed_and_averages_what_several_did() -> None:
    assert of("ram", [4.0, 2.0, 0.0], [0.0, 6.0, 1e-6]) == [4, 4, 0]


def test_ramplus_makes_unique_changes_larger_by_the_share_of_the_shared_ones() -> None:
    vectors = [4.0, 2.0, 1.0, 0.0], [0.0, 6.0, 0.0, 0.0]
    assert of("ramplus_tl", *vectors, r=0.5, alpha=9.0) == [4 * 1.25, 4, 1.25, 0]  # one shared over two unique
    assert of("ramplus_tl", *vectors, r=0.5, alpha=0.2) == pytest.approx([4 * 1.1, 4, 1.1, 0])
    assert of("ramplus_tl", [1.0], [3.0], epsilon=0) == [2]


def test_nearswap_takes_what_is_near_and_goes_a_step_towards_what_is_far() -> None:
    assert merge_tensors("nearswap", tensor([1.0, 1.0, 1.0]), tensor([1.25, 3.0, -1.0]), t=0.5).tolist() == [1.25, 1.5, 0.5]


def test_arcee_fusion_takes_the_elements_far_above_the_quartiles() -> None:
    base = random(64, 32)
    model = base + 1e-4 * random(64, 32, seed=1)
    model[5, 7] += 4
    result = merge_tensors("arcee_fusion", base, model)
    assert result[5, 7] == model[5, 7]
    assert 0 < int((result != base).sum()) < 500


def test_arcee_fusion_of_a_tensor_too_large_to_hold_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random(500, 40, dtype=torch.bfloat16)
    (model,) = near(base, 1, step=0.05)
    expected = merge_tensors("arcee_fusion", base, model, rows=5)
    monkeypatch.setattr(fusion, "order_statistics", partial(order_statistics, gather=10, cap=500))
    assert torch.equal(merge_tensors("arcee_fusion", base, model, rows=5), expected)


def test_passthrough_keeps_every_bit_and_scales() -> None:
    model = random(50, dtype=torch.bfloat16)
    assert torch.equal(merge_tensors("passthrough", None, model).bfloat16(), model)
    assert merge_tensors("passthrough", None, tensor([1.0, -2.0]), scale=0.5).tolist() == [0.5, -1.0]


def test_consensus_leaves_out_what_only_one_model_wants() -> None:
    vectors = [1.0, 1.0, 1.0, 0.1], [1.0, 0.0, -3.0, 1.0]
    assert of("consensus", *vectors) == [2, 0, 0, 0]  # the last is claimed by the second alone: 0.1 < 0.4 * 1
    assert of("consensus", *vectors, k=1) == pytest.approx([2, 1, -2, 1.1])
    assert of("consensus", *vectors, mask_lambda=[0.05, 0.4]) == pytest.approx([2, 0, -2, 1.1])
    assert of("consensus", *vectors, k=0) == pytest.approx([2, 1, -2, 1.1])
    assert of("consensus", [1.0, 2.0]) == [0, 0]


def test_emr_elects_the_largest_magnitude_with_the_sign_of_the_sum() -> None:
    assert of("emr", [3.0, -1.0, 1.0], [1.0, -2.0, -1.0], [-1.0, 0.5, 0.0]) == [3, -2, -1]  # a sum of zero elects -
    assert of("emr", [3.0, -1.0], [1.0, -2.0], **{"lambda": 0.5}) == [1.5, -1]
