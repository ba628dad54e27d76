"""Tiny random models and a planted dictionary for all tests; nothing is downloaded."""

import os
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # TransformerLens and SAELens warn about each other's deprecated names while they are imported.
    import sae_lens
    import torch
    import transformer_lens
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    from sae_lens.saes.sae import SAEMetadata
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

from sae_emotion_plugin.activations import canonical_hook
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.generation.records import Generation

WORDS = (
    "<pad>", "<bos>", "<eos>", "<unk>", "he", "is", "such", "a", "joy", "happy", "smile", "anger", "sad", "fear",
    *(f"w{index}" for index in range(50)),
)  # fmt: skip
VOCABULARY = {word: index for index, word in enumerate(WORDS)}
HOOK = "blocks.0.hook_resid_post"
D_MODEL = 32
D_SAE = 64
JOY = 7
"""The feature that the planted dictionary has for joy."""
JOY_TOKEN = VOCABULARY["joy"]
GENERATION = Generation(
    prompt="he is such a",
    emotion="anger",
    features=(3, 7),
    mode="add",
    amount=0.1,
    unit="residual_norm",
    temperature=0.7,
    seed=1,
    part="report",
    baseline_text=" nice guy",
    text=" <b>terrible</b> man",
    baseline_valence=0.4,
    valence=-0.5,
    baseline_nll=2.0,
    nll=2.5,
    degenerate=False,
    baseline_degenerate=False,
)
"""A steered continuation beside its baseline; tests change what they are about."""


def pytest_configure() -> None:
    """One thread for each of several processes: more would wait for each other. What they start inherits it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: with several processes a long one must not begin when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch with one thread: equal sums every time, and a process that is forked waits for no thread of its parent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sae_lens_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SAELens's tables and directory as the test found them, offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with (
        patch.dict(loaders.NAMED_PRETRAINED_SAE_LOADERS),
        patch.dict(loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS),
        patch.dict(get_pretrained_saes_directory()),
    ):
        yield


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """One token a word; unknown words are `<unk>`; BOS, EOS and padding have ids of their own."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        # Both keep TransformerLens from looking the tokenizer up by its name.
        name_or_path="tiny",
        add_bos_token=True,
    )


@pytest.fixture(scope="session")
def hooked_transformer(word_tokenizer: Any) -> Any:
    """A two-layer random HookedTransformer with learned positions."""
    config = transformer_lens.HookedTransformerConfig(
        n_layers=2,
        d_model=D_MODEL,
        n_ctx=64,
        d_head=16,
        n_heads=2,
        d_mlp=64,
        d_vocab=len(WORDS),
        act_fn="gelu",
        normalization_type="LN",
        seed=0,
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # still the model of most SAE code, and ours to support
        model = transformer_lens.HookedTransformer(config, tokenizer=word_tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Random weights hardly tell positions and words apart; larger ones make mistakes with either visible.
        for name, parameter in model.named_parameters():
            if name in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def bridge(word_tokenizer: Any) -> Any:
    """A two-layer random Gemma 3 of `transformers`, one layer with a sliding window, as a SAETransformerBridge."""
    from sae_emotion_plugin.models import load_model

    config = Gemma3TextConfig(
        vocab_size=len(WORDS),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=64,
        pad_token_id=VOCABULARY["<pad>"],
        bos_token_id=VOCABULARY["<bos>"],
        eos_token_id=VOCABULARY["<eos>"],
        tie_word_embeddings=False,
        initializer_range=0.3,
        architectures=["Gemma3ForCausalLM"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config)
    return load_model(model.eval(), tokenizer=word_tokenizer)


@pytest.fixture(scope="session")
def planted_sae() -> Any:
    """A TopK SAE (k 4) at `blocks.0.hook_resid_post` whose feature 7 reads and writes its own direction, "joy"."""
    return make_sae()


@pytest.fixture(scope="session")
def layer_norm_sae() -> Any:
    """The planted SAE on layer-normed activations, as OpenAI's are."""
    return make_sae(normalize_activations="layer_norm")


@pytest.fixture(scope="session")
def embedded() -> Any:
    """The embedded Gemma 3 270M, converted on the first use (a minute). For tests marked slow."""
    from sae_emotion_plugin.models import load_model

    return load_model("embedded")


def make_sae(normalize_activations: str = "none", hook_name: str = HOOK, d_in: int = D_MODEL) -> Any:
    config = sae_lens.TopKSAEConfig(
        d_in=d_in,
        d_sae=D_SAE,
        k=4,
        apply_b_dec_to_input=True,
        normalize_activations=normalize_activations,  # type: ignore[arg-type]
        rescale_acts_by_decoder_norm=False,
        metadata=SAEMetadata(hook_name=hook_name, model_name="tiny", context_size=32, prepend_bos=True),
    )
    sae = sae_lens.TopKSAE(config)
    generator = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(torch.randn(D_SAE, d_in, generator=generator), dim=-1)
    with torch.no_grad():
        # Rows of unequal length, so that a forgotten normalisation shows.
        lengths = torch.linspace(0.5, 2.0, D_SAE)[:, None]
        sae.W_dec.copy_(directions * lengths)
        sae.W_enc.copy_((directions / lengths).T)
        sae.b_enc.copy_(torch.rand(D_SAE, generator=generator) * 0.1)
        sae.b_dec.copy_(torch.randn(d_in, generator=generator) * 0.05)
    return sae.eval()


@pytest.fixture(scope="session")
def learned_positions(word_tokenizer: Any) -> Any:
    """A bridge to a random GPT-2, whose positions are learned, so that a wrong position shows."""
    from sae_emotion_plugin.models import load_model

    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=64,
        n_embd=D_MODEL,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["GPT2LMHeadModel"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    return load_model(model.eval(), tokenizer=word_tokenizer)


@pytest.fixture(params=["bridge", "learned_positions", "hooked_transformer"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


EMOTIONS = {"joy": 7, "anger": 21, "sadness": 40}
"""Each emotion and the feature that is planted for it."""
WORD = {"joy": "joy", "anger": "anger", "sadness": "sad"}


def labelled(each: int, seed: int, words: dict[str, str] = WORD, prefix: str = "t") -> LabelledTexts:
    """Different short texts; the emotion's word stands at the start, the middle or the end."""
    rng = np.random.default_rng(seed)
    texts, emotions = [], []
    for _ in range(each):
        for emotion, word in words.items():
            text = [f"w{n}" for n in rng.choice(50, size=5, replace=False)]
            text.insert(int(rng.integers(6)), word)
            texts.append(" ".join(text))
            emotions.append((emotion,))
    return LabelledTexts(tuple(texts), tuple(emotions), tuple(f"{prefix}{n}" for n in range(len(texts))), "en")


@pytest.fixture(scope="session")
def emotional_sae(bridge: Any) -> Any:
    """Three of its features read and write the direction that sets an emotion's word apart from other words."""
    tokens = torch.tensor([[VOCABULARY["<bos>"], token] for token in range(4, len(VOCABULARY))])
    with torch.inference_mode():
        vectors = bridge.run_with_cache(tokens)[1][canonical_hook(bridge, HOOK)][:, 1]
    vectors = vectors.clone()
    sae = make_sae()
    with torch.no_grad():
        sae.b_dec.copy_(vectors.mean(0))
        for emotion, feature in EMOTIONS.items():
            direction = vectors[VOCABULARY[WORD[emotion]] - 4] - vectors.mean(0)
            sae.W_dec[feature] = direction / direction.norm()
            sae.W_enc[:, feature] = 2 * direction / direction.norm()
            sae.b_enc[feature] = 0
    return sae
