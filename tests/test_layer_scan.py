import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformer_lens
from conftest import D_MODEL, JOY, VOCABULARY, WORDS, make_sae
from scipy.optimize import minimize

from sae_emotion_plugin import pooled_activations
from sae_emotion_plugin.discovery import layer_scan
from sae_emotion_plugin.discovery.layer_scan import MEAN, LayerScan, LayerScore, scan_layers
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.association import auroc

WRITTEN = 1
"""The layer that writes joy into dimension 2; before it, joy is which of dimensions 0 and 1 agree in sign."""
FIRST_WORD = VOCABULARY["w0"]


@pytest.fixture(scope="module")
def planted(word_tokenizer: Any) -> Any:
    """A model whose word w_i stands at (+-1, +-1): joy where the signs agree, which no linear probe can read (XOR).

    Attention and the other layers write nothing; the MLP of layer 1 writes |x + y| / 2 - |x - y| / 2, which is x y.
    """
    config = transformer_lens.HookedTransformerConfig(
        n_layers=3,
        d_model=D_MODEL,
        n_ctx=64,
        d_head=16,
        n_heads=2,
        d_mlp=8,
        d_vocab=len(WORDS),
        act_fn="relu",
        normalization_type=None,
        seed=0,
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = transformer_lens.HookedTransformer(config, tokenizer=word_tokenizer)
    mlp: Any = model.blocks[WRITTEN].mlp
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for token in range(FIRST_WORD, len(WORDS)):
            model.embed.W_E[token, :2] = torch.tensor(signs(token - FIRST_WORD), dtype=torch.float32)
        mlp.W_in[0, :4] = torch.tensor([1.0, -1.0, 1.0, -1.0])
        mlp.W_in[1, :4] = torch.tensor([1.0, -1.0, -1.0, 1.0])
        mlp.W_out[:4, 2] = torch.tensor([0.5, 0.5, -0.5, -0.5])
    return model.eval()


def signs(word: int) -> tuple[int, int]:
    return 1 - 2 * (word % 2), 1 - 2 * (word // 2 % 2)


def corpus(n: int, seed: int) -> LabelledTexts:
    """As many texts of each of the four kinds of words; joy where the signs agree, the rest sadness."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for number in range(n):
        kind = number % 4
        words = rng.choice([word for word in range(48) if word % 4 == kind], size=6, replace=False)
        texts.append(" ".join(f"w{word}" for word in words))
        labels.append(("joy",) if np.prod(signs(kind)) > 0 else ("sadness",))
    return LabelledTexts(tuple(texts), tuple(labels), tuple(map(str, range(n))))


TRAIN, HELD_OUT = corpus(80, 1), corpus(48, 2)


def reading_sae(layer: int = WRITTEN) -> Any:
    """A dictionary whose feature 7 reads the dimension that holds joy, and whose others read the first two."""
    sae = make_sae(hook_name=f"blocks.{layer}.hook_resid_post")
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_enc[0, 1], sae.W_enc[1, 2], sae.W_enc[2, JOY], sae.W_enc[2, 8] = 1.0, 1.0, 1.0, -1.0
    return sae


def test_an_emotion_written_at_a_layer_is_read_from_there_on_and_not_before(planted: Any) -> None:
    scan = scan_layers(planted, TRAIN, HELD_OUT, dictionaries={0: reading_sae(0), WRITTEN: reading_sae()})
    assert [(row.layer, row.pooling, row.emotion) for row in scan.rows] == [
        (layer, pooling, emotion)
        for layer in range(3)
        for pooling in ("mean", "last")
        for emotion in (MEAN, "joy", "sadness")
    ]
    for row in scan.rows:
        assert row.hook_name == f"blocks.{row.layer}.hook_resid_post"
        expected = 1.0 if row.layer >= WRITTEN else 0.5
        assert row.probe == pytest.approx(expected, abs=1e-9) and row.cross_validated is not None
        assert row.low <= row.probe <= row.high
        assert (row.latent is None) == (row.layer == 2)
        if row.layer == WRITTEN:
            assert row.latent == 1.0
            assert row.latent_feature == {MEAN: None, "joy": JOY, "sadness": 8}[row.emotion]
        if row.layer == 0:
            assert row.latent == pytest.approx(0.5)
    best = scan.best_layer()
    assert (best.layer, best.pooling, best.emotion) == (WRITTEN, "mean", MEAN)
    assert scan.best_layer("joy", "last").pooling == "last"


def test_the_layer_is_chosen_by_the_training_texts_and_not_by_the_held_out_ones() -> None:
    rows = [
        LayerScore(0, "a", "mean", MEAN, 0.7, 0.6, 0.8, cross_validated=0.9),
        LayerScore(1, "b", "mean", MEAN, 0.9, 0.8, 1.0, cross_validated=0.8),
        LayerScore(2, "c", "mean", MEAN, 0.95, 0.9, 1.0, cross_validated=0.9),
        LayerScore(2, "c", "mean", "joy", 0.95, 0.9, 1.0),
    ]
    scan = LayerScan({}, tuple(rows))
    assert scan.best_layer().layer == 0
    for arguments in (("anger",), ("joy",), (MEAN, "last")):
        with pytest.raises(ValueError, match=r"no cross-validated row for .*valid: mean, joy; mean"):
            scan.best_layer(*arguments)


def test_held_out_labels_have_no_part_in_what_is_chosen(bridge: Any) -> None:
    turned = LabelledTexts(HELD_OUT.texts, HELD_OUT.emotions[::-1], HELD_OUT.ids)
    for ours, other in zip(
        scan_layers(bridge, TRAIN, HELD_OUT, progress=False).rows,
        scan_layers(bridge, TRAIN, turned, progress=False).rows,
        strict=True,
    ):
        assert ours.cross_validated == other.cross_validated and ours.emotion == other.emotion


def slow_probe(design: np.ndarray, target: np.ndarray, strength: float) -> np.ndarray:
    """Weights and, last, the bias, by scipy's own gradient of the loss as it is written in textbooks."""

    def loss(parameters: np.ndarray) -> float:
        margins = np.where(target, 1, -1) * (design @ parameters[:-1] + parameters[-1])
        return strength * np.log1p(np.exp(-margins)).sum() + 0.5 * (parameters[:-1] ** 2).sum()

    return minimize(loss, np.zeros(design.shape[1] + 1), method="BFGS", options={"gtol": 1e-7}).x


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the slow one's numerical gradient
def test_a_scan_equals_the_same_steps_written_out(bridge: Any) -> None:
    """Standardise, fit at the strength that was chosen, score the held-out texts: with no code of the scan's."""
    scan = scan_layers(bridge, TRAIN, HELD_OUT, layers=[1], poolings=["max"], emotions=["joy"], progress=False)
    (strength,) = scan.meta["strengths"]["1"].values()
    ours, theirs = (
        pooled_activations.pooled_activations(bridge, part, [scan.rows[0].hook_name], poolings=["max"], progress=False)
        for part in (TRAIN, HELD_OUT)
    )
    train, test = (found[scan.rows[0].hook_name]["max"].astype(np.float64) for found in (ours, theirs))
    scale = train.std(axis=0)
    target = np.array(["joy" in own for own in TRAIN.emotions])
    fitted = slow_probe((train - train.mean(axis=0)) / scale, target, strength)
    scores = ((test - train.mean(axis=0)) / scale) @ fitted[:-1]
    wanted = np.array(["joy" in own for own in HELD_OUT.emotions])
    mean, joy = scan.rows
    assert joy.probe == pytest.approx(auroc(scores, wanted), abs=5e-3)
    assert mean.probe == pytest.approx(joy.probe) and joy.low < joy.probe < joy.high


def test_the_strength_is_the_best_of_those_tried_until_the_first_fold_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    means = {0.0003: (0.6, 0.9), 0.003: (0.7, 0.5), 0.03: (0.65, 1.0), 0.3: (0.9, 0.9)}
    tried: list[float] = []
    starts: list[Any] = []

    def fit(design: Any, targets: Any, strength: float, start: Any = None) -> Any:
        tried.append(strength)
        starts.append(start and start[0].item())
        return np.full((1, 1), strength), np.zeros(1)

    def aurocs(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return np.array([means[tried[-1]][len(labels) - 3]])

    monkeypatch.setattr(layer_scan, "fit_logistics", fit)
    monkeypatch.setattr(layer_scan, "_aurocs", aurocs)
    folds = [np.arange(0, 3), np.arange(3, 7)]
    scores, inside, strength = layer_scan._probe(np.ones((7, 1)), np.ones((2, 1)), np.ones((7, 1), dtype=bool), folds)
    np.testing.assert_allclose(scores, 0.0003)
    assert inside.tolist() == [0.75] and strength == 0.0003
    assert tried == [0.0003, 0.0003, 0.003, 0.003, 0.03, 0.0003]
    assert starts == [None, None, 0.0003, 0.0003, 0.003, 0.0003]


def test_the_means_interval_lies_inside_the_unit_interval_and_around_the_mean(bridge: Any) -> None:
    rng = np.random.default_rng(3)
    labels = rng.random((80, 3)) < 0.4
    scores = labels + rng.normal(size=(80, 3)) * 0.3
    bootstrap = {"groups": None, "level": 0.95, "resamples": 200, "seed": 0}
    (mean, low, high), *each = layer_scan._intervals(scores, labels, bootstrap)
    assert mean == pytest.approx(np.mean([one[0] for one in each])) and 0.9 < low < mean < high <= 1.0


def test_a_layer_can_be_scanned_alone_and_a_second_scan_reads_the_cache(
    bridge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = make_sae(hook_name="blocks.1.hook_resid_post")
    arguments: dict[str, Any] = {"layers": [1], "dictionaries": {1: sae}, "cache": tmp_path, "progress": False}
    first = scan_layers(bridge, TRAIN, HELD_OUT, **arguments)
    assert {row.layer for row in first.rows} == {1} and len(first.rows) == 6
    monkeypatch.setattr(pooled_activations, "_pooled_block", None)
    assert scan_layers(bridge, TRAIN, HELD_OUT, **arguments).rows == first.rows


def test_a_scan_is_shown_kept_and_tabled(bridge: Any, tmp_path: Path) -> None:
    scan = scan_layers(bridge, TRAIN, HELD_OUT, progress=False)
    summary, head, *lines = repr(scan).splitlines()
    assert "chosen by cross-validation inside the training texts" in summary and head.startswith("layer")
    assert len(lines) == 4 and lines[0].split()[:2] == ["0", "mean"]
    assert scan._repr_html_().count("<tr>") == 5
    content = json.loads(scan.save(tmp_path / "scan.json").read_text(encoding="utf-8"))
    assert content == json.loads(json.dumps(scan.to_dict())) and len(content["rows"]) == 12
    assert content["meta"]["emotions"] == ["joy", "sadness"] and content["meta"]["texts_on_both_sides"] == 0
    assert content["meta"]["class_counts"]["held_out"] == {"joy": 24, "sadness": 24}
    frame = scan.to_pandas()
    assert len(frame) == 12 and frame["probe"].tolist() == [row.probe for row in scan.rows]


def test_texts_on_both_sides_are_counted(bridge: Any, caplog: pytest.LogCaptureFixture) -> None:
    scan = scan_layers(bridge, TRAIN, TRAIN, layers=[0], poolings=["mean"], progress=False)
    assert scan.meta["texts_on_both_sides"] == 80 and "80 distinct texts are both" in caplog.text


def relabelled(texts: LabelledTexts, labels: Sequence[tuple[str, ...]]) -> LabelledTexts:
    return LabelledTexts(texts.texts, tuple(labels), texts.ids)


def test_rare_emotions_are_refused_or_left_out(bridge: Any) -> None:
    rare = relabelled(TRAIN, [(*own, "awe") if n < 8 else own for n, own in enumerate(TRAIN.emotions)])
    with pytest.raises(ValueError, match=r"too few texts for awe \(8 in, 72 out\)"):
        scan_layers(bridge, rare, HELD_OUT, progress=False)
    scan = scan_layers(bridge, rare, HELD_OUT, layers=[0], skip_rare=True, progress=False)
    assert scan.meta["emotions"] == ["joy", "sadness"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [0, 2]}, r"the model has no layer 2 \(valid: 0 to 1\)"),
        ({"layers": [-1]}, "the model has no layer -1"),
        ({"layers": []}, "no layer to scan"),
        ({"dictionaries": {5: None}}, r"for layer 5, which is not scanned \(\[0, 1\]\)"),
        ({"dictionaries": {1: make_sae()}}, "given for layer 1 reads blocks.0.hook_resid_post, not blocks.1"),
        ({"emotions": ["joy", "awe"]}, "unknown emotions: awe; the texts have: joy, sadness"),
        ({"emotions": []}, "no emotion to scan for; the texts have: joy, sadness"),
        ({"resamples": 0}, "resamples must be at least 1"),
        ({"held_out": relabelled(HELD_OUT, [("joy",)] * 48)}, r"held-out texts for joy \(48 in, 0 out\), sadness"),
        (
            {"texts": LabelledTexts(("he is joy",) * 80, TRAIN.emotions, TRAIN.ids)},
            r"too few groups of training texts for joy \(1 in, 1 out\)",
        ),
    ],
)
def test_what_cannot_be_scanned_is_refused(
    bridge: Any, change: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooled_activations, "_pooled_block", None)  # all this is known before the model is run
    with pytest.raises(ValueError, match=message):
        scan_layers(bridge, **{"texts": TRAIN, "held_out": HELD_OUT, "progress": False, **change})
