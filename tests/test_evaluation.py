import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from conftest import D_MODEL, D_SAE, HOOK, VOCABULARY, make_sae
from sae_lens.saes.sae import SAEMetadata

from sae_emotion_plugin import evaluation
from sae_emotion_plugin.activations import canonical_hook, tokenize
from sae_emotion_plugin.evaluation import DictionaryReport, Evaluation, evaluate, token_losses

TEXTS = ["he is such a joy", "sad fear anger w1 w2 w3", "a", "w4 w5 w6 w7 w8 w9 w10", "he is w11 happy"]
BOS = VOCABULARY["<bos>"]


@pytest.fixture(params=["bridge", "hooked_transformer"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def relu_sae(encoder: torch.Tensor, decoder: torch.Tensor, bias: torch.Tensor | None = None, bos: bool = True) -> Any:
    sae = sae_lens.StandardSAE(
        sae_lens.StandardSAEConfig(
            d_in=D_MODEL,
            d_sae=len(decoder),
            apply_b_dec_to_input=False,
            metadata=SAEMetadata(hook_name=HOOK, model_name="tiny", context_size=32, prepend_bos=bos),
        )
    )
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        sae.W_dec.copy_(decoder)
        sae.b_enc.zero_()
        sae.b_dec.copy_(torch.zeros(D_MODEL) if bias is None else bias)
    return sae.eval()


def perfect_sae(bos: bool = True) -> Any:
    """Reads and writes every dimension and its negative."""
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    return relu_sae(both.T, both, bos=bos)


def silent_sae(bias: torch.Tensor | None = None) -> Any:
    return relu_sae(torch.zeros(D_MODEL, D_SAE), torch.zeros(D_SAE, D_MODEL), bias)


def rows(texts: list[str]) -> list[torch.Tensor]:
    return [torch.tensor([[BOS, *(VOCABULARY[word] for word in text.split())]]) for text in texts]


def vectors_of(model: Any, texts: list[str]) -> torch.Tensor:
    """All activations, one text at a time, without BOS."""
    with torch.inference_mode():
        return torch.cat([model.run_with_cache(row)[1][canonical_hook(model, HOOK)][0, 1:] for row in rows(texts)])


def cross_entropy_by_loop(model: Any, change: Any = None) -> float:
    """Mean nats a token, token by token from the probabilities; `change` maps one activation vector to another."""

    def splice(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = tensor.clone()
        for position in range(1, tensor.shape[1]):
            changed[0, position] = change(tensor[0, position])
        return changed

    losses = []
    hooks = [(canonical_hook(model, HOOK), splice)] if change else []
    for row in rows(TEXTS):
        with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
            probabilities = model(row)[0].softmax(-1)
        losses += [-math.log(probabilities[n, row[0, n + 1]]) for n in range(row.shape[1] - 1)]
    return float(np.mean(losses))


def test_a_perfect_dictionary_loses_nothing(model: Any) -> None:
    report = evaluate(model, perfect_sae(), TEXTS, progress=False)
    assert report.fvu == pytest.approx(0, abs=1e-9)
    assert report.fvu_without_largest_dimension == pytest.approx(0, abs=1e-9)
    assert report.fvu_mean_over_dimensions == pytest.approx(0, abs=1e-9)
    assert report.cross_entropy_spliced == pytest.approx(report.cross_entropy, abs=1e-5)
    assert report.loss_recovered == pytest.approx(1, abs=1e-3)
    assert report.l0 == pytest.approx(D_MODEL)
    assert report.n_tokens == sum(len(text.split()) for text in TEXTS) and report.n_documents == len(TEXTS)


def test_a_silent_dictionary_explains_nothing(model: Any) -> None:
    report = evaluate(model, silent_sae(), TEXTS, progress=False)
    vectors = vectors_of(model, TEXTS)
    deviation = (vectors - vectors.mean(0)).square().sum()
    assert report.fvu == pytest.approx(float(vectors.square().sum() / deviation), rel=1e-5)
    assert report.fvu >= 1
    assert report.l0 == 0 and report.dead == report.d_sae == D_SAE


def test_a_dictionary_that_writes_the_mean_is_the_floor(model: Any) -> None:
    report = evaluate(model, silent_sae(vectors_of(model, TEXTS).mean(0)), TEXTS, progress=False)
    assert report.fvu == pytest.approx(1, rel=1e-5)
    assert report.fvu_mean_over_dimensions == pytest.approx(1, rel=1e-4)
    assert report.cross_entropy_spliced == pytest.approx(report.cross_entropy_mean_ablated, abs=1e-5)
    assert report.loss_recovered == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_the_report_equals_a_computation_by_hand(
    model: Any, normalisation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several chunks, so that sums over chunks are tested.
    monkeypatch.setattr(evaluation, "CHUNK_ENTRIES", 4 * D_SAE)
    sae = make_sae(normalisation)
    report = evaluate(model, sae, TEXTS, progress=False)
    vectors = vectors_of(model, TEXTS).double()
    with torch.inference_mode():
        codes = sae.encode(vectors.float())
        rebuilt = sae.decode(codes).double()
    error = (rebuilt - vectors).square().sum(0)
    deviation = (vectors - vectors.mean(0)).square().sum(0)
    largest = int(deviation.argmax())
    others = [dimension for dimension in range(D_MODEL) if dimension != largest]
    assert report.fvu == pytest.approx(float(error.sum() / deviation.sum()), rel=1e-5)
    assert report.largest_dimension == largest
    assert report.largest_dimension_share == pytest.approx(float(deviation[largest] / deviation.sum()), rel=1e-5)
    expected = float(error[others].sum() / deviation[others].sum())
    assert report.fvu_without_largest_dimension == pytest.approx(expected, rel=1e-5)
    assert report.fvu_mean_over_dimensions == pytest.approx(float((error / deviation).mean()), rel=1e-5)
    assert report.l0 == pytest.approx(float((codes > 0).sum()) / len(codes))
    assert report.dead == int((codes == 0).all(0).sum())
    assert report.mean_norm == pytest.approx(float(vectors.norm(dim=-1).mean()), rel=1e-5)


def test_cross_entropies_equal_a_loop_that_leaves_bos_alone(model: Any, planted_sae: Any) -> None:
    report = evaluate(model, planted_sae, TEXTS, progress=False)
    mean = vectors_of(model, TEXTS).mean(0)

    def rebuild(vector: torch.Tensor) -> torch.Tensor:
        return planted_sae.decode(planted_sae.encode(vector[None]))[0]

    assert report.cross_entropy == pytest.approx(cross_entropy_by_loop(model), abs=1e-5)
    assert report.cross_entropy_spliced == pytest.approx(cross_entropy_by_loop(model, rebuild), abs=1e-4)
    ablated = cross_entropy_by_loop(model, lambda vector: mean)
    assert report.cross_entropy_mean_ablated == pytest.approx(ablated, abs=1e-4)
    lost = report.cross_entropy_mean_ablated - report.cross_entropy_spliced
    assert report.loss_recovered == pytest.approx(lost / (ablated - report.cross_entropy), rel=1e-3)


def test_without_bos_the_first_token_is_spliced_too(bridge: Any) -> None:
    silent, perfect = silent_sae(), perfect_sae(bos=False)
    silent.cfg.metadata.prepend_bos = False
    report = evaluate(bridge, silent, ["he is joy"], progress=False)
    tokens = torch.tensor([[VOCABULARY[word] for word in ("he", "is", "joy")]])

    def erase(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(tensor)

    with torch.inference_mode(), bridge.hooks(fwd_hooks=[(canonical_hook(bridge, HOOK), erase)]):
        expected = float(token_losses(bridge, tokens).mean())
    assert report.cross_entropy_spliced == pytest.approx(expected, abs=1e-5)
    whole = evaluate(bridge, perfect, ["he is joy"], progress=False)
    assert whole.cross_entropy_spliced == pytest.approx(whole.cross_entropy, abs=1e-5)


def test_evaluating_leaves_the_model_as_it_was(model: Any, planted_sae: Any) -> None:
    row = rows(TEXTS)[0]
    with torch.inference_mode():
        before = model(row)
        evaluate(model, planted_sae, TEXTS, progress=False)
        assert torch.equal(model(row), before)


def test_an_sae_on_attention_heads_is_evaluated_on_flat_vectors(hooked_transformer: Any) -> None:
    sae = make_sae(hook_name="blocks.0.attn.hook_z")
    flat = evaluate(hooked_transformer, sae, TEXTS, progress=False)
    sae.cfg.reshape_activations = "hook_z"
    sae.turn_on_forward_pass_hook_z_reshaping()
    assert evaluate(hooked_transformer, sae, TEXTS, progress=False) == flat
    assert sae.hook_z_reshaping_mode


def test_fewer_loss_tokens_take_windows_from_all_over_the_texts(bridge: Any) -> None:
    windows = tokenize(bridge, [f"w{n} he is" for n in range(40)])
    spread = evaluation._spread(windows, 40)
    assert [window.text_index for window in spread] == list(range(0, 40, 4))
    assert evaluation._spread(windows, 10**6) == windows


def test_token_losses_are_those_of_the_next_token(bridge: Any) -> None:
    row = rows(TEXTS)[1]
    losses = token_losses(bridge, row)
    with torch.inference_mode():
        logs = bridge(row)[0].log_softmax(-1)
    assert losses.shape == (1, row.shape[1] - 1)
    expected = [-float(logs[n, row[0, n + 1]]) for n in range(row.shape[1] - 1)]
    assert losses[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_texts_that_cannot_be_evaluated_are_refused(bridge: Any, planted_sae: Any) -> None:
    with pytest.raises(ValueError, match="no texts to evaluate on: the list is empty"):
        evaluate(bridge, planted_sae, [])
    with pytest.raises(ValueError, match="no tokens to evaluate on: every text is empty"):
        evaluate(bridge, planted_sae, ["", " "], progress=False)
    with pytest.raises(ValueError, match=f"the SAE reads 24 dimensions, the model has {D_MODEL}"):
        evaluate(bridge, make_sae(d_in=24), TEXTS)
    without_bos = make_sae()
    without_bos.cfg.metadata.prepend_bos = False
    with pytest.raises(ValueError, match="no text has two tokens"):
        evaluate(bridge, without_bos, ["a", "he"], progress=False)


def test_dimensions_that_do_not_vary_have_no_part_in_the_mean_over_dimensions(bridge: Any, planted_sae: Any) -> None:
    def constant(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([torch.ones_like(tensor[..., :1]), tensor[..., 1:]], dim=-1)

    with bridge.hooks(fwd_hooks=[(canonical_hook(bridge, HOOK), constant)]):
        report = evaluate(bridge, planted_sae, TEXTS)
    assert math.isfinite(report.fvu_mean_over_dimensions)
    json.dumps(report.__dict__, allow_nan=False)


def test_no_tokens_for_the_losses_are_refused_before_anything_is_read(bridge: Any) -> None:
    with pytest.raises(ValueError, match="loss_tokens 0 is below 1"):
        Evaluation(bridge, TEXTS, loss_tokens=0)


def test_several_dictionaries_are_reported_on_one_reading(
    bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = [planted_sae, silent_sae(), perfect_sae()]
    alone = [evaluate(bridge, sae, TEXTS, progress=False) for sae in saes]
    read: list[str] = []
    real = evaluation.activation_batches

    def counted(model: Any, texts: Any, hook_name: str, **options: Any) -> Any:
        read.append(hook_name)
        return real(model, texts, hook_name, **options)

    monkeypatch.setattr(evaluation, "activation_batches", counted)
    together = Evaluation(bridge, TEXTS, progress=False)
    assert [together.report(sae) for sae in saes] == alone and len(read) == 1
    # One that cuts texts in another way reads them anew.
    own = silent_sae()
    own.cfg.metadata.context_size = 8
    assert together.report(own) == evaluate(bridge, own, TEXTS, progress=False) and len(read) == 3


def test_documents_with_activations_that_are_no_numbers_are_left_out_and_counted(
    bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, overflow = evaluation.activation_batches, [1]

    def overflowing(*arguments: Any, **options: Any) -> Any:
        for batch in usual(*arguments, **options):
            bad = np.isin(batch.text_index, overflow) & (batch.position == 2)
            batch.vectors[torch.from_numpy(bad)] = math.inf
            yield batch

    expected = evaluate(bridge, planted_sae, [TEXTS[0], *TEXTS[2:]], progress=False)
    monkeypatch.setattr(evaluation, "activation_batches", overflowing)
    found = evaluate(bridge, planted_sae, TEXTS, progress=False)
    assert (found.documents_left_out, found.n_documents) == (1, 4)
    for name, value in vars(expected).items():
        if name != "documents_left_out":
            assert getattr(found, name) == pytest.approx(value, rel=1e-5), name
    overflow.append(0)
    with pytest.raises(ValueError, match="every text has activations that are NaN or infinite"):
        evaluate(bridge, planted_sae, TEXTS[:2], progress=False)


def test_a_figure_that_is_not_defined_is_null_in_the_file(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    report = evaluate(bridge, planted_sae, TEXTS, progress=False)
    replace(report, fvu=math.nan, cross_entropy_spliced=math.inf).save(tmp_path / "report.json")
    kept = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert kept["fvu"] is None and kept["cross_entropy_spliced"] is None
    assert math.isnan(DictionaryReport.load(tmp_path / "report.json").fvu)


def test_a_saved_report_loads_as_it_was(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    report = evaluate(bridge, planted_sae, TEXTS, progress=False)
    report.save(tmp_path / "report.json")
    assert DictionaryReport.load(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["fvu"] == report.fvu and data["d_sae"] == D_SAE


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fvu": 1, "colour": "red"}'])
def test_a_file_that_holds_no_report_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json holds no dictionary report") as error:
        DictionaryReport.load(tmp_path / "report.json")
    assert "\n" not in str(error.value)


def test_the_table_shows_the_share_of_the_loss_that_is_recovered(bridge: Any, planted_sae: Any) -> None:
    report = evaluate(bridge, planted_sae, TEXTS, progress=False)
    frame = report.to_pandas()
    assert frame.loc[0, "loss_recovered"] == pytest.approx(report.loss_recovered)
    assert frame.loc[0, "fvu"] == report.fvu
    assert f"{report.fvu:.4f}" in report._repr_html_()
    assert replace(report, cross_entropy_spliced=report.cross_entropy).loss_recovered == pytest.approx(1)
