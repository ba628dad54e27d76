"""Results -> the sections of the report page that have to be computed: distributions, highlights, findings."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from sae_emotion_plugin import registry
from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.discovery.scoring import null_runs
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evaluation import DictionaryReport
from sae_emotion_plugin.generation.records import Generations, summary
from sae_emotion_plugin.models import decode_token
from sae_emotion_plugin.pages.report_content import (
    DoseResponseRow,
    Finding,
    HighlightedText,
    MethodNote,
    ScoreDistribution,
)
from sae_emotion_plugin.sparse_codes import Pooling, SparseCodes
from sae_emotion_plugin.steering_studies.amounts import dose_response

GREEDY_OR_SAMPLED: tuple[tuple[str, bool], ...] = (("sampled", True), ("greedy", False))


def dictionary_metrics(dictionary: Any) -> dict[str, Any]:
    """The report that a registered dictionary came with; empty for any other."""
    if not isinstance(dictionary, str):
        return {}
    try:
        entry, _ = registry.find(dictionary)
    except ValueError:
        return {}
    report = entry.provenance.report
    if not report or entry.folder is None:
        return {}
    loaded = DictionaryReport.load(entry.folder / entry.release / report)
    return {**asdict(loaded), "loss_recovered": loaded.loss_recovered}


def score_distributions(scores: FeatureScores, codes: SparseCodes, texts: LabelledTexts) -> list[ScoreDistribution]:
    """The held-out pooled activations of each emotion's best feature, in the class and outside it."""
    pooled = codes.pooled(scores.meta["pooling"]).tocsc()
    found = []
    for emotion in scores.emotions:
        feature = scores.top(emotion, 1)[0].feature
        values = pooled[:, feature].toarray()[:, 0]
        inside = texts.label_matrix([emotion])[:, 0]
        found.append(ScoreDistribution(emotion, feature, values[inside].tolist(), values[~inside].tolist()))
    return found


def calibration_note(codes: SparseCodes, texts: LabelledTexts, pooling: Pooling, seed: int) -> MethodNote:
    """What the tests find in these texts when their labels are permuted and mean nothing."""
    found = null_runs(codes, texts, pooling=pooling, seed=seed)
    verdict = "the tests keep their promise" if found.holds else "THE TESTS DO NOT KEEP THEIR PROMISE HERE"
    text = (
        f"The held-out labels were permuted {found.permutations} times within strata of text length, which leaves "
        f"nothing to find, and every feature that fires in {found.fewest_firing} or more texts was tested each time. A "
        f"discovery (any q below {found.level:g}) was made in {found.runs_with_discovery} of them: {found.share:.1%}, "
        f"95 % interval {found.low:.1%} to {found.high:.1%}: {verdict}."
    )
    return MethodNote("Do the tests keep their promise?", text)


def highlighted_texts(
    model: HookedModel, scores: FeatureScores, codes: SparseCodes, texts: LabelledTexts, each: int
) -> list[HighlightedText]:
    """For each emotion the held-out texts, of any class, on which its best feature fires most.

    Texts of every class compete: a feature that fires on the wrong texts is seen to do so. Where it is silent there is
    nothing to highlight.
    """
    pooled = codes.pooled("max").tocsc()
    shown = []
    for emotion in scores.emotions:
        feature = scores.top(emotion, 1)[0].feature
        values = pooled[:, feature].toarray()[:, 0]
        order = np.argsort(-values, kind="stable")[: min(each, np.count_nonzero(values))]
        for index in order.tolist():
            tokens, activations = codes.of_text(index, feature)
            words = [decode_token(model, int(token)) for token in tokens]
            shown.append(HighlightedText(emotion, feature, texts.ids[index], words, activations.tolist()))
    return shown


def dose_response_rows(generations: Generations) -> list[DoseResponseRow]:
    """Effect and cost of every amount on each half of the openings, sampled continuations only."""
    return [
        DoseResponseRow(
            emotion=emotion,
            amount=amount,
            part=part,
            valence_shift=cell.valence_change,
            low=cell.low,
            high=cell.high,
            perplexity_ratio=cell.perplexity_ratio,
            degenerate_share=cell.degenerate_share,
            n=cell.n_rows,
        )
        for (emotion, part, amount), cell in dose_response(generations.rows).items()
        if part == "choose" or part == "report"
    ]


def findings_of(
    generations: Generations, signs: Mapping[str, int], kinds: Mapping[str, Sequence[str]]
) -> tuple[Finding, ...]:
    """What each recommended amount did on the openings that had no part in choosing it, by kind and decoding.

    Args:
        signs: the direction in which each emotion should move valence, +1 or -1.
        kinds: the openings of each kind.
    """
    found = []
    for emotion, sign in signs.items():
        expected: Literal["rise", "fall"] = "rise" if sign > 0 else "fall"
        amount = generations.meta["recommended"].get(emotion)
        rows = [
            row for row in generations.rows if row.emotion == emotion and row.part == "report" and row.amount == amount
        ]
        if not rows:
            found.append(Finding(emotion, amount, None, None, None, None, None, None, expected, 0))
        for kind, prompts in kinds.items():
            for decoding, sampled in GREEDY_OR_SAMPLED:
                group = [row for row in rows if row.prompt in prompts and (row.temperature > 0) == sampled]
                if not group:
                    continue
                cell = summary(group)
                found.append(
                    Finding(
                        emotion=emotion,
                        amount=amount,
                        effect=cell.valence_change,
                        low=cell.low,
                        high=cell.high,
                        perplexity_ratio=cell.perplexity_ratio,
                        degenerate_steered=cell.degenerate_share,
                        degenerate_baseline=cell.baseline_degenerate_share,
                        expected=expected,
                        n=cell.n_rows,
                        setting=f"{cell.n_prompts} {kind} openings, {decoding}",
                    )
                )
    return tuple(found)
