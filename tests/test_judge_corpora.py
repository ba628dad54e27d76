import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from sae_emotion_plugin.judges.corpora import (
    BASIC_EMOTIONS,
    KOTE_LABELS,
    XED_EMOTIONS,
    only,
    read_emobank,
    read_kote,
    read_nsmc,
    read_xed,
)


def write_rows(folder: Path, file_name: str, rows: list[dict]) -> None:
    path = folder / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_xed_lines_have_valence_only_when_they_are_on_one_side(tmp_path: Path) -> None:
    labels = [["joy"], ["anger", "sadness"], ["joy", "fear"], ["surprise"], ["trust", "anticipation"]]
    write_rows(tmp_path, "xed_en/train.jsonl.gz", [{"text": f"t{n}", "label": one} for n, one in enumerate(labels)])
    found = read_xed(tmp_path)
    assert found.measures == (*XED_EMOTIONS, "valence") and found.texts == ("t0", "t1", "t2", "t3", "t4")
    assert found.targets[:, :-1].tolist() == [[emotion in one for emotion in XED_EMOTIONS] for one in labels]
    assert found.known[:, -1].tolist() == [True, True, False, False, True]
    assert found.targets[:, -1].tolist() == [True, False, False, False, True]
    assert found.known[:, :-1].all() and found.documents is None


def test_kote_labels_are_merged_by_the_table(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": ["기쁨", "감동/감탄"]},
        {"text": "b", "label": ["증오/혐오", "화남/분노", "불평/불만"]},
        {"text": "c", "label": ["없음"]},
    ]
    write_rows(tmp_path, "kote/val.jsonl.gz", rows)
    found = read_kote(tmp_path)
    named = [{name for name, has in zip(found.measures, row, strict=True) if has} for row in found.targets]
    assert named == [{"joy", "valence"}, {"anger", "disgust"}, set()]
    assert found.known[:, -1].tolist() == [True, True, False]


def test_no_kote_label_counts_as_two_emotions_and_each_has_its_reason() -> None:
    labels = [label for names in KOTE_LABELS.values() for label in names]
    assert len(set(labels)) == len(labels) and set(KOTE_LABELS) == set(BASIC_EMOTIONS)
    assert all(reason for names in KOTE_LABELS.values() for reason in names.values())


def test_nsmc_reviews_of_one_film_are_one_document(tmp_path: Path) -> None:
    rows = [
        {"text": str(n), "label": label, "movie_id": film}
        for n, (label, film) in enumerate([("positive", "9"), ("negative", "1"), ("negative", "9")])
    ]
    write_rows(tmp_path, "nsmc/train.jsonl.gz", rows)
    found = read_nsmc(tmp_path)
    assert found.targets[:, 0].tolist() == [True, False, False] and found.documents is not None
    assert found.documents[0] == found.documents[2] != found.documents[1]
    kept = only(found, np.array([2, 1]))
    assert kept.texts == ("2", "1") and kept.documents is not None and kept.sha256 == found.sha256


def test_emobank_sentences_near_neutral_have_no_valence(tmp_path: Path) -> None:
    write_rows(tmp_path, "emobank/train.jsonl.gz", [{"text": "a", "V": 3.5}, {"text": "b", "V": 2.5}])
    write_rows(tmp_path, "emobank/dev.jsonl.gz", [{"text": "c", "V": 3.49}])
    found = read_emobank(tmp_path)
    assert found.targets[:, 0].tolist() == [True, False, False]
    assert found.known[:, 0].tolist() == [True, True, False]


def test_the_hash_changes_with_a_text_and_with_a_label(tmp_path: Path) -> None:
    hashes = set()
    for text, label in [("a", ["joy"]), ("b", ["joy"]), ("a", ["anger"])]:
        write_rows(tmp_path, "xed_en/train.jsonl.gz", [{"text": text, "label": label}])
        hashes.add(read_xed(tmp_path).sha256)
    assert len(hashes) == 3


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no xed_en/train\.jsonl\.gz in"):
        read_xed(tmp_path)
