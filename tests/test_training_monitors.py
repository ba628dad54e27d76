import math

import numpy as np
import pytest
import torch

from sae_emotion_plugin.training import monitors
from sae_emotion_plugin.training.monitors import batch_figures, decoder_cosines


@pytest.mark.parametrize("n", [2, 3, 60, 101, 137])
@pytest.mark.parametrize("at_once", [1, 500, 10**7])
def test_cosines_are_those_of_the_whole_matrix_whatever_the_block(
    n: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitors, "COSINES_AT_ONCE", at_once)
    rows = torch.randn(n, 7, generator=torch.Generator().manual_seed(n)) * torch.logspace(-3, 3, n)[:, None]
    if n > 2:
        rows[1] = -2 * rows[0]
    found = decoder_cosines(rows)
    units = rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1, keepdims=True)
    others = [np.delete(np.abs(units[i] @ units.T), i) for i in range(n)]
    assert found.mean == pytest.approx(np.mean(others), rel=1e-5)
    np.testing.assert_allclose(found.maxima, [row.max() for row in others], rtol=1e-4)
    np.testing.assert_allclose(found.quantiles, [np.quantile(row, 0.99) for row in others], rtol=1e-4)
    assert found.random == pytest.approx(math.sqrt(2 / (math.pi * 7)))
    assert found.summary()["cosine_largest"] == pytest.approx(max(map(max, others)), rel=1e-5)


def test_random_rows_have_the_mean_of_random_rows() -> None:
    found = decoder_cosines(torch.randn(600, 200, generator=torch.Generator().manual_seed(0)))
    assert found.mean == pytest.approx(found.random, rel=0.01)


def test_a_row_of_zeros_has_no_cosine_and_tiny_rows_do() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [1.0, 1.0]])
    found = decoder_cosines(rows)
    root = math.sqrt(0.5)
    torch.testing.assert_close(found.maxima, torch.tensor([0.0, root, root]))
    assert found.mean == pytest.approx(root / 3)
    with pytest.raises(ValueError, match="1 rows have no pairs"):
        decoder_cosines(rows[:1])


def test_a_reconstruction_that_is_half_too_small_shows_as_shrinkage() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 3
    mean, counts = x.mean(0), torch.tensor([50, 25, 0])
    whole, half = batch_figures(x, x, counts), batch_figures(x, mean + 0.5 * (x - mean), counts)
    assert (whole.fvu, whole.shrinkage, whole.l0) == (0, pytest.approx(1), 1.5)
    assert (half.fvu, half.shrinkage) == (pytest.approx(0.25), pytest.approx(0.5))
    nothing = batch_figures(x, mean.expand_as(x), counts)
    assert nothing.fvu == pytest.approx(1) and math.isnan(nothing.shrinkage)
    assert math.isnan(batch_figures(x[:1], x[:1], counts).fvu)
