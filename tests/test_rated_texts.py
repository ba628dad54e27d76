import json
from pathlib import Path
from typing import Any

import pytest

from sae_emotion_plugin.rated_texts import read_ratings


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_column_of_numbers_is_a_rating_and_names_and_numbers_of_texts_are_none(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "line": 1, "text": "a b", "V": 3, "A": 2.5, "category": "blog", "good": True},
        {"id": 8, "line": 2, "text": "c", "V": 1.5, "A": 4, "category": "news", "good": False},
    ]
    found = read_ratings(written(tmp_path, rows))
    assert found.texts == ("a b", "c") and len(found) == 2 and found.documents is None
    assert {name: values.tolist() for name, values in found.ratings.items()} == {"V": [3.0, 1.5], "A": [2.5, 4.0]}


def test_cells_are_read_as_numbers_and_documents_as_names(tmp_path: Path) -> None:
    path = tmp_path / "rated.csv"
    path.write_text("document,text,valence,arousal\nd1,one,3.5,2\nd1,two,-1e1,4\n", encoding="utf-8")
    found = read_ratings(path)
    assert found.documents == ("d1", "d1")
    assert found.ratings["valence"].tolist() == [3.5, -10.0]
    assert list(read_ratings(path, ["arousal"]).ratings) == ["arousal"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows"),
        ([{"text": "a", "label": "joy"}], "no ratings: the columns 'text', 'label'"),
        ([{"txt": "a", "V": 1}], "no column 'text'"),
        ([{"text": " ", "V": 1}], "line 1: the text is empty"),
        ([{"text": "a", "V": 1}, {"text": "b", "V": None}], "line 2: the rating 'V' is None, not a number"),
        ([{"text": "a", "V": 1}, {"text": "b"}], "line 2: the rating 'V' is None"),
        ([{"text": "a", "V": 1}, {"text": "b", "V": float("nan")}], "line 2: the rating 'V' is nan"),
        ([{"text": "a", "V": 1}, {"text": "b", "V": "high"}], "line 2: the rating 'V' is 'high'"),
    ],
)
def test_what_is_not_rated_is_refused_with_its_line(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_ratings(written(tmp_path, rows))


def test_a_column_that_is_not_there_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, [{"text": "a", "V": 1}])
    with pytest.raises(ValueError, match="the rating 'D' is None"):
        read_ratings(path, ["D"])
    with pytest.raises(FileNotFoundError, match="absent"):
        read_ratings(tmp_path / "absent.jsonl")
