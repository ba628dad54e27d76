"""A model without attention or MLPs whose residual is the token's own axis: every score is known in closed form."""

import warnings
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
import transformer_lens
from conftest import VOCABULARY, WORDS
from sae_lens.saes.sae import SAEMetadata
from scipy.stats import hypergeom

from sae_emotion_plugin.discovery.scores import FeatureScore
from sae_emotion_plugin.discovery.scoring import score_features
from sae_emotion_plugin.discovery.tokens import with_promoted_tokens
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.sparse_codes import Pooling, encode_texts

HOOK = "blocks.0.hook_resid_post"
STRENGTH = {"joy": 3.0, "anger": 2.0, "sad": 0.5}
"""Activation of each emotion's feature on its word."""
FEATURE = {"joy": 40, "anger": 11, "sad": 23}
EMOTION = {"joy": "joy", "anger": "anger", "sad": "sadness"}
N_IN = 40
WITH_WORD = {"joy": 30, "anger": 20, "sad": 40}
"""Texts of the emotion that have its word."""
ELSEWHERE = {"joy": 4, "anger": 10, "sad": 0}
"""Texts of the next emotion that have it too."""
LENGTH = 4


@pytest.fixture(scope="module")
def world(word_tokenizer: Any) -> Any:
    config = transformer_lens.HookedTransformerConfig(
        n_layers=1, d_model=len(WORDS), n_ctx=32, d_head=4, n_heads=1, d_mlp=4, d_vocab=len(WORDS), act_fn="relu",
        normalization_type=None, seed=0, device="cpu",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = transformer_lens.HookedTransformer(config, tokenizer=word_tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E.copy_(torch.eye(len(WORDS)))
        model.unembed.W_U.copy_(2 * torch.eye(len(WORDS)))
    return model.eval()


@pytest.fixture(scope="module")
def dictionary() -> Any:
    """Each emotion's feature reads its word's axis, so that it fires on that word alone, with a known strength."""
    metadata = SAEMetadata(hook_name=HOOK, model_name="tiny", context_size=32, prepend_bos=True)
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=len(WORDS), d_sae=48, metadata=metadata))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        for word, feature in FEATURE.items():
            sae.W_enc[VOCABULARY[word], feature] = STRENGTH[word]
            sae.W_dec[feature, VOCABULARY[word]] = 1.0
    return sae.eval()


def made_texts(prefix: str) -> LabelledTexts:
    """40 texts an emotion, of four words; `WITH_WORD` of them, and `ELSEWHERE` of the next one's, have its word."""
    rng = np.random.default_rng(len(prefix))
    texts, emotions = [], []
    words = list(EMOTION)
    for place, word in enumerate(words):
        guest = words[place - 1]
        for number in range(N_IN):
            text = [f"w{n}" for n in rng.choice(50, size=LENGTH, replace=False)]
            text[0] = word if number < WITH_WORD[word] else text[0]
            text[1] = guest if number < ELSEWHERE[guest] else text[1]
            texts.append(" ".join(text))
            emotions.append((EMOTION[word],))
    return LabelledTexts(tuple(texts), tuple(emotions), tuple(f"{prefix}{n}" for n in range(len(texts))), "en")


def scored(world: Any, dictionary: Any, pooling: Pooling) -> dict[str, FeatureScore]:
    texts, held_out = made_texts("t"), made_texts("h-")
    codes, others = (encode_texts(world, dictionary, part, progress=False) for part in (texts, held_out))
    found = score_features(codes, texts, held_out=(others, held_out), pooling=pooling, top=3)
    found = with_promoted_tokens(found, world, dictionary, top=2)
    return {word: found.top(EMOTION[word], 1)[0] for word in EMOTION}


@pytest.mark.parametrize(("pooling", "share"), [("max", 1.0), ("sum", 1.0), ("mean", 1 / LENGTH)])
def test_every_score_of_the_best_features_has_its_closed_form(
    world: Any, dictionary: Any, pooling: Pooling, share: float
) -> None:
    n_out = 2 * N_IN
    for word, row in scored(world, dictionary, pooling).items():
        a, b = WITH_WORD[word], ELSEWHERE[word]
        assert row.feature == FEATURE[word]
        assert (row.rate_in, row.rate_out) == pytest.approx((a / N_IN, b / n_out))
        # A feature of two values: its ROC curve is two straight lines through (rate_out, rate_in).
        assert row.auroc == pytest.approx((1 + a / N_IN - b / n_out) / 2)
        assert row.held_out_auroc == pytest.approx(row.auroc)
        precision = a / N_IN * a / (a + b) + (1 - a / N_IN) * N_IN / (N_IN + n_out)
        assert (row.average_precision, row.held_out_average_precision) == pytest.approx((precision, precision))
        value = STRENGTH[word] * share
        assert (row.mean_in, row.mean_out) == pytest.approx((value * a / N_IN, value * b / n_out))
        assert row.threshold == pytest.approx(value)
        assert (row.f1, row.held_out_f1) == pytest.approx((2 * a / (a + b + N_IN),) * 2)


def test_a_word_that_is_never_last_leaves_nothing_to_the_last_token(world: Any, dictionary: Any) -> None:
    texts = made_texts("t")
    codes = encode_texts(world, dictionary, texts, progress=False)
    with pytest.raises(ValueError, match="no feature is active"):
        score_features(codes, texts, pooling="last")


def test_p_is_near_that_of_the_two_by_two_table(world: Any, dictionary: Any) -> None:
    """All texts are equally long, so there is one stratum: permuting labels makes the count a hypergeometric one."""
    for word, row in scored(world, dictionary, "max").items():
        a, b = WITH_WORD[word], ELSEWHERE[word]
        exact = 2 * hypergeom.sf(a - 1, 3 * N_IN, N_IN, a + b)
        assert row.p == pytest.approx(exact, rel=0.2)


def test_a_feature_promotes_the_word_that_it_writes(world: Any, dictionary: Any) -> None:
    for word, row in scored(world, dictionary, "max").items():
        assert row.promotes[0] == word
