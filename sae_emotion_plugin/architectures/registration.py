"""Our training classes under their names in SAELens, so that its runner, configurations and checkpoints know them."""

from typing import Any

from sae_lens import register_sae_training_class
from sae_lens.registry import get_sae_training_class

from sae_emotion_plugin.architectures.openai_topk import OpenAITopKTrainingSAE, OpenAITopKTrainingSAEConfig
from sae_emotion_plugin.architectures.relu_l1 import ReluL1TrainingSAE, ReluL1TrainingSAEConfig

_CLASSES: tuple[tuple[type[Any], type[Any]], ...] = (
    (OpenAITopKTrainingSAE, OpenAITopKTrainingSAEConfig),
    (ReluL1TrainingSAE, ReluL1TrainingSAEConfig),
)


def register_architectures() -> tuple[str, ...]:
    """The names under which SAELens knows our training classes, after they were registered; again changes nothing.

    Raises:
        ValueError: SAELens has another class of that name.
    """
    for sae_class, config_class in _CLASSES:
        name = config_class.architecture()
        try:
            there = get_sae_training_class(name)
        except KeyError:
            register_sae_training_class(name, sae_class, config_class)
            continue
        if there != (sae_class, config_class):
            raise ValueError(f"SAELens has another training class named {name!r}: {there[0].__name__}")
    return tuple(config_class.architecture() for _, config_class in _CLASSES)
