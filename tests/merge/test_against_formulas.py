"""Every deterministic method against an evaluation of its formula in float64 (see references.py), whatever the pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merge_toys import merge_tensors, near, random
from references import OF

from mergekit_plus.merge import METHODS

W2, W3 = [0.7, 0.4], [0.7, 0.4, 1.1]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("nuslerp", {"weight": W2}),
    ("nuslerp", {"weight": W2, "nuslerp_flatten": False}),
    ("nuslerp", {"weight": W2, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", {"weight": W3}),
    ("multislerp", {"weight": W3, "normalize_weights": False}),
    ("karcher", {}),
    ("karcher", {"max_iter": 1}),
    ("ties_global", {"weight": W3, "density": 0.2}),
    ("ties_global", {"weight": W3, "density": 0.7, "normalize": False}),
    ("breadcrumbs", {"weight": W3, "density": 0.5, "gamma": 0.1}),
    ("breadcrumbs", {"weight": W3, "density": 0.95, "gamma": 0.3, "rescale": True}),
    ("breadcrumbs", {"weight": W3, "density": 0.5, "gamma": 0.2, "rescale": True}),
    ("breadcrumbs", {"weight": W3, "density": 0.5, "gamma": 0.0}),
    ("breadcrumbs_ties", {"weight": W3, "density": 0.5, "gamma": 0.1}),
    ("breadcrumbs_ties", {"weight": W3, "density": 0.4, "gamma": 0.1, "normalize": True, "rescale": True}),
    ("sce", {"select_topk": 1.0}),
    ("sce", {"select_topk": 0.35}),
    ("ram", {"epsilon": 0.008}),
    ("ramplus_tl", {"epsilon": 0.008, "r": 0.3, "alpha": 5.0}),
    ("ramplus_tl", {"epsilon": 0.008, "r": 0.1, "alpha": 0.2}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("nearswap", {"t": 0.004}),
    ("arcee_fusion", {}),
    ("consensus", {"mask_lambda": 0.4}),
    ("consensus", {"mask_lambda": 0.6, "k": 1}),
    ("emr", {}),
    ("tsv", {}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("iso_cts", {"common": 0.45}),
    ("knots", {"weight": W3}),
    ("knots", {"weight": W3, "density": 0.6}),
]
MATRICES = {"tsv", "iso_c", "iso_cts", "knots"}


def compare(name: str, options: dict[str, Any], base: torch.Tensor | None, models: list[torch.Tensor], rows: int | None = None) -> None:
    plain = None if base is None else base.double().numpy()
    expected = torch.from_numpy(OF[name](plain, [model.double().numpy() for model in models], **options))
    result = merge_tensors(name, base, *models, rows=rows, **options)
    exact = result.dtype == torch.float64
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-9 if exact else 1e-4 if name in MATRICES else 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (33,), (3, 5, 7)], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_agrees_with_its_formula(name: str, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if name in MATRICES and len(shape) != 2:
        return  # below
    count = METHODS[name].models[1] or 3
    base = random(*shape, dtype=dtype)
    models = near(base, count + 1, step=0.02)
    shared = models.pop()  # what the models have in common, so that the angles between them are acute
    models = [(model.double() + (shared.double() - base.double())).to(dtype) for model in models]
    compare(name, options, base if METHODS[name].takes_base else None, models, rows=4)
    if METHODS[name].takes_base and not METHODS[name].needs_base:
        compare(name, options, None, models, rows=4)


@given(
    st.sampled_from([case for case in CASES if case[0] not in MATRICES | {"nuslerp", "multislerp", "karcher", "model_stock", "arcee_fusion"}]),
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_agrees_where_values_tie_and_cancel(case: tuple[str, dict[str, Any]], size: int, levels: int, rows: int) -> None:
    name, options = case
    options = {key: value / 4 if key in ("t", "epsilon") else value for key, value in options.items()}
    generator = torch.Generator().manual_seed(size * 10 + levels)
    tensors = [torch.randint(-levels, levels + 1, (size,), generator=generator).double() / 4 for _ in range((METHODS[name].models[1] or 3) + 1)]
    compare(name, options, tensors[0], tensors[1:], rows)


@pytest.mark.parametrize("name", sorted(MATRICES))
def test_a_stack_of_matrices_is_merged_one_by_one_and_what_is_no_matrix_by_its_elements(name: str) -> None:
    base = random(4, 6, 9)
    models = near(base, 3)
    whole = merge_tensors(name, base, *models)
    for index in range(4):
        assert torch.equal(whole[index], merge_tensors(name, base[index], *[model[index] for model in models]))
    if name != "knots":
        for flat in (lambda tensor: tensor[0, 0], lambda tensor: tensor[None]):
            mean = torch.stack([flat(model) for model in models]).mean(0)
            torch.testing.assert_close(merge_tensors(name, flat(base), *map(flat, models)), mean)
    else:
        options = {"weight": [1.0, 0.5, 2.0], "density": 0.4}
        expected = merge_tensors("ties", base[0, 0], *[model[0, 0] for model in models], **options)
        torch.testing.assert_close(merge_tensors(name, base[0, 0], *[model[0, 0] for model in models], **options), expected)
