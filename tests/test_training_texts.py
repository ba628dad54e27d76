import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from sae_emotion_plugin.recipes import TextSource
from sae_emotion_plugin.training import texts
from sae_emotion_plugin.training.texts import fetch

SOURCE = TextSource("ko.jsonl", dataset="owner/texts", revision="abc123", columns=("question", "answer"), rows=2)
ROWS = [
    {"question": "왜?", "answer": " 그래서. "},
    {"question": "who", "answer": None},
    {"question": "x", "answer": "y"},
]


def test_a_data_set_is_written_once_row_by_row_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    path = tmp_path / "texts" / "ko.jsonl"
    fetch(SOURCE, path)
    assert asked == [("owner/texts", {"split": "train", "revision": "abc123", "streaming": True})]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"text": "왜?\n그래서."}, {"text": "who"}]
    assert [one.name for one in path.parent.iterdir()] == ["ko.jsonl"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("no route\nto host"),
            r"'owner/texts' cannot be reached \(ConnectionError: no route\): put its",
        ),
        (FileNotFoundError("nothing there"), r"cannot be reached \(FileNotFoundError: nothing there\)"),
        (KeyError("answer"), "has no column 'answer'"),
    ],
)
def test_a_data_set_out_of_reach_says_so_and_offers_local_files(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=message) as raised:
        fetch(SOURCE, tmp_path / "ko.jsonl")
    assert f"put its texts at {tmp_path / 'ko.jsonl'}" in str(raised.value) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_row_without_a_column_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"question": "x"}]))
    with pytest.raises(ValueError, match="the data set 'owner/texts' has no column 'answer'"):
        fetch(SOURCE, tmp_path / "ko.jsonl")


def test_a_data_set_without_any_text_writes_no_file_that_would_stand_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"question": " ", "answer": None}]))
    with pytest.raises(ValueError, match="'owner/texts' has no text in question, answer: put its texts at"):
        fetch(SOURCE, tmp_path / "ko.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_needs_a_name_that_holds_lines(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ko\.txt is to hold a data set \(valid: a name that ends in \.jsonl\)"):
        fetch(TextSource("ko.txt", dataset="owner/texts"), tmp_path / "ko.txt")


@pytest.mark.parametrize("name", ["../private", "/home/me", ".", "a/b/c", "hf://owner/texts", "private", "own/er"])
def test_a_data_set_is_of_the_hub_and_no_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("a folder was read"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private").mkdir()
    (tmp_path / "own" / "er").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is no data set of the Hub \(valid: owner/name\): put its texts at"):
        fetch(TextSource("ko.jsonl", dataset=name), tmp_path / "ko.jsonl")
    assert not (tmp_path / "ko.jsonl").exists()


def test_local_texts_are_taken_before_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_training import RECIPE

    def fetched(*_: Any) -> None:
        raise AssertionError("there are local texts")

    monkeypatch.setattr(texts, "fetch", fetched)
    (tmp_path / "ko.jsonl").write_text("".join(json.dumps({"text": f"w{n}"}) + "\n" for n in range(9)))
    from dataclasses import replace

    training, held_out, record = texts.recipe_documents(replace(RECIPE, texts=(SOURCE,)), None, tmp_path)
    assert len(training) + len(held_out) == 9 and record[0]["dataset"] == "owner/texts"
