import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_emotion_plugin.recipes import TextSource, TrainingRecipe, read_documents

MINIMAL: dict[str, Any] = {
    "name": "tiny-emotion",
    "sae_id": "layer-0",
    "model": "embedded",
    "hook_name": "blocks.0.hook_resid_post",
    "texts": [{"path": "a.jsonl"}, {"path": "b.txt.gz", "tokens": 100, "document": "title", "licence": "CC0"}],
    "d_sae": 64,
    "k": 4,
    "epochs": 2,
    "lr": 0.001,
}


RELU = {"architecture": "relu-l1", "k": None, "l1_coefficient": 1.0}


def written(folder: Path, **changes: Any) -> Path:
    """A recipe file; a change of None leaves the key out."""
    data = {key: value for key, value in {**MINIMAL, **changes}.items() if value is not None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TrainingRecipe.read(path)
    assert "recipe.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_reads_as_it_was_written(tmp_path: Path) -> None:
    recipe = TrainingRecipe.read(written(tmp_path, seed=3))
    assert (recipe.d_sae, recipe.k, recipe.epochs, recipe.seed) == (64, 4, 2.0, 3)
    assert recipe.texts == (TextSource("a.jsonl"), TextSource("b.txt.gz", 100, "title", "CC0"))
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert TrainingRecipe.read(again) == recipe
    assert again.read_text() == TrainingRecipe.read(again).to_yaml()


def test_an_architecture_s_own_keys_have_its_defaults_and_the_others_none(tmp_path: Path) -> None:
    topk = TrainingRecipe.read(written(tmp_path))
    assert (topk.aux_loss_coefficient, topk.clip_norm, topk.ema_decay, topk.l1_coefficient) == (1 / 32, 1, 0, None)
    ours = TrainingRecipe.read(written(tmp_path, architecture="openai-topk", multi_topk_weight=0))
    assert (ours.multi_topk, ours.multi_topk_weight, ours.clip_norm, ours.ema_decay, ours.k_aux) == (
        4,
        0,
        1,
        0.999,
        None,
    )
    relu = TrainingRecipe.read(written(tmp_path, **RELU, epochs=None, steps=30))
    assert (relu.resampling, relu.ema_decay, relu.k, relu.number_of_steps(10**6)) == ("none", 0, None, 30)
    for recipe in (topk, ours, relu):
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert TrainingRecipe.read(tmp_path / "again.yaml") == recipe
        assert "null" not in recipe.to_yaml()


def test_steps_are_whole_batches_of_the_epochs(tmp_path: Path) -> None:
    recipe = TrainingRecipe.read(written(tmp_path, epochs=1.5, batch_size=10))
    assert [recipe.number_of_steps(tokens) for tokens in (3, 20, 105)] == [1, 3, 15]


def test_a_whole_number_counts_as_a_fraction_where_one_is_wanted(tmp_path: Path) -> None:
    recipe = TrainingRecipe.read(written(tmp_path, epochs=3, lr=1))
    assert isinstance(recipe.epochs, float) and recipe == TrainingRecipe.read(written(tmp_path, epochs=3.0, lr=1.0))


def test_the_recipes_that_come_with_the_project_are_valid() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    paths = [path for path in sorted(folder.glob("*.yaml")) if "d_sae:" in path.read_text()]
    recipes = {path.stem: TrainingRecipe.read(path) for path in paths}
    assert {name: recipe.architecture for name, recipe in recipes.items()} == {
        "blog-distilgpt2-mlp5": "relu-l1",
        "embedded-batchtopk": "batchtopk",
        "embedded-gemma": "topk",
        "embedded-jumprelu": "jumprelu",
        "embedded-plain-text": "topk",
        "embedded-sweep": "openai-topk",
        "openai-topk": "openai-topk",
    }
    assert len({recipe.name for recipe in recipes.values()}) == len(recipes)
    blog, ours = recipes["blog-distilgpt2-mlp5"], recipes["openai-topk"]
    assert (blog.d_sae, blog.steps, blog.resample_below) == (8 * 768, 1000, 1e-5)
    assert blog.texts[0].dataset == "MarkrAI/KoCommercial-Dataset"
    assert (ours.k, ours.multi_topk, ours.multi_topk_weight, ours.aux_loss_coefficient) == (32, 4, 1 / 8, 1 / 32)


@pytest.mark.parametrize("key", ["name", "hook_name", "texts", "d_sae", "k", "epochs", "lr"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    refused(written(tmp_path, **{key: None}), f"missing key '{key}'")


def test_an_unknown_key_is_named_with_the_valid_ones(tmp_path: Path) -> None:
    refused(written(tmp_path, colour="red"), "unknown key 'colour' .valid: name, sae_id, .*licence")
    refused(written(tmp_path, texts=[{"path": "a", "size": 3}]), "texts: unknown key 'size' .valid: path, tokens")
    refused(written(tmp_path, texts=[{"tokens": 3}]), "texts: missing key 'path'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k 0 is not between 1 and d_sae 64"),
        ({"k": 65}, "k 65 is not between 1 and d_sae 64"),
        ({"k": "32"}, "k is '32' .valid: a whole number"),
        ({"k": 4.0}, "k is 4.0 .valid: a whole number"),
        ({"k": True}, "k is True .valid: a whole number"),
        ({"d_sae": [64]}, r"d_sae is \[64\] .valid: a whole number"),
        ({"lr": "4e-4"}, "lr is '4e-4' .valid: a number"),
        ({"lr": float("nan")}, "lr is nan .valid: a number"),
        ({"lr": float("inf")}, "lr is inf .valid: a number"),
        ({"lr": 0}, "lr 0.0 is not positive"),
        ({"epochs": -1}, "epochs -1.0 is not positive"),
        ({"batch_size": 0}, "batch_size 0 is not positive"),
        ({"context_size": 0}, "context_size 0 is not positive"),
        ({"dead_token_window": 0}, "dead_token_window 0 is not positive"),
        ({"lr_warm_up_steps": -1}, "lr_warm_up_steps -1 is negative"),
        ({"lr_decay_share": 1.5}, "lr_decay_share 1.5 is above 1"),
        ({"lr_decay_share": -0.5}, "lr_decay_share -0.5 is negative"),
        ({"aux_loss_coefficient": -1}, "aux_loss_coefficient -1.0 is negative"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"held_out_share": 0}, "held_out_share 0.0 is not between 0 and 1"),
        ({"held_out_share": 1}, "held_out_share 1.0 is not between 0 and 1"),
        (
            {"architecture": "relu"},
            "unknown architecture 'relu' .valid: topk, openai-topk, relu-l1, batchtopk, jumprelu",
        ),
        (
            {"l1_coefficient": 1.0},
            "l1_coefficient is not used by architecture 'topk' .it uses: k, aux_loss_coefficient",
        ),
        ({"tied_init": True}, "tied_init is not used by architecture 'topk'"),
        ({"ema_decay": 0.9, "architecture": "openai-topk", "resampling": "plain"}, "resampling is not used by"),
        ({"architecture": "relu-l1", "l1_coefficient": 1.0}, "k is not used by architecture 'relu-l1'"),
        ({"architecture": "relu-l1", "k": None}, "missing key 'l1_coefficient'"),
        ({**RELU, "resampling": "often"}, "unknown resampling 'often' .valid: none, plain, anthropic"),
        ({**RELU, "resampling": "plain"}, "resample_every is None with resampling plain"),
        ({**RELU, "resample_every": 5}, "resample_every is 5 with resampling none"),
        ({**RELU, "resampling": "plain", "resample_every": 5, "resample_below": 1.5}, "resample_below 1.5 is above 1"),
        ({**RELU, "l1_coefficient": -1}, "l1_coefficient -1.0 is negative"),
        ({"architecture": "openai-topk", "ema_decay": 1.0}, "ema_decay 1.0 would keep the first weights"),
        ({"architecture": "openai-topk", "k_aux": 0}, "k_aux 0 is not positive"),
        (
            {"architecture": "openai-topk", "reference": "frozen-decoder"},
            "architecture 'openai-topk' has no references",
        ),
        ({"steps": 5}, "give it or 'steps', and not both"),
        ({"epochs": None, "steps": 0}, "steps 0 is not positive"),
        ({"texts": [{"path": "a", "rows": 3}]}, "texts: rows of a is for a data set, and there is none"),
        ({"texts": [{"path": "a", "dataset": "x/y", "columns": "text"}]}, "columns is 'text' .valid: a list of texts"),
        ({"texts": [{"path": "a", "dataset": "x/y", "columns": []}]}, "texts: columns of a are none"),
        ({"name": 3}, "name is 3 .valid: text"),
        ({"texts": []}, "at least one file under texts"),
        ({"texts": "a.jsonl"}, "texts is 'a.jsonl' .valid: a list of files"),
        ({"texts": ["a.jsonl"]}, "texts: expected keys and values, found str"),
        ({"texts": [{"path": 3}]}, "texts: path is 3 .valid: text"),
        ({"texts": [{"path": "a", "tokens": 0}]}, "texts: tokens is 0 of a .valid: a whole number from 1"),
        ({"texts": [{"path": "a", "tokens": "many"}]}, "texts: tokens is 'many' .valid: a whole number"),
    ],
)
def test_a_bad_value_is_refused_by_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(written(tmp_path, **changes), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys and values, found NoneType"),
        ("- a\n", "expected keys and values, found list"),
        ("a: [", "is no readable YAML"),
        ("texts: null\n", "missing key 'name'"),
        ("a: !!python/object/apply:os.getcwd []\n", "is no readable YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    refused(tmp_path / "recipe.yaml", message)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\xfa")
    refused(tmp_path / "recipe.yaml", "is no readable YAML")


def test_a_missing_recipe_is_refused_by_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such recipe: ") as error:
            TrainingRecipe.read(path)
        assert str(path) in str(error.value)


def test_a_shipped_recipe_is_read_by_its_name_and_studies_are_not_among_them() -> None:
    recipe = TrainingRecipe.read("openai-topk")
    assert recipe.architecture == "openai-topk" and recipe.tied_init is True
    with pytest.raises(FileNotFoundError, match=r"no such recipe: openai .valid: a YAML file, or ") as error:
        TrainingRecipe.read("openai")
    assert "blog-distilgpt2-mlp5, " in str(error.value) and "blog-gpt2" not in str(error.value)


def test_a_width_below_two_and_a_switch_that_is_no_switch_are_refused(tmp_path: Path) -> None:
    for width in (-5, 0, 1):
        refused(written(tmp_path, d_sae=width, **RELU), f"d_sae {width} is below 2")
    given = {"architecture": "openai-topk", "tied_init": "yes please"}
    refused(written(tmp_path, **given), "tied_init is 'yes please' .valid: true or false")
    refused(written(tmp_path, tied_init=False), "tied_init is not used by architecture 'topk'")


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_each_row_is_a_document_unless_a_column_gathers_them(tmp_path: Path) -> None:
    rows = ({"text": " eins ", "title": "A"}, {"text": "둘", "title": "B"}, {"text": "", "title": "C"})
    more = {"text": "three", "title": "A"}
    for name, write in (("a.jsonl", Path.write_text), ("a.jsonl.gz", None)):
        path = tmp_path / name
        if write:
            path.write_text(lines(*rows, more), encoding="utf-8")
        else:
            path.write_bytes(gzip.compress(lines(*rows, more).encode()))
        assert read_documents(path) == {"1": ["eins"], "2": ["둘"], "4": ["three"]}
        assert read_documents(path, "title") == {"A": ["eins", "three"], "B": ["둘"]}


def test_blank_lines_part_the_texts_of_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\nline\r\n\r\ntwo\r\n\r\n\r\n\r\n")
    assert list(read_documents(path).values()) == [["one\nline"], ["two"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\nx\n", r"a\.csv: unknown kind of text file \(valid: \.jsonl, \.txt"),
        ("a.gz", b"", r"a\.gz: unknown kind of text file"),
        ("a.jsonl", b'{"text": "x"}\n{broken\n', r"a\.jsonl, line 2: no JSON object"),
        ("a.jsonl", b'{"title": "x"}\n', r"a\.jsonl, line 1: .*'text'"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, line 1: no JSON object"),
        ("a.jsonl", b'{"text": "x \\ud83d"}\n', r"a\.jsonl, line 1: half a surrogate pair at character 2 of text"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl, line 1: .*text is None"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: .*text is 3"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl is no readable UTF-8 text"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz is no readable UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], r"a\.jsonl\.gz is no readable UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20, r"a\.jsonl\.gz is no readable UTF-8 text"),
        ("a.txt", b" \n\n \n", r"a\.txt holds no text"),
        ("a.jsonl", b"", r"a\.jsonl holds no text"),
    ],
)
def test_a_broken_text_file_is_refused_by_name_and_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_documents(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_row_without_its_document_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"text": "x", "title": "A"}, {"text": "y"}))
    with pytest.raises(ValueError, match=r"line 2: .*'title'"):
        read_documents(tmp_path / "a.jsonl", "title")


def test_a_missing_text_file_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such text file: .*absent\.jsonl"):
        read_documents(tmp_path / "absent.jsonl")
