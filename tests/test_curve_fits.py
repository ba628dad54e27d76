import numpy as np
import pytest
import scipy.optimize

from sae_emotion_plugin.evidence.curve_fits import least_squares, power_fits

X = np.linspace(0, 3, 12)


def residuals(parameters: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = parameters.T[:, :, None]
    falls = np.exp(-b * X)
    return a * falls - wanted, np.stack([falls, -a * X * falls], axis=2)


def test_every_problem_gets_the_parameters_that_scipy_finds() -> None:
    rng = np.random.default_rng(0)
    wanted = 2 * np.exp(-0.7 * X) + 0.05 * rng.standard_normal((6, 12))
    found, errors = least_squares(residuals, np.ones((6, 2)), wanted)
    for row, error, ys in zip(found, errors, wanted, strict=True):
        theirs = scipy.optimize.least_squares(lambda p, ys=ys: p[0] * np.exp(-p[1] * X) - ys, [1, 1])
        assert row == pytest.approx(theirs.x, rel=1e-4)
        assert error == pytest.approx(2 * theirs.cost, rel=1e-6)


def test_a_start_at_the_answer_stays_there_and_nothing_gets_worse() -> None:
    exact = 2 * np.exp(-0.7 * X)[None]
    found, errors = least_squares(residuals, np.array([[2.0, 0.7]]), exact)
    assert found == pytest.approx(np.array([[2.0, 0.7]])) and errors == pytest.approx([0], abs=1e-20)
    start = np.array([[50.0, -3.0]])
    assert least_squares(residuals, start, exact)[1] <= (residuals(start, exact)[0] ** 2).sum()


def test_a_parameter_without_a_slope_keeps_its_value() -> None:
    def flat(parameters: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slopes = np.zeros((len(parameters), 3, 2))
        slopes[:, :, 0] = 1
        return parameters[:, :1] - wanted, slopes

    found, _ = least_squares(flat, np.array([[0.0, 5.0]]), np.ones((1, 3)))
    assert found == pytest.approx(np.array([[1.0, 5.0]]))


def test_power_fits_are_the_best_on_a_fine_grid_with_nothing_below_0() -> None:
    rng = np.random.default_rng(1)
    logs = -np.log(np.array([0.3, 0.5, 0.8, 1.2, 2.0, 3.1]))
    ys = np.exp(0.3 * rng.standard_normal((20, 6)))  # falling, rising and neither
    for (e, a, b), row in zip(power_fits(logs, ys, (0.02, 4.0)), ys, strict=True):
        assert e >= 0 and a >= 0
        ours = (((e + a * np.exp(b * logs)) / row - 1) ** 2).sum()
        theirs = []
        for exponent in np.geomspace(0.02, 4, 400):
            design = np.stack([np.ones(6), np.exp(exponent * logs)], axis=1) / row[:, None]
            theirs.append(scipy.optimize.nnls(design, np.ones(6))[1] ** 2)
        assert ours <= min(theirs) + 1e-6
