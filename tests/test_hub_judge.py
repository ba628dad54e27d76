from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from sae_emotion_plugin.judges.hub import hub_judge

Problem = Literal["single_label_classification", "multi_label_classification"]
WORDS = ("[PAD]", "[UNK]", "good", "bad", "day")
TEXTS = ["good day", "bad", "good bad day day"]


def classifier(folder: Path, classes: list[str], problem: Problem | None) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.8, problem_type=problem,
        id2label=dict(enumerate(classes)), label2id={name: place for place, name in enumerate(classes)},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def logits(folder: Path) -> np.ndarray:
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        rows = [model(torch.tensor([[WORDS.index(word) for word in text.split()]])).logits for text in TEXTS]
    return torch.cat(rows).double().numpy()


def test_classes_are_emotions_and_valence_is_pleasant_less_unpleasant(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "c", ["Anger", "happiness", "neutral"], None)
    judge = hub_judge(str(folder), language="en", batch_texts=2)
    assert judge.emotions == ("anger", "joy", "neutral") and judge.has_valence
    judged = judge(TEXTS)
    expected = np.exp(logits(folder))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(judged.scores, expected, atol=1e-6)
    np.testing.assert_allclose(judged.of("valence"), expected[:, 1] - expected[:, 0], atol=1e-6)


def test_a_classifier_of_several_labels_scores_each_for_itself(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "c", ["LABEL_0", "LABEL_1"], "multi_label_classification")
    judge = hub_judge(str(folder), names={"label_1": "sadness"})
    assert judge.emotions == ("label_0", "sadness") and not judge.has_valence and judge.measures == judge.emotions
    np.testing.assert_allclose(judge(TEXTS).scores, 1 / (1 + np.exp(-logits(folder))), atol=1e-6)


def test_names_of_classes_that_are_not_there_or_become_one_are_refused(tmp_path: Path) -> None:
    folder = str(classifier(tmp_path / "c", ["joy", "anger"], None))
    with pytest.raises(ValueError, match="no class 'fear'; it has joy, anger"):
        hub_judge(folder, names={"fear": "fear"})
    with pytest.raises(ValueError, match=r"two classes of .* have one name: joy, joy"):
        hub_judge(folder, names={"anger": "joy"})


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "c", ["joy", "anger"], None)
    model = BertForSequenceClassification.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load the classifier"):
        hub_judge(str(folder))(["good"])


def test_a_classifier_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="cannot load the classifier") as refused:
        hub_judge(str(tmp_path / "nothing"))
    assert "\n" not in str(refused.value)
