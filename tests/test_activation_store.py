import itertools
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import HOOK, WORDS

from sae_emotion_plugin import activation_store
from sae_emotion_plugin.activation_store import ActivationStore, collect, content_key, prefetched
from sae_emotion_plugin.activations import activation_batches
from sae_emotion_plugin.recipes import TextSource, TrainingRecipe

RECIPE = TrainingRecipe(
    name="tiny-emotion",
    sae_id="layer-0",
    model="tiny",
    hook_name=HOOK,
    texts=(TextSource("unread.jsonl"),),
    d_sae=64,
    k=4,
    epochs=1.0,
    lr=0.01,
    context_size=16,
)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_store, "SHARD_TOKENS", 300)


def test_activations_come_back_whole_and_each_once_an_epoch(bridge: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[4:], size=rng.integers(2, 12))) for _ in range(142)]
    store = collect(RECIPE, bridge, texts, tmp_path, False)
    assert len(store.shards) > 2
    expected = torch.cat([b.vectors for b in activation_batches(bridge, texts, HOOK, context_size=16, progress=False)])
    assert len(store) == len(expected) == sum(len(text.split()) for text in texts)
    everything = store.rows(np.arange(len(store)))
    torch.testing.assert_close(everything.sum(0), expected.sum(0), atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(everything.norm(dim=-1).sort()[0], expected.norm(dim=-1).sort()[0], atol=1e-4, rtol=1e-4)
    wanted = np.array([700, 3, 299, 300])
    assert torch.equal(store.rows(wanted), everything[np.sort(wanted)])


def plain_store(folder: Path, n: int = 20) -> ActivationStore:
    """Row i holds the number i."""
    np.save(folder / "0.npy", np.arange(0, 8, dtype=np.float32)[:, None])
    np.save(folder / "1.npy", np.arange(8, n, dtype=np.float32)[:, None])
    return ActivationStore([folder / "0.npy", folder / "1.npy"], "key")


def test_an_epoch_shows_each_token_once_in_an_order_of_the_seed(tmp_path: Path) -> None:
    store = plain_store(tmp_path)

    def epochs(seed: int, first_step: int = 0) -> list[list[float]]:
        batches = store.batches(5, seed, first_step)
        return [next(batches)[:, 0].tolist() for _ in range(8 - first_step)]

    found = epochs(0)
    for epoch in (found[:4], found[4:]):
        assert sorted(token for batch in epoch for token in batch) == list(range(20))
    assert found[:4] != found[4:] and found != epochs(1) and found == epochs(0)
    for step in (3, 4, 6):
        assert epochs(0, step) == found[step:]


def test_a_text_longer_than_shards_is_collected_whole(bridge: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS[4:], size=700)), "he is joy", " ".join(rng.choice(WORDS[4:], size=650))]
    store = collect(RECIPE, bridge, texts, tmp_path, False)
    assert len(store) == 1353


def test_shards_that_are_there_are_kept_and_other_texts_get_their_own(
    bridge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(WORDS[4:44])] * 20
    first = collect(RECIPE, bridge, texts, tmp_path, False)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(files) == len(first.shards) == 3
    other = collect(RECIPE, bridge, ["he is joy", *texts[1:]], tmp_path, False)
    assert other.key != first.key and len(other) == len(first) - 37

    def read_again(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("the activations were collected before")

    monkeypatch.setattr(activation_store, "activation_batches", read_again)
    again = collect(RECIPE, bridge, texts, tmp_path, False)
    assert again.key == first.key and torch.equal(again.rows(np.arange(800)), first.rows(np.arange(800)))
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_the_key_of_kept_things_tells_their_parts_apart() -> None:
    assert content_key("a", ["b"]) == content_key("a", ["b"])
    assert len({content_key("a", ["b"]), content_key(["a"], "b"), content_key("ab"), content_key("a", ["c"])}) == 4


def test_prefetched_items_come_in_their_order_with_the_error_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("after five")

    seen = []
    with pytest.raises(ValueError, match="after five"):
        for item in prefetched(items()):
            seen.append(item)
    assert seen == list(range(5))
    assert list(prefetched(iter([]))) == [] and list(prefetched(iter([None, 1]), ahead=5)) == [None, 1]


def test_items_are_read_ahead_but_not_far_and_no_thread_is_left() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in itertools.count():
            read.append(item)
            yield item

    before = threading.active_count()
    found = prefetched(items(), ahead=2)
    assert next(found) == 0 and next(found) == 1
    while len(read) < 4:
        time.sleep(0.001)
    time.sleep(0.02)
    assert read == [0, 1, 2, 3]
    cast("Generator[int]", found).close()
    assert threading.active_count() == before


def test_activations_that_the_disk_has_no_room_for_are_refused_at_the_first_shard(
    bridge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_store, "SHARD_TOKENS", 50)
    monkeypatch.setattr(activation_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"need another 0\.0 GB in .* are free: choose a work folder on another disk"):
        collect(RECIPE, bridge, ["he is such a joy"] * 30, tmp_path, progress=False)
    assert not list(tmp_path.glob("*/*"))
