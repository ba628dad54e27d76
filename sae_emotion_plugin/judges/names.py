"""Names and languages -> judges."""

import logging
from typing import Any

from sae_emotion_plugin.judges.hub import hub_judge
from sae_emotion_plugin.judges.judge import Figure, Judge, vader_judge
from sae_emotion_plugin.judges.linear import fitted_names, judge_facts, linear_judge
from sae_emotion_plugin.judges.sentence import has_encoder, sentence_judge

logger = logging.getLogger(__name__)

VADER = "vader"
HUB = "hub:"
NO_JAPANESE = (
    "no judge for 'ja' comes with the package: no openly licensed Japanese texts with emotion labels were found; "
    "name a classifier of the Hugging Face Hub instead, 'hub:owner/name' or hub_judge('owner/name', language='ja')"
)


def judge_names() -> tuple[str, ...]:
    """The names of the judges that come with the package."""
    return (VADER, *fitted_names())


def judge_language(name: str) -> str:
    """The language of a judge that comes with the package, loaded or not. ValueError for an unknown name."""
    return "en" if name == VADER else str(_facts(name)["language"])


def stored_figures(name: str) -> tuple[Figure, ...]:
    """A judge's figures on held-out texts, as stored when it was fitted; none for VADER. ValueError if unknown."""
    return () if name == VADER else tuple(Figure(**figure) for figure in _facts(name)["figures"])


def load_judge(name: str) -> Judge:
    """The judge of that name: one of `judge_names()`, or `hub:owner/name` for a classifier of the Hugging Face Hub.

    Raises:
        ValueError: an unknown name.
        ImportError: the sentence judge without the extra `judges`.
    """
    if name == VADER:
        return vader_judge()
    if name.startswith(HUB):
        return hub_judge(name.removeprefix(HUB))
    return sentence_judge(name) if _facts(name)["kind"] == "sentences" else linear_judge(name)


def judges_for(language: str) -> tuple[Judge, ...]:
    """The judges of a language that can be loaded here; one whose extra is not installed is left out with a warning.

    ValueError for a language without any: Japanese, for want of openly licensed labelled texts, and unknown ones.
    """
    if language == "ja":
        raise ValueError(NO_JAPANESE)
    languages = {name: judge_language(name) for name in judge_names()}
    if language not in languages.values():
        raise ValueError(f"no judge for {language!r}; there are some for {', '.join(sorted(set(languages.values())))}")
    found = []
    for name in (name for name, spoken in languages.items() if spoken == language):
        if name not in (VADER, *fitted_names(kind="ngrams")) and not has_encoder():
            logger.warning("the judge %r is left out: it needs the extra judges", name)
            continue
        found.append(load_judge(name))
    return tuple(found)


def _facts(name: str) -> dict[str, Any]:
    if name not in judge_names():
        raise ValueError(f"no judge {name!r}; choose from {', '.join(judge_names())}, or hub:owner/name")
    return judge_facts(name)
