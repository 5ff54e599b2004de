"""`tsv`, `iso_c`, `iso_cts` and `knots`: merges of singular vectors, with matrices whose singular vectors one can see."""

from __future__ import annotations

import pytest
import torch
from merge_toys import merge_tensors, near, random
from torch import Tensor, diag, eye, tensor, zeros

from mergekit_plus.merge.spectral import orthogonal, parts

METHODS = ["tsv", "iso_c", "iso_cts", "knots"]


def of(method: str, *matrices: Tensor, **options: object) -> Tensor:
    """The merged task matrix of these task matrices."""
    return merge_tensors(method, torch.zeros_like(matrices[0]), *matrices, **options)


def d(*values: float) -> Tensor:
    return diag(tensor(values, dtype=torch.float32))


def test_tsv_sums_tasks_that_do_not_share_directions() -> None:
    torch.testing.assert_close(of("tsv", d(4, 0, 0, 0), d(0, 2, 0, 0)), d(4, 2, 0, 0))


def test_tsv_keeps_the_leading_parts_only_and_does_not_add_up_what_tasks_share() -> None:
    torch.testing.assert_close(of("tsv", d(4, 3, 2, 1), d(4, 3, 2, 1)), d(4, 3, 0, 0))
    torch.testing.assert_close(of("tsv", d(4, 3, 2, 1)), d(4, 3, 2, 1))


def test_tsv_turns_directions_that_are_near_apart() -> None:
    tilted = tensor([[0.8, 0.0], [0.6, 0.0]])  # the first direction, tilted
    merged = of("tsv", d(1, 0), tilted @ d(1, 0))
    values = torch.linalg.svdvals(merged)
    assert values.max() < torch.linalg.svdvals(d(1, 0) + tilted @ d(1, 0)).max()


def test_iso_c_gives_all_directions_the_mean_strength() -> None:
    torch.testing.assert_close(of("iso_c", d(3, 0), d(0, 1)), d(2, 2))
    merged = of("iso_c", *near(zeros(6, 9), 3))
    torch.testing.assert_close(torch.linalg.svdvals(merged), torch.linalg.svdvals(merged).mean().expand(6))


def test_directions_that_no_task_has_stay_empty() -> None:
    torch.testing.assert_close(of("iso_c", d(3, 1, 0), d(0, 1, 0)), d(2.5, 2.5, 0))
    low = random(8, 2) @ random(2, 9)
    for method in METHODS:
        assert torch.linalg.matrix_rank(of(method, low, low), rtol=1e-4) <= 2


def test_iso_cts_with_nothing_but_the_common_is_iso_c() -> None:
    models = near(zeros(7, 9), 3)
    torch.testing.assert_close(of("iso_cts", *models, common=1.0), of("iso_c", *models))
    assert not torch.allclose(of("iso_cts", *models, common=0.5), of("iso_c", *models))


def test_knots_averages_what_agrees_in_the_common_directions() -> None:
    torch.testing.assert_close(of("knots", d(1, 0), d(0, 2), density=1), d(1, 2))
    torch.testing.assert_close(of("knots", d(1, 4), d(0, 2), density=1), d(1, 3))
    torch.testing.assert_close(of("knots", d(1, 4), d(0, 2), density=1, weight=[3, 1]), d(1, 3.5))


def test_knots_merges_in_a_basis_that_turns_with_the_tasks() -> None:
    turn = orthogonal(random(6, 6))
    models = near(zeros(6, 9), 3)
    torch.testing.assert_close(of("knots", *[turn @ model for model in models]), turn @ of("knots", *models), rtol=1e-4, atol=1e-5)


def test_equal_to_the_base_in_some_or_all_tasks() -> None:
    for method in METHODS:
        assert torch.equal(of(method, zeros(4, 5), zeros(4, 5)), zeros(4, 5))
        assert bool(torch.isfinite(of(method, zeros(4, 5), random(4, 5))).all())


def test_what_is_not_finite_is_carried_and_spoils_nothing_else() -> None:
    for method in METHODS:
        models = near(zeros(6, 9), 2)
        models[0][2, 3] = torch.nan
        merged = of(method, *models)
        assert (~torch.isfinite(merged)).nonzero().tolist() == [[2, 3]]


def test_parts_leave_out_singular_values_of_zero() -> None:
    u, s, v = parts(d(3, 0, 2))
    assert (u.shape, s.tolist(), v.shape) == ((3, 2), [3, 2], (2, 3))
    assert parts(d(3, 0, 2), 1)[1].tolist() == [3]
    assert parts(zeros(3, 2))[1].tolist() == []


def test_the_nearest_orthogonal_matrix() -> None:
    torch.testing.assert_close(orthogonal(d(3, 2)), eye(2))
    twice = tensor([[1.0, 1.0], [0.0, 0.0]])  # repeated columns share their direction
    torch.testing.assert_close(orthogonal(twice), twice / 2**0.5)
    columns = random(9, 4)
    torch.testing.assert_close(orthogonal(columns).T @ orthogonal(columns), eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_smaller_than_the_number_of_tasks_is_merged_all_the_same(method: str) -> None:
    models = [random(1, 5, seed=seed) for seed in range(4)]
    assert of(method, *models).abs().max() > 0
