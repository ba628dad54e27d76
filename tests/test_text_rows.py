import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_emotion_plugin.text_rows import Columns, file_rows, labelled_rows

GOOD = '{"text": "fine", "label": "joy"}\n'


def read(path: Path, columns: Columns | None = None) -> Any:
    rows, cells = file_rows(path)
    if columns is None:
        columns = Columns(cells=cells)
    return labelled_rows(rows, str(path), columns)


def read_labels(path: Path, **options: Any) -> list[tuple[str, ...]]:
    return list(read(path, Columns(cells=file_rows(path)[1], **options))[1])


def labels_of(values: list[Any], column: str = "label", **options: Any) -> list[tuple[str, ...]]:
    rows = [(f"row {n}", {"text": "x", column: value}) for n, value in enumerate(values)]
    return list(labelled_rows(rows, "the rows", Columns(**options))[1])


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b'{"text": "a", "label": "joy"\n', "line 3: not JSON .*delimiter"),
        (b"[1, 2]\n", r"line 3: not a JSON object but \[1, 2\]"),
        (b'{"label": "joy"}\n', "line 3: no column 'text'; it has 'label'"),
        (b'{"text": "a"}\n', "line 3: no column 'label'; it has 'text'"),
        (b'{"text": " \\n", "label": "joy"}\n', "line 3: the text is empty"),
        (b'{"text": null, "label": "joy"}\n', "line 3: the text is None, not a string"),
        (b'{"text": 12.5, "label": "joy"}\n', "line 3: the text is 12.5, not a string"),
        (b'{"text": ["a"], "label": "joy"}\n', r"line 3: the text is \['a'\], not a string"),
        (b'{"text": "ab\\ud800", "label": "joy"}\n', "line 3: the text has a lone surrogate at character 3"),
        (b'{"text": "caf\xe9", "label": "joy"}\n', "line 3: not UTF-8 .byte 0xe9 at position 14"),
        (b'{"text": "a", "label": ["joy", null]}\n', "line 3: the label None is not a name"),
        (b'{"text": "a", "label": {"joy": 1}}\n', "line 3: the label {'joy': 1} is not a name"),
        (b'{"text": "a", "label": 0.5}\n', "line 3: the label 0.5 is not a name"),
        (b'{"text": "a", "label": [2]}\n', "line 3: the label 2 is a number: give the names"),
        (b"[" * 100_000 + b"\n", "line 3: not JSON .*recursion"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_broken_line_of_json_is_named(tmp_path: Path, broken: bytes, reason: str, suffix: str) -> None:
    path = tmp_path / f"corpus{suffix}"
    content = GOOD.encode() + b"\n" + broken + GOOD.encode()  # the second line is blank: no row
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(ValueError, match=reason) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 3: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('text,label\n"a\nb",joy\nlonely\n', "line 4: 1 cells, but the header has 2: 'text', 'label'"),
        ("text,label\na,joy,sad\n", "line 2: 3 cells, but the header has 2"),
        ('text,label\nfine,joy\n"never closed,joy\nmore,joy\n', "line 3: unexpected end of data"),
        ('text,label\n"a" b,joy\n', "line 2: .* expected after"),
        ("text,label\n,joy\n", "line 2: the text is empty"),
        ("text,text,label\na,b,joy\n", "line 1: the header has the column 'text' more than once"),
        ("words,label\na,joy\n", "line 2: no column 'text'; it has 'words', 'label'"),
        ("text,label\na,3\n", r"line 2: the label 3 is not 0 or 1 \(numbered classes need label_names=\)"),
        ("text,label\na,1\n", "line 2: the label 1 is a number: say what it means by name="),
        ("text,label\na,joy;;sad\n", "line 2: the label '' is not a name"),
        ("text,label\n" + "a" * 140_000 + ",joy\n", "line 2: field larger than field limit"),
        ("text,mood\na,joy\n", "line 2: no label column .emotions, label, labels, emotion.; it has 'text', 'mood'"),
        ("text,label\n", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_a_broken_row_of_cells_is_named(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "corpus.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=reason) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_stray_quotation_mark_in_a_tsv_file_swallows_no_row(tmp_path: Path) -> None:
    path = tmp_path / "corpus.tsv"
    path.write_text('text\tlabel\n"hello\tjoy\nsecond\tjoy\nbye"\tsadness\n')
    with pytest.raises(ValueError, match="line 2: a quotation mark opens a cell that runs over several rows"):
        read(path)


@pytest.mark.parametrize("keep", [5, 40, -4])
def test_a_truncated_gzip_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD.encode() * 100)[:keep])
    with pytest.raises(ValueError, match=r"corpus.jsonl.gz: not a whole gzip file"):
        read(path)


def test_a_file_that_only_claims_to_be_gzipped_is_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.csv.gz"
    path.write_text("text,label\na,joy\n")
    with pytest.raises(ValueError, match=r"corpus.csv.gz: not a whole gzip file"):
        read(path)


def test_missing_files_folders_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nowhere.jsonl"):
        file_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"must end in one of .jsonl, .csv, .tsv, .jsonl.gz"):
        file_rows(tmp_path / "corpus.xlsx")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=r"folder.csv is a folder"):
        file_rows(tmp_path / "folder.csv")


def test_cells_keep_commas_quotes_line_breaks_and_surrounding_space(tmp_path: Path) -> None:
    path = tmp_path / "corpus.csv"
    path.write_bytes('\ufefftext,label\r\n" one, ""two""\r\nthree ",joy\r\n\r\nplain,sadness\r\n'.encode())
    texts, labels, ids, language = read(path)
    assert texts == (' one, "two"\r\nthree ', "plain")
    assert labels == (("joy",), ("sadness",))
    assert len(set(ids)) == 2 and language == "und"


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("joy", ("joy",)),
        (" joy ; surprise ", ("joy", "surprise")),
        ("joy|surprise", ("joy", "surprise")),
        ("joy,surprise,joy", ("joy", "surprise")),
        ('["joy", "surprise"]', ("joy", "surprise")),
        ("['joy', \"it's on\"]", ("joy", "it's on")),
        ("['joy' 'surprise']", ("joy", "surprise")),
        ("[joy, surprise]", ("joy", "surprise")),
        ("불평/불만;슬픔", ("불평/불만", "슬픔")),
        ("[]", ()),
        ("", ()),
    ],
)
def test_a_cell_can_hold_several_labels(tmp_path: Path, cell: str, expected: tuple[str, ...]) -> None:
    path = tmp_path / "corpus.tsv"
    path.write_text(f"text\tlabel\na\t{cell}\n", encoding="utf-8")
    assert read_labels(path) == [expected]


def test_a_given_delimiter_is_the_only_one(tmp_path: Path) -> None:
    path = tmp_path / "corpus.csv"
    path.write_text('text,label\na,"joy, mild/hope"\n')
    assert read_labels(path, delimiter="/") == [("joy, mild", "hope")]
    assert labels_of(["joy, mild/hope"], delimiter="/") == [("joy, mild", "hope")]
    assert labels_of(["joy, mild/hope"]) == [("joy, mild/hope",)]


@pytest.mark.parametrize("column", ["emotions", "label", "labels", "emotion"])
def test_usual_names_of_the_label_column_are_found(column: str) -> None:
    assert labels_of(["joy", ["joy", "fear"], [], None, ""], column) == [("joy",), ("joy", "fear"), (), (), ()]


@pytest.mark.parametrize("flags", [[1, 0], [True, False], [1.0, 0.0], ["1", "0"], list(np.array([1, 0]))])
def test_flags_mean_the_given_name_or_the_column_that_was_asked_for(flags: list[Any]) -> None:
    assert labels_of(flags, name="anger") == [("anger",), ()]
    if not isinstance(flags[0], str):
        assert labels_of(flags, "anger", label="anger") == [("anger",), ()]


@pytest.mark.parametrize("cells", [("1", "0"), ("1.0", "0.0"), ("True", "false")])
def test_flags_in_cells_are_read_as_flags(tmp_path: Path, cells: tuple[str, str]) -> None:
    path = tmp_path / "corpus.csv"
    path.write_text("text,anger\n" + "".join(f"a,{cell}\n" for cell in cells))
    assert read_labels(path, label="anger") == [("anger",), ()]


@pytest.mark.parametrize(("value", "shown"), [(2, "2"), (None, "None"), ("joy", "'joy'"), (float("nan"), "None")])
def test_among_flags_everything_else_is_refused(value: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: the label {shown} is not 0 or 1"):
        labels_of([1, value], name="anger")


def test_numbers_take_the_given_names() -> None:
    assert labels_of([2, [0, 1], np.array([1])], label_names=("a", "b", "c")) == [("c",), ("a", "b"), ("b",)]
    with pytest.raises(ValueError, match=r"row 0: the label 3 is not one of 0 to 2 \('a', 'b', 'c'\)"):
        labels_of([3], label_names=("a", "b", "c"))
    with pytest.raises(ValueError, match="the label -1 is not one of 0 to 1"):
        labels_of([-1], label_names=("a", "b"))


def test_numbers_in_cells_take_the_given_names(tmp_path: Path) -> None:
    path = tmp_path / "corpus.tsv"
    path.write_text("text\tlabel\na\t1\nb\t0,1\n")
    assert read_labels(path, label_names=("a", "b")) == [("b",), ("a", "b")]


def test_unlabelled_rows_need_to_be_asked_for() -> None:
    rows = [("row 0", {"text": "a", "mood": "x"})]
    with pytest.raises(ValueError, match="row 0: no label column"):
        labelled_rows(rows, "the rows", Columns())
    assert labelled_rows(rows, "the rows", Columns(unlabelled=True))[1] == ((),)


@pytest.mark.parametrize(
    ("ids", "kept", "warned"),
    [(["b", "a"], True, False), ([4, 5], True, False), (["a", "a"], False, True), (["a", None], False, True),
     (["a", " "], False, True), ([None, None], False, False)],
)  # fmt: skip
def test_ids_are_kept_where_they_are_unique(
    ids: list[Any], kept: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(f"row {n}", {"text": "x", "label": "joy", "id": name}) for n, name in enumerate(ids)]
    found = labelled_rows(rows, "the rows", Columns())[2]
    assert (found == tuple(map(str, ids))) is kept
    assert len(set(found)) == 2
    assert ("texts are numbered instead" in caplog.text) is warned


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [(["en", "en"], None, "en"), (["en", "ko"], None, "mixed"), (["en", None], None, "mixed"),
     ([None, ""], None, "und"), (["en", "ko"], "ja", "ja"), ([3, ["en"]], None, "und")],
)  # fmt: skip
def test_the_language_is_given_or_that_of_the_rows(own: list[Any], given: str | None, expected: str) -> None:
    rows = [(f"row {n}", {"text": "x", "label": "joy", "language": value}) for n, value in enumerate(own)]
    assert labelled_rows(rows, "the rows", Columns(language=given))[3] == expected


def test_a_file_is_read_lazily_up_to_its_broken_row(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(GOOD * 2 + "oops\n")
    rows, cells = file_rows(path)
    assert [next(rows)[0], next(rows)[1]] == [f"{path}, line 1", json.loads(GOOD)] and not cells
    with pytest.raises(ValueError, match="line 3: not JSON"):
        next(rows)
