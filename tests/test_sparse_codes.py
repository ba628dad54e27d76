import dataclasses
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import scipy.sparse
import torch
from conftest import D_MODEL, D_SAE, HOOK, JOY, VOCABULARY, make_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import SAEMetadata
from transformers import Gemma3ForCausalLM

from sae_emotion_plugin import code_files, models, sparse_codes
from sae_emotion_plugin.activations import activation_batches, canonical_hook
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.models import load_model
from sae_emotion_plugin.sparse_codes import (
    SparseCodes,
    checked_hook,
    codes_key,
    encode_texts,
    encode_vectors,
    open_codes,
    token_settings,
)

TEXTS = ("he is joy", "", "sad fear anger w1 w2 w3", "a", "he is such a w9", "w7 w7")
POOLINGS = ("max", "mean", "last", "sum")


def random_sae(config: Any, kind: Any, seed: int = 3) -> Any:
    """An SAE whose features fire on a part of the tokens, with weights of our own."""
    sae = kind(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.abs() * 0.3 if name == "threshold" else values * (0.3 if values.ndim > 1 else 0.1))
    return sae.eval()


def metadata(**changes: Any) -> SAEMetadata:
    return SAEMetadata(**{"hook_name": HOOK, "model_name": "tiny", "context_size": 32, "prepend_bos": True, **changes})


def batch_topk() -> Any:
    """A trained BatchTopK SAE is used as a JumpReLU SAE, with the threshold that training found."""
    trained = random_sae(
        sae_lens.BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4, metadata=metadata()),
        sae_lens.BatchTopKTrainingSAE,
    )
    trained.topk_threshold.fill_(0.8)
    state = trained.state_dict()
    trained.process_state_dict_for_saving_inference(state)
    config = sae_lens.JumpReLUSAEConfig.from_dict(trained.cfg.get_inference_sae_cfg_dict())
    sae = sae_lens.JumpReLUSAE(config)
    sae.load_state_dict(state)
    return sae.eval()


SAES: dict[str, Callable[[], Any]] = {
    "topk": make_sae,
    "layer_norm_topk": lambda: make_sae("layer_norm"),
    "rescaled_topk": lambda: random_sae(
        sae_lens.TopKSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=3, rescale_acts_by_decoder_norm=True, metadata=metadata()),
        sae_lens.TopKSAE,
    ),
    "relu": lambda: random_sae(
        sae_lens.StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata()), sae_lens.StandardSAE
    ),
    "jumprelu": lambda: random_sae(
        sae_lens.JumpReLUSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata()), sae_lens.JumpReLUSAE
    ),
    "batchtopk": batch_topk,
}


def dense(codes: SparseCodes) -> np.ndarray:
    """The codes as a plain table, filled in entry by entry."""
    table = np.zeros((codes.n_tokens, codes.d_sae), dtype=np.float32)
    for token in range(codes.n_tokens):
        for entry in range(codes.row_starts[token], codes.row_starts[token + 1]):
            table[token, codes.features[entry]] = codes.values[entry]
    return table


def pooled_by_loop(codes: SparseCodes, pooling: str) -> np.ndarray:
    table = np.zeros((codes.n_texts, codes.d_sae))
    for text in range(codes.n_texts):
        rows = dense(codes)[codes.text_index == text].astype(np.float64)
        if len(rows):
            table[text] = {"max": rows.max(0), "mean": rows.mean(0), "last": rows[-1], "sum": rows.sum(0)}[pooling]
    return table


@st.composite
def random_codes(draw: st.DrawFn) -> SparseCodes:
    """Any codes at all: texts without tokens, tokens without features, features that never fire."""
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    d_sae = draw(st.integers(1, 5))
    rows = [draw(st.sets(st.integers(0, d_sae - 1))) for _ in range(sum(lengths))]
    features = [feature for row in rows for feature in draw(st.permutations(sorted(row)))]
    value = st.floats(0.015625, 1000, width=32)
    values = draw(st.lists(value, min_size=len(features), max_size=len(features)))
    return SparseCodes(
        values=np.array(values, dtype=np.float32),
        features=np.array(features, dtype=np.int32),
        row_starts=np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64),
        text_index=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        token_ids=np.arange(len(rows)).astype(np.int32),
        n_texts=len(lengths),
        d_sae=d_sae,
        hook_name=HOOK,
    )


def assert_equal(ours: SparseCodes, theirs: SparseCodes) -> None:
    for name in ("values", "features", "row_starts", "text_index", "token_ids"):
        first, second = getattr(ours, name), getattr(theirs, name)
        assert first.dtype == second.dtype, name
        np.testing.assert_array_equal(first, second, err_msg=name)
    assert (ours.n_texts, ours.d_sae, ours.hook_name) == (theirs.n_texts, theirs.d_sae, theirs.hook_name)


@pytest.fixture(params=list(SAES))
def any_sae(request: pytest.FixtureRequest) -> Any:
    return SAES[request.param]()


@pytest.fixture(scope="module")
def codes(bridge: Any, planted_sae: Any) -> SparseCodes:
    return encode_texts(bridge, planted_sae, TEXTS, progress=False)


@pytest.mark.parametrize("name", ["bridge", "hooked_transformer"])
def test_codes_equal_sae_lens_encode_at_the_same_batch_shape(
    name: str, any_sae: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    found = encode_texts(model, any_sae, TEXTS, progress=False)
    expected = np.zeros((found.n_tokens, D_SAE), dtype=np.float32)
    start = np.searchsorted(found.text_index, np.arange(len(TEXTS)))
    for batch in activation_batches(model, TEXTS, HOOK, context_size=32, progress=False):
        with torch.inference_mode():
            encoded = any_sae.encode(batch.vectors).numpy()
        expected[start[batch.text_index] + batch.position] = encoded
    assert expected.any() and not expected.all()
    np.testing.assert_allclose(dense(found), expected, atol=1e-5)
    assert np.array_equal(dense(found) > 0, expected > 0)


def test_codes_stand_in_text_order_without_bos_and_padding(codes: SparseCodes) -> None:
    words = [(index, VOCABULARY[word]) for index, text in enumerate(TEXTS) for word in text.split()]
    assert list(zip(codes.text_index.tolist(), codes.token_ids.tolist(), strict=True)) == words
    assert codes.n_texts == len(TEXTS) and codes.n_tokens == len(words)
    assert np.array_equal(np.diff(codes.row_starts), np.full(len(words), 4))
    assert (codes.values > 0).all()


def test_a_planted_direction_fires_its_feature(planted_sae: Any) -> None:
    row = planted_sae.W_dec[JOY].detach()
    vectors = torch.stack([planted_sae.b_dec.detach() + 5 * row, planted_sae.b_dec.detach() - 5 * row])
    values, features, counts = encode_vectors(planted_sae, vectors)
    first = dict(zip(features[: counts[0]].tolist(), values[: counts[0]].tolist(), strict=True))
    assert max(first, key=lambda feature: first[feature]) == JOY
    assert first[JOY] == pytest.approx(5 + planted_sae.b_enc[JOY].item(), abs=1e-5)
    assert JOY not in features[counts[0] :]


def test_labelled_texts_are_encoded_as_their_texts(bridge: Any, planted_sae: Any, codes: SparseCodes) -> None:
    texts = tuple(text or "joy" for text in TEXTS)
    labelled = LabelledTexts(texts, ((),) * len(texts), tuple("abcdef"))
    assert_equal(
        encode_texts(bridge, planted_sae, labelled, progress=False),
        encode_texts(bridge, planted_sae, list(texts), progress=False),
    )


def test_the_saes_metadata_decide_on_bos_and_context(bridge: Any) -> None:
    sae = make_sae()
    sae.cfg.metadata.prepend_bos = False
    sae.cfg.metadata.context_size = 2
    found = encode_texts(bridge, sae, TEXTS, progress=False)
    assert found.n_tokens == sum(len(text.split()) for text in TEXTS)
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(torch.tensor([[VOCABULARY["joy"]]]))
        alone = sae.encode(cache[canonical_hook(bridge, HOOK)][0]).numpy()
    # "he is joy" in windows of two tokens leaves "joy" alone.
    np.testing.assert_allclose(dense(found)[[2]], alone, atol=1e-4)
    sae.cfg.metadata.prepend_bos = None
    sae.cfg.metadata.context_size = None
    assert token_settings(sae) == {"context_size": 128, "prepend_bos": True}
    sae.cfg.metadata.context_size = 8192
    assert token_settings(sae)["context_size"] == 512


def test_an_sae_on_attention_heads_reads_flat_vectors_and_is_left_folding(hooked_transformer: Any) -> None:
    sae = make_sae(hook_name="blocks.0.attn.hook_z")
    flat = encode_texts(hooked_transformer, sae, TEXTS, progress=False)
    sae.cfg.reshape_activations = "hook_z"
    sae.turn_on_forward_pass_hook_z_reshaping()
    assert_equal(encode_texts(hooked_transformer, sae, TEXTS, progress=False), flat)
    assert sae.hook_z_reshaping_mode


@given(random_codes(), st.sampled_from(POOLINGS))
@settings(max_examples=60, deadline=None)
def test_pooling_equals_a_dense_loop(codes: SparseCodes, pooling: Any) -> None:
    found = codes.pooled(pooling)
    assert isinstance(found, scipy.sparse.csr_matrix) and found.dtype == np.float32
    assert found.shape == (codes.n_texts, codes.d_sae)
    np.testing.assert_allclose(found.toarray(), pooled_by_loop(codes, pooling), rtol=1e-6)


def test_a_text_with_tokens_in_which_nothing_fires_pools_to_zero() -> None:
    empty = np.zeros(0, dtype=np.int32)
    silent = SparseCodes(
        values=np.zeros(0, dtype=np.float32),
        features=empty,
        row_starts=np.zeros(3, dtype=np.int64),
        text_index=np.array([1, 1], dtype=np.int32),
        token_ids=np.array([4, 5], dtype=np.int32),
        n_texts=3,
        d_sae=2,
        hook_name=HOOK,
    )
    for pooling in POOLINGS:
        assert silent.pooled(pooling).shape == (3, 2) and silent.pooled(pooling).nnz == 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pooling_a_few_texts_at_a_time_changes_nothing(
    size: int, codes: SparseCodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [codes.pooled(pooling) for pooling in POOLINGS]
    monkeypatch.setattr(sparse_codes, "POOLED_TEXTS", size)
    for pooling, expected in zip(POOLINGS, whole, strict=True):
        found = codes.pooled(pooling)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_array_equal(found.toarray(), expected.toarray())
    assert codes.select_texts([]).pooled("max").shape == (0, D_SAE)


def test_an_unknown_pooling_is_refused_with_the_valid_ones(codes: SparseCodes) -> None:
    bad: Any = "median"
    with pytest.raises(Exception, match=r"(?s)median") as error:
        codes.pooled(bad)
    # Without the shape checks of the tests the message is ours.
    with pytest.raises(ValueError, match=r"unknown pooling 'median' \(valid: max, mean, last, sum\)"):
        unchecked(SparseCodes.pooled)(codes, bad)
    assert error


def unchecked(function: Any) -> Any:
    """The function itself, beneath the type checks that the test run puts around it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@given(random_codes(), st.data())
@settings(max_examples=40, deadline=None)
def test_selecting_texts_keeps_each_texts_rows(codes: SparseCodes, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, codes.n_texts - 1), max_size=8))
    found = codes.select_texts(chosen)
    rows = [np.flatnonzero(codes.text_index == text) for text in chosen]
    tokens = np.concatenate([*rows, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    np.testing.assert_array_equal(dense(found), dense(codes)[tokens])
    np.testing.assert_array_equal(found.token_ids, codes.token_ids[tokens])
    np.testing.assert_array_equal(found.text_index, np.repeat(np.arange(len(chosen)), [len(row) for row in rows]))
    assert found.n_texts == len(chosen)


def test_selecting_texts_equals_encoding_them_alone(bridge: Any, planted_sae: Any, codes: SparseCodes) -> None:
    chosen = [4, 1, 0, 4]
    found = codes.select_texts(np.array(chosen))
    alone = encode_texts(bridge, planted_sae, [TEXTS[index] for index in chosen], progress=False)
    for name in ("features", "row_starts", "text_index", "token_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))
    np.testing.assert_allclose(found.values, alone.values, atol=1e-5)


@pytest.mark.parametrize("indices", [[6], [-1], [0, 99]])
def test_selecting_a_text_that_is_not_there_is_refused(codes: SparseCodes, indices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"valid: 0 to 5"):
        codes.select_texts(indices)


def test_one_feature_of_one_text_is_read_token_by_token(codes: SparseCodes) -> None:
    feature = int(codes.features[-1])
    tokens, values = codes.of_text(5, feature)
    assert tokens.tolist() == [VOCABULARY["w7"]] * 2
    np.testing.assert_array_equal(values, dense(codes)[-2:, feature])
    assert values[-1] > 0
    assert codes.of_text(1, feature)[0].tolist() == []


@given(codes=random_codes())
@settings(max_examples=15, deadline=None)
def test_saved_codes_load_bit_by_bit(codes: SparseCodes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("codes") / "codes.jsonl"
    codes.save(path)
    assert_equal(SparseCodes.load(path), codes)
    assert [file.name for file in path.parent.iterdir()] == ["codes.jsonl"]


@pytest.mark.parametrize("content", ["", "{}\n", "not json\n", '{"n_texts": 1, "d_sae": 2, "hook_name": "a"}\n{}\n'])
def test_a_file_that_holds_no_codes_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "codes.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"codes\.jsonl holds no codes") as error:
        SparseCodes.load(tmp_path / "codes.jsonl")
    assert "\n" not in str(error.value)


def test_the_table_and_the_summary_show_what_fires(codes: SparseCodes) -> None:
    frame = codes.to_pandas()
    assert list(frame.columns) == ["text", "token", "token_id", "feature", "value"]
    assert len(frame) == len(codes.values)
    table = np.zeros_like(dense(codes))
    table[frame["token"], frame["feature"]] = frame["value"]
    np.testing.assert_array_equal(table, dense(codes))
    assert frame["text"].tolist() == codes.text_index[frame["token"]].tolist()
    assert repr(codes) == f"SparseCodes(6 texts, 17 tokens, 64 features at {HOOK}, L0 4.0)"


def test_never_more_than_a_chunk_is_dense(bridge: Any, monkeypatch: pytest.MonkeyPatch, codes: SparseCodes) -> None:
    sae = make_sae()
    sizes: list[tuple[int, ...]] = []
    encode = sae.encode

    def spy(vectors: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(vectors.shape))
        return encode(vectors)

    monkeypatch.setattr(sae, "encode", spy)
    monkeypatch.setattr(sparse_codes, "is_plain_topk", lambda sae: False)
    monkeypatch.setattr(sparse_codes, "CHUNK_ENTRIES", 3 * D_SAE)
    found = encode_texts(bridge, sae, TEXTS, progress=False)
    assert len(sizes) >= 6 and all(rows <= 3 and width == D_MODEL for rows, width in sizes)
    assert sum(rows for rows, _ in sizes) == found.n_tokens
    np.testing.assert_allclose(dense(found), dense(codes), atol=1e-5)


class CountedPasses:
    """The model's forward passes since the last look, without those of the check that SAE and model fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: list[int] = []
        self.fail_at: int | None = None
        real = sparse_codes._encode_block

        def encode_block(model: Any, sae: Any, texts: Sequence[str], *rest: Any, **named: Any) -> Any:
            if self.fail_at is not None and len(self.blocks) >= self.fail_at:
                raise KeyboardInterrupt
            self.blocks.append(len(texts))
            return real(model, sae, texts, *rest, **named)

        monkeypatch.setattr(sparse_codes, "_encode_block", encode_block)

    def taken(self) -> list[int]:
        blocks, self.blocks = self.blocks, []
        return blocks


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> CountedPasses:
    monkeypatch.setattr(code_files, "BLOCK_TEXTS", 2)
    return CountedPasses(monkeypatch)


def forward_calls(model: Any) -> tuple[list[int], Any]:
    calls: list[int] = []
    return calls, model.register_forward_pre_hook(lambda module, arguments: calls.append(1))


def test_a_second_run_with_the_cache_only_reads(
    bridge: Any, planted_sae: Any, codes: SparseCodes, passes: CountedPasses, tmp_path: Path
) -> None:
    calls, handle = forward_calls(bridge)
    try:
        first = encode_texts(bridge, planted_sae, TEXTS, cache=tmp_path, progress=False)
        assert passes.taken() == [2, 2, 2] and len(calls) > 3
        calls.clear()
        second = encode_texts(bridge, planted_sae, TEXTS, cache=tmp_path, progress=False)
        # The one pass is the check that the SAE fits the model.
        assert passes.taken() == [] and len(calls) == 1
    finally:
        handle.remove()
    assert_equal(second, first)
    for name in ("features", "row_starts", "text_index", "token_ids"):
        np.testing.assert_array_equal(getattr(first, name), getattr(codes, name))
    np.testing.assert_allclose(first.values, codes.values, atol=1e-5)
    # The blocks are one file now.
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["codes.safetensors", "manifest.json"]
    assert all(is_mapped(getattr(first, name)) for name in ("values", "features", "text_index", "token_ids"))


def test_an_interrupted_run_goes_on_behind_its_last_block(
    bridge: Any, planted_sae: Any, codes: SparseCodes, passes: CountedPasses, tmp_path: Path
) -> None:
    passes.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        encode_texts(bridge, planted_sae, TEXTS, cache=tmp_path, progress=False)
    assert passes.taken() == [2, 2]
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(files) == ["00000000.safetensors", "00000002.safetensors", "manifest.json"]
    with pytest.raises(ValueError, match=r"are not complete: encode the same texts with this cache to go on"):
        open_codes(tmp_path / codes_key(bridge, planted_sae, TEXTS))
    passes.fail_at = None
    resumed = encode_texts(bridge, planted_sae, TEXTS, cache=tmp_path, progress=False)
    assert passes.taken() == [2]
    np.testing.assert_allclose(dense(resumed), dense(codes), atol=1e-5)


def test_a_write_that_fails_leaves_no_part_of_a_block(
    bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(code_files.os, "fsync", fsync)
    with pytest.raises(OSError, match="no space left"):
        encode_texts(bridge, planted_sae, TEXTS, cache=tmp_path, progress=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["manifest.json"]


@pytest.mark.parametrize("damage", ["cut", "longer", "another's", "not a header", "empty"])
def test_a_damaged_block_is_encoded_anew_with_a_warning(
    bridge: Any,
    planted_sae: Any,
    codes: SparseCodes,
    passes: CountedPasses,
    damage: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    passes.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        encode_texts(bridge, planted_sae, TEXTS, cache=tmp_path, progress=False)
    passes.fail_at, _ = None, passes.taken()
    first, second = sorted(tmp_path.rglob("*.safetensors"))
    content = second.read_bytes()
    second.write_bytes(
        {
            "cut": content[:-4],
            "longer": content + b"\0\0\0\0",
            "another's": first.read_bytes(),
            "not a header": b"\xff" * len(content),
            "empty": b"",
        }[damage]
    )
    found = encode_texts(bridge, planted_sae, TEXTS, cache=tmp_path, progress=False)
    assert passes.taken() == [2, 2]
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "00000002.safetensors is damaged or of other codes" in message and message.endswith("encoded anew")
    assert "\n" not in message
    np.testing.assert_allclose(dense(found), dense(codes), atol=1e-5)


def test_damaged_codes_that_were_complete_are_encoded_anew(
    bridge: Any, planted_sae: Any, passes: CountedPasses, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = encode_texts(bridge, planted_sae, TEXTS, cache=tmp_path, progress=False)
    kept = dense(first)
    folder = tmp_path / codes_key(bridge, planted_sae, TEXTS)
    content = (folder / "codes.safetensors").read_bytes()
    # A new file, as a broken copy would be: the old one is still mapped.
    (folder / "codes.safetensors").unlink()
    (folder / "codes.safetensors").write_bytes(content[: len(content) // 2])
    passes.taken()
    with pytest.raises(ValueError, match=r"codes\.safetensors is damaged or of other codes"):
        open_codes(folder)
    found = encode_texts(bridge, planted_sae, TEXTS, cache=tmp_path, progress=False)
    assert passes.taken() == [2, 2, 2] and "encoded anew" in caplog.text
    np.testing.assert_array_equal(dense(found), kept)
    assert_equal(open_codes(folder), found)


def is_mapped(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def test_kept_codes_are_opened_without_model_and_sae(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    kept = encode_texts(bridge, planted_sae, TEXTS, cache=tmp_path, progress=False)
    key = codes_key(bridge, planted_sae, TEXTS)
    found = open_codes(tmp_path / key, key)
    assert_equal(found, kept)
    assert is_mapped(found.values) and is_mapped(found.features)
    with pytest.raises(ValueError, match=rf"holds the codes {key}, of another model, SAE or texts than 0123$"):
        open_codes(tmp_path / key, "0123")
    with pytest.raises(ValueError, match=r"is no store of codes: manifest\.json is missing or damaged"):
        open_codes(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_codes(tmp_path / "nowhere")


@given(codes=random_codes())
@settings(max_examples=25, deadline=None)
def test_memory_mapped_codes_are_pooled_selected_and_shown_as_others(
    codes: SparseCodes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("codes") / "codes.safetensors"
    columns = code_files.CodeColumns(
        codes.values, codes.features, np.diff(codes.row_starts).astype(np.int32), codes.text_index, codes.token_ids
    )
    code_files.write_columns(path, [columns], [0], {"of": "a test"})
    content = path.read_bytes()
    read = code_files.read_columns(path, {"of": "a test"})
    mapped = dataclasses.replace(
        codes, values=read.values, features=read.features, text_index=read.text, token_ids=read.token_ids
    )
    for pooling in POOLINGS:
        np.testing.assert_array_equal(mapped.pooled(pooling).toarray(), codes.pooled(pooling).toarray())
    everything = list(range(codes.n_texts))
    assert_equal(mapped.select_texts(everything), codes.select_texts(everything))
    assert mapped.to_pandas().equals(codes.to_pandas())
    np.testing.assert_array_equal(mapped.matrix().T.tocsr().toarray(), codes.matrix().T.toarray())
    # Sorting the entries of a row, as scipy does on its own, stays in this process.
    mapped.matrix().sort_indices()
    assert path.read_bytes() == content


def test_texts_that_were_split_are_warned_of_once_an_encoding(
    bridge: Any, passes: CountedPasses, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sae = make_sae()
    sae.cfg.metadata.context_size = 3
    message = "2 of 6 texts are longer than the 2 tokens of the SAE's context: they were split"
    for cache in (None, tmp_path, tmp_path):
        caplog.clear()
        encode_texts(bridge, sae, (*TEXTS[:4], "w1", "w2 w3 w4"), cache=cache, progress=False)
        assert [record.getMessage()[: len(message)] for record in caplog.records if record.levelname == "WARNING"] == [
            message.replace("2 of", "3 of", 1)
        ]
    caplog.clear()
    encode_texts(bridge, make_sae(), TEXTS, progress=False)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_other_texts_another_sae_or_another_model_are_encoded_anew(
    bridge: Any, planted_sae: Any, word_tokenizer: Any, passes: CountedPasses, tmp_path: Path
) -> None:
    def run(model: Any = bridge, sae: Any = planted_sae, texts: Sequence[str] = TEXTS) -> list[int]:
        encode_texts(model, sae, texts, cache=tmp_path, progress=False)
        return passes.taken()

    assert run() == [2, 2, 2]
    assert run(texts=(*TEXTS[:-1], "w7 w8")) == [2, 2, 2]
    other = make_sae()
    with torch.no_grad():
        other.b_enc[0] += 0.01
    assert run(sae=other) == [2, 2, 2]
    shorter = make_sae()
    shorter.cfg.metadata.context_size = 3
    assert run(sae=shorter) == [2, 2, 2]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        namesake = load_model(Gemma3ForCausalLM(bridge.original_model.config).eval(), tokenizer=word_tokenizer)
    assert run(model=namesake) == [2, 2, 2]
    assert run(sae=make_sae()) == []


@pytest.mark.parametrize("texts", [[], ()])
def test_an_empty_list_is_refused(bridge: Any, planted_sae: Any, texts: Any) -> None:
    with pytest.raises(ValueError, match="no texts to encode: the list is empty"):
        encode_texts(bridge, planted_sae, texts)


def test_a_single_string_is_refused(bridge: Any, planted_sae: Any) -> None:
    with pytest.raises(ValueError, match="texts must be a list of strings, not one string"):
        encode_texts(bridge, planted_sae, "he is joy")


def test_texts_without_any_token_are_refused(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    for cache in (None, tmp_path):
        with pytest.raises(ValueError, match="no tokens to encode: every text is empty"):
            encode_texts(bridge, planted_sae, ["", " "], cache=cache, progress=False)


@pytest.mark.parametrize("name", ["bridge", "hooked_transformer"])
def test_an_sae_of_another_width_is_refused_with_both_widths(name: str, request: pytest.FixtureRequest) -> None:
    message = f"the SAE reads 24 dimensions, the model has {D_MODEL} at {HOOK}"
    with pytest.raises(ValueError, match=message):
        encode_texts(request.getfixturevalue(name), make_sae(d_in=24), TEXTS)


def test_an_sae_of_another_model_is_warned_of_once_and_an_unknown_name_is_not(
    bridge: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(models, "_warned", set())
    monkeypatch.setattr(models, "model_identity", lambda model: {"name": "google/gemma-3-270m"})
    for trained_on in ("gemma-3-270m", "my/own-model", "gpt2-small", "gpt2", ""):
        sae = make_sae()
        sae.cfg.metadata.model_name = trained_on
        checked_hook(bridge, sae)
    (record,) = caplog.records
    assert record.message == (
        "the SAE was trained on gpt2, the model is google/gemma-3-270m: its features may mean something else"
    )


def test_a_transcoder_is_refused_with_both_its_hooks(bridge: Any) -> None:
    config = sae_lens.TranscoderConfig(
        d_in=D_MODEL,
        d_out=D_MODEL,
        d_sae=D_SAE,
        apply_b_dec_to_input=False,
        metadata=metadata(hook_name="blocks.0.ln2.hook_normalized", hook_name_out="blocks.0.hook_mlp_out"),
    )
    message = r"transcoder reads blocks.0.ln2.hook_normalized and writes blocks.0.hook_mlp_out: only SAEs that"
    with pytest.raises(ValueError, match=message):
        checked_hook(bridge, sae_lens.Transcoder(config))


def test_an_sae_whose_hook_is_missing_or_unnamed_is_refused(bridge: Any) -> None:
    with pytest.raises(ValueError, match=r"no hook 'blocks.7.hook_resid_post' .valid: blocks.0"):
        encode_texts(bridge, make_sae(hook_name="blocks.7.hook_resid_post"), TEXTS)
    with pytest.raises(ValueError, match="names no hook"):
        encode_texts(bridge, make_sae(hook_name=""), TEXTS)
