"""What holds for every merge method of the registry."""

from __future__ import annotations

import warnings

import pytest
import torch
from every_method import BUSY, KEEPS_EQUAL, ORDERED, count, inputs
from hypothesis import given
from hypothesis import strategies as st
from merge_toys import merge_tensors, merged, random

from mergekit_plus.errors import OptionError
from mergekit_plus.merge import METHODS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAMES = list(METHODS)


@pytest.fixture(autouse=True)
def quiet_pcb():  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pcb: model")
        yield


MERGEKIT = {
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties",
    "della", "della_linear", "sce", "ram", "ramplus_tl", "model_stock", "nearswap", "arcee_fusion", "passthrough",
}  # fmt: skip


def test_the_registry_has_all_of_mergekit_and_what_it_lacks() -> None:
    assert set(NAMES) - MERGEKIT == {"ties_global", "pcb", "consensus", "emr", "tsv", "iso_c", "iso_cts", "knots"}
    assert MERGEKIT <= set(NAMES) == set(BUSY)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_is_and_every_method_what_it_does(name: str) -> None:
    assert METHODS[name].summary.endswith(".")
    assert all(option.help and not option.required for option in METHODS[name].options.table.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (7,), (5, 3), (1, 6), (6, 1), (2, 3, 5), (2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_shape_and_dtype_gives_finite_values_of_the_same_shape_in_the_working_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, models = inputs(name, *shape, dtype=dtype)
    result = merge_tensors(name, base, *models, **BUSY[name])
    assert result.shape == torch.Size(shape)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(torch.isfinite(result).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_alone_and_never_returned(name: str, dtype: torch.dtype) -> None:
    for options in (BUSY[name], {}):
        base, models = inputs(name, 6, 4, dtype=dtype)
        tensors = [tensor for tensor in (base, *models) if tensor is not None]
        before = [tensor.clone() for tensor in tensors]
        result = merge_tensors(name, base, *models, **options)
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
        assert all(tensor.data_ptr() != result.data_ptr() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_where_pieces_are_cut_does_not_change_a_bit(name: str, dtype: torch.dtype) -> None:
    base, models = inputs(name, 129, 67, dtype=dtype)
    whole = merge_tensors(name, base, *models, **BUSY[name])
    for rows in (1, 2, 7, 128):
        assert torch.equal(merge_tensors(name, base, *models, rows=rows, workers=4, **BUSY[name]), whole)


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs_give_the_same_bits(name: str) -> None:
    base, models = inputs(name, 24, 36)
    strided = [None if tensor is None else tensor.t().contiguous().t() for tensor in (base, *models)]
    assert torch.equal(merge_tensors(name, strided[0], *strided[1:], **BUSY[name]), merge_tensors(name, base, *models, **BUSY[name]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(KEEPS_EQUAL))
def test_equal_models_give_that_model(name: str, dtype: torch.dtype) -> None:
    base, models = inputs(name, 11, 9, dtype=dtype)
    same = [models[0]] * count(name)
    if name == "slerp":
        base = same[0]
    if name == "nearswap":
        base = (same[0].double() + 5e-5).to(dtype)
    result = merge_tensors(name, base, *same, **KEEPS_EQUAL[name])
    if dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(result.to(dtype), same[0])
    torch.testing.assert_close(result, same[0].to(result.dtype), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in KEEPS_EQUAL if METHODS[name].models[0] <= 1 and METHODS[name].models[1] is None])
def test_of_one_model_nothing_is_lost(name: str) -> None:
    base, models = inputs(name, 11, 9)
    torch.testing.assert_close(merge_tensors(name, base, models[0], **KEEPS_EQUAL[name]), models[0], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].takes_base])
@pytest.mark.parametrize("shape", [(11, 9), (7,), (), (2, 4, 3)], ids=str)
def test_models_equal_to_the_base_give_the_base(name: str, shape: tuple[int, ...]) -> None:
    base = random(*shape)
    if name == "slerp":
        base = base.abs() + 1  # no vector is at an angle to itself, but a line through rounding can be
    result = merge_tensors(name, base, *[base.clone()] * count(name), **BUSY[name])
    torch.testing.assert_close(result, base, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if not METHODS[name].random and name not in ORDERED])
def test_the_order_of_the_models_does_not_matter(name: str) -> None:
    base, models = inputs(name, 31, 17)
    options = BUSY[name]
    there = merge_tensors(name, base, *models, **options)
    back = merge_tensors(name, base, *reversed(models), **options)
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].random])
def test_a_random_method_repeats_itself_and_follows_the_seed(name: str) -> None:
    base, models = inputs(name, 31, 17)
    first, again, other = (merge_tensors(name, base, *models, seed=seed, **BUSY[name]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].scope == "tensor"])
def test_a_tensor_does_not_feel_its_neighbours(name: str) -> None:
    base, models = inputs(name, 8, 8)
    alone = merge_tensors(name, base, *models, **BUSY[name])
    others = [{"other": tensor.exp(), "x": tensor} for tensor in models]
    together = merged(name, None if base is None else {"other": base.exp(), "x": base}, others, **BUSY[name])
    assert torch.equal(together["x"], alone)


@given(st.sampled_from(NAMES), st.integers(0, 40), st.integers(1, 9), st.sampled_from(DTYPES), st.booleans())
def test_never_nan(name: str, size: int, levels: int, dtype: torch.dtype, large: bool) -> None:
    # few levels make ties, zeros, cancelling signs and constant task vectors
    generator = torch.Generator().manual_seed(size * 10 + levels)
    tensors = [torch.randint(0, levels, (size,), generator=generator).to(dtype) * (1000 if large else 0.001) for _ in range(count(name) + 1)]
    base, models = (tensors[0] if METHODS[name].takes_base else None), tensors[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bool(torch.isfinite(merge_tensors(name, base, *models, **BUSY[name])).all())


def test_mixed_dtypes_are_merged_in_the_widest() -> None:
    for name in NAMES:
        base, models = inputs(name, 6, 4, dtype=torch.bfloat16)
        models[0] = models[0].double()
        assert merge_tensors(name, base, *models, **BUSY[name]).dtype == torch.float64


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "dare_linear", "breadcrumbs", "della_linear", "multislerp"])
def test_weights_that_cancel_cannot_be_normalized(name: str) -> None:
    assert METHODS[name].check is not None
    normalize = "normalize_weights" if name == "multislerp" else "normalize"
    with pytest.raises(OptionError, match=r"0\.3, -0\.1, -0\.2 sum to zero.*set normalize to false"):
        merge_tensors(name, *inputs(name, 2)[:1], *inputs(name, 2)[1], weight=[0.3, -0.1, -0.2], **{normalize: True})
    merge_tensors(name, *inputs(name, 2)[:1], *inputs(name, 2)[1], weight=[0.3, -0.1, -0.2], **{normalize: False})


@pytest.mark.parametrize(
    ("name", "options"),
    [("ties", {"density": 0}), ("ties", {"density": 1.5}), ("slerp", {"t": -0.1}), ("slerp", {"t": 2}), ("linear", {"weight": float("nan")}),
     ("pcb", {"ratio": 0}), ("pcb", {"winsor": 0.5}), ("pcb", {"inter": "max"}), ("dare_ties", {"density": -1}), ("ties", {"desnity": 0.5}),
     ("breadcrumbs", {"gamma": 1}), ("della", {"epsilon": 0.5}), ("della", {"rescale": "l2"}), ("sce", {"select_topk": 1.1}), ("ram", {"epsilon": -1}),
     ("karcher", {"tol": 0}), ("multislerp", {"eps": 0}), ("nearswap", {"t": -1}), ("passthrough", {"scale": float("inf")}), ("ties_global", {"density": 0}),
     ("consensus", {"k": -1}), ("consensus", {"k": 1.5}), ("iso_cts", {"common": 2}), ("knots", {"density": 0}), ("model_stock", {"filter_wise": 3})],
)  # fmt: skip
def test_options_outside_their_bounds_are_refused(name: str, options: dict[str, object]) -> None:
    assert METHODS[name].options.problems(options)


def test_int8_mask_is_accepted_and_changes_nothing() -> None:
    for name in [name for name in NAMES if "int8_mask" in METHODS[name].options.table]:
        base, models = inputs(name, 5, 5)
        assert torch.equal(merge_tensors(name, base, *models, int8_mask=True), merge_tensors(name, base, *models))


@pytest.mark.parametrize("name", NAMES)
def test_float16_models_with_large_values_do_not_overflow(name: str) -> None:
    tensors = [(random(64, 48, seed=seed) * 20000).clamp(-6e4, 6e4).half() for seed in range(count(name) + 1)]
    base, models = (tensors[0] if METHODS[name].takes_base else None), tensors[1:]
    wide = merge_tensors(name, None if base is None else base.double(), *[model.double() for model in models], **BUSY[name])
    torch.testing.assert_close(merge_tensors(name, base, *models, **BUSY[name]).double(), wide, rtol=1e-3, atol=10.0)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].unit != "element"])
def test_a_method_says_which_tensors_must_be_whole(name: str) -> None:
    from mergekit_plus.checkpoint import TensorSpec

    multiples = [METHODS[name].multiple(TensorSpec("x", "F32", shape)) for shape in ((), (7,), (4, 5), (2, 3, 4))]
    assert multiples == ([0, 0, 1, 1] if METHODS[name].unit == "row" else [0, 0, 0, 0])
    assert [METHODS["linear"].multiple(TensorSpec("x", "F32", shape)) for shape in ((), (7,), (4, 5))] == [0, 1, 1]
