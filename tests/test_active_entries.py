from typing import Any

import pytest
import torch

from sae_emotion_plugin.architectures import active_entries
from sae_emotion_plugin.architectures.active_entries import Active, decode, encode, largest, positive, strongest

TOKENS, WIDTH, FEATURES = 23, 6, 40


@pytest.fixture(params=["sparse", "dense", "dense, a token at a time"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(active_entries, "DENSE_SHARE", 10.0 if request.param == "sparse" else 0.0)
    if "at a time" in request.param:
        monkeypatch.setattr(active_entries, "CHUNK_ENTRIES", 1)
    return request.param


def leaves(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"pre_bias": (WIDTH,), "encoder": (WIDTH, FEATURES), "bias": (FEATURES,), "rows": (FEATURES, WIDTH)}
    return {name: torch.randn(shape, generator=generator, requires_grad=True) for name, shape in shapes.items()}


def inputs() -> torch.Tensor:
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    x[3] = 0.0  # a token that nothing but biases speaks for
    return x


def gradients(output: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((output * weights).sum(), list(given.values()))
    return dict(zip(given, found, strict=True))


@pytest.mark.parametrize("kind", ["largest", "positive"])
def test_codes_and_all_gradients_are_those_of_dense_products(way: str, kind: str) -> None:
    x, given = inputs(), leaves()
    pre = (x - given["pre_bias"]) @ given["encoder"] + given["bias"]
    if kind == "largest":
        top = pre.topk(5)
        dense = torch.zeros_like(pre).scatter(1, top.indices, top.values).relu()
    else:
        dense = pre.relu()
    expected = dense @ given["rows"]
    select = largest(5) if kind == "largest" else positive
    values, active = encode(x, given["pre_bias"], given["encoder"], given["bias"], select)
    found = decode(values.relu(), active, given["rows"])
    torch.testing.assert_close(found, expected)
    reference = gradients(expected, given)
    for name, gradient in gradients(found, given).items():
        torch.testing.assert_close(gradient, reference[name], msg=name, rtol=1e-4, atol=1e-5)


def test_nothing_active_gives_zeros_and_zero_gradients(way: str) -> None:
    given = leaves()
    values, active = encode(inputs(), given["pre_bias"], given["encoder"], given["bias"] - 1000, positive)
    found = decode(values, active, given["rows"])
    assert len(values) == 0 and found.shape == (TOKENS, WIDTH) and not found.any()
    assert not any(gradient.any() for gradient in gradients(found, given).values())


def test_no_dense_codes_are_kept_for_the_backward_pass() -> None:
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    given = leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        values, active = encode(inputs(), given["pre_bias"], given["encoder"], given["bias"], largest(2))
        decode(values.relu(), active, given["rows"])
    assert kept and (TOKENS, FEATURES) not in kept
    assert max(torch.Size(shape).numel() for shape in kept) <= FEATURES * WIDTH


def test_the_strongest_of_a_selection_are_those_of_a_smaller_one() -> None:
    x, given = inputs(), leaves()
    arguments = (x, given["pre_bias"], given["encoder"], given["bias"])
    values, active = strongest(*encode(*arguments, largest(8)), 3)
    expected, there = encode(*arguments, largest(3))

    def dense(values: torch.Tensor, active: Active) -> torch.Tensor:
        codes = torch.zeros(TOKENS, FEATURES)
        codes[active.tokens, active.features] = values
        return codes

    torch.testing.assert_close(dense(values, active), dense(expected, there))
    found = gradients(dense(values, active), {"encoder": given["encoder"]})["encoder"]
    torch.testing.assert_close(found, gradients(dense(expected, there), {"encoder": given["encoder"]})["encoder"])


def test_the_gradient_of_unit_rows_is_that_of_normalising_them() -> None:
    raw = torch.nn.functional.normalize(torch.randn(7, WIDTH), dim=-1)
    rows, reference = raw.clone().requires_grad_(), raw.clone().requires_grad_()
    found = gradients(active_entries.unit_rows(rows), {"rows": rows})["rows"]
    expected = gradients(torch.nn.functional.normalize(reference, dim=-1), {"rows": reference})["rows"]
    torch.testing.assert_close(found, expected)
    assert torch.allclose((found * raw).sum(-1), torch.zeros(7), atol=1e-6)


def test_a_row_of_zeros_stays_one_when_rows_are_brought_to_unit_norm() -> None:
    rows: Any = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    active_entries.make_unit_rows_(rows)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
