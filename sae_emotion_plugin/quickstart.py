"""The main job from end to end: load, discover, steer, report. The steps stand in the modules below."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sae_emotion_plugin.activations import mean_norm
from sae_emotion_plugin.discovery.emotion_features import discover
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts, openings
from sae_emotion_plugin.generation.records import Generation, Generations
from sae_emotion_plugin.models import EMBEDDED, load_model
from sae_emotion_plugin.pages.report import Bounds, Finding, ReportContent, broken_bounds, write_report
from sae_emotion_plugin.pages.report_sections import (
    calibration_note,
    dictionary_metrics,
    dose_response_rows,
    findings_of,
    highlighted_texts,
    score_distributions,
)
from sae_emotion_plugin.plugin import DEFAULT_DICTIONARY, load_dictionary
from sae_emotion_plugin.sparse_codes import token_settings
from sae_emotion_plugin.steering_studies.amounts import (
    Cell,
    promising_features,
    recommend,
    run_cells,
    screen_features,
    shared_amounts,
)

logger = logging.getLogger(__name__)

DEMO_PROMPT = "he is such a"
SIGNS = {"anger": -1, "joy": 1, "sadness": -1}
"""The emotions steered towards, and where valence should go."""
CONSIDERED = 20
"""Best features of an emotion, by training AUROC, of which the next token is looked at."""
CANDIDATES = 6
"""Of these, those that move the next token's valence most, tried alone."""
SCREENING_AMOUNT = 0.1
FEATURES_PER_EMOTION = 3
"""Of the candidates, those that are steered together."""
AMOUNTS = (0.06, 0.09, 0.12, 0.15)
"""Fractions of the mean residual norm, in total over an emotion's features."""
TEMPERATURE = 0.7
CHOOSE_SEEDS = (0, 1)
REPORT_SEEDS = (0, 1, 2)
NEW_TOKENS = 20
HIGHLIGHTS_PER_EMOTION = 2
META_KEPT = ("model", "model_weights", "model_sha256", "hook_name", "seed", "versions")


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart found, and where it wrote it."""

    page: Path
    scores: FeatureScores
    generations: Generations
    findings: tuple[Finding, ...]

    def summary(self) -> str:
        """The findings, a line each."""
        lines = []
        for finding in self.findings:
            broken = broken_bounds(finding, Bounds())
            if finding.effect is None:
                lines.append(f"{finding.emotion}: {'; '.join(broken)}")
                continue
            lines.append(
                f"{finding.emotion} at {finding.amount:g}, {finding.setting}: valence {finding.effect:+.2f} "
                f"[{_shown(finding.low)}, {_shown(finding.high)}], perplexity x{_shown(finding.perplexity_ratio)}, "
                f"degenerate {finding.degenerate_steered:.0%} (unsteered {finding.degenerate_baseline:.0%})"
                + (f"  <- {'; '.join(broken)}" if broken else "")
            )
        return "\n".join(lines)


def quickstart(
    out_dir: str | Path = "report",
    *,
    model: Any = EMBEDDED,
    dictionary: Any = DEFAULT_DICTIONARY,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = logger.info,
) -> QuickstartResult:
    """The whole way on one model and dictionary; writes `index.html`, `scores.json` and `generations.json`.

    The bundled English corpus is split in two halves: features are ranked on one and scored on the other. They are
    added to the residual stream at several amounts; the amount is chosen on half of the openings and reported on the
    other half.
    """
    started = time.monotonic()
    say("loading the model and its dictionary ...")
    hooked, sae = load_model(model), load_dictionary(dictionary)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    texts = LabelledTexts.bundled("en")
    say(f"discovering emotion features: ranked on one half of {len(texts)} bundled texts, scored on the other ...")
    found = discover(hooked, sae, texts, top=CONSIDERED, seed=seed, progress=progress)
    scores = found.scores
    meta = {
        **{key: scores.meta[key] for key in META_KEPT},
        "dictionary": dictionary if isinstance(dictionary, str) else type(dictionary).__name__,
        "corpus": "bundled English sentences",
        "date": datetime.now().astimezone().date().isoformat(),
    }
    scores.save(out_dir / "scores.json")

    norm = mean_norm(hooked, found.held_out.texts, sae.cfg.metadata.hook_name, **token_settings(sae))
    candidates = {emotion: [row.feature for row in scores.top(emotion, CONSIDERED)] for emotion in SIGNS}
    say(f"steering towards {', '.join(SIGNS)} (amounts are fractions of the mean residual norm, {norm:.0f}) ...")
    generations = _steer(hooked, sae, candidates, norm, meta, progress)
    generations.save(out_dir / "generations.json")

    findings = findings_of(generations, SIGNS, {"neutral": openings("neutral"), "unpleasant": openings("unpleasant")})
    null_note = calibration_note(found.held_out_codes, found.held_out, scores.meta["pooling"], seed)
    content = ReportContent(
        title="Emotion features, found and steered",
        meta={**meta, "wall_time_s": round(time.monotonic() - started)},
        scores=[asdict(row) for row in scores.rows],
        dictionary=dictionary_metrics(dictionary),
        distributions=score_distributions(scores, found.held_out_codes, found.held_out),
        dose_response=dose_response_rows(generations),
        recommended=generations.meta["recommended"],
        findings=findings,
        generations=[asdict(row) for row in generations.rows],
        highlights=highlighted_texts(hooked, scores, found.held_out_codes, found.held_out, HIGHLIGHTS_PER_EMOTION),
        demo_prompt=DEMO_PROMPT,
        method=[null_note],
    )
    page = write_report(out_dir, content)
    return QuickstartResult(page, scores, generations, findings)


def _steer(
    model: Any,
    sae: Any,
    candidates: dict[str, list[int]],
    norm: float,
    meta: dict[str, Any],
    progress: bool,
) -> Generations:
    """Choose each emotion's features and amount on half of the openings; report the other half and the demo prompt."""
    choose, report = _halves()

    def each_alone(features: dict[str, list[int]]) -> list[Cell]:
        return [
            Cell(
                emotion,
                tuple(plan for one in tried for plan in shared_amounts(sae, [one], [SCREENING_AMOUNT], norm)),
                choose[emotion],
                "choose",
                TEMPERATURE,
            )
            for emotion, tried in features.items()
        ]

    promising = promising_features(model, sae, each_alone(candidates), SIGNS, CANDIDATES, progress=progress)
    features, screening = screen_features(
        model, sae, each_alone(promising), SIGNS, FEATURES_PER_EMOTION, max_new_tokens=NEW_TOKENS, progress=progress
    )
    plans = {emotion: shared_amounts(sae, chosen, AMOUNTS, norm) for emotion, chosen in features.items()}

    def run(cells: list[Cell]) -> tuple[Generation, ...]:
        return run_cells(model, sae, cells, max_new_tokens=NEW_TOKENS, progress=progress)

    chosen_on = run(
        [Cell(emotion, plans[emotion], choose[emotion], "choose", TEMPERATURE, CHOOSE_SEEDS) for emotion in SIGNS]
    )
    recommended = recommend(chosen_on, SIGNS)
    best = {emotion: tuple(plan for plan in plans[emotion] if plan.amount == recommended[emotion]) for emotion in SIGNS}
    reported = run(
        [
            cell
            for emotion in SIGNS
            for temperature, seeds in ((0.0, (0,)), (TEMPERATURE, REPORT_SEEDS))
            for cell in (
                Cell(emotion, best[emotion], report[emotion], "report", temperature, seeds),
                Cell(emotion, plans[emotion], (DEMO_PROMPT,), "demo", temperature, seeds[:1]),
            )
        ]
    )
    return Generations(
        {
            **meta,
            "recommended": recommended,
            "features": features,
            "screening": [asdict(one) for one in screening],
            "screening_amount": SCREENING_AMOUNT,
            "amounts": list(AMOUNTS),
            "amount_meaning": "fraction of the mean residual norm, shared equally among the features",
            "residual_norm": norm,
            "max_new_tokens": NEW_TOKENS,
        },
        (*chosen_on, *reported),
    )


def _halves() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """The openings to choose on and those to report on, by emotion; what should lift valence gets unpleasant ones too.

    There is little to lift on neutral openings alone. The unpleasant ones that choose are others than those reported.
    """
    neutral, unpleasant = openings("neutral"), openings("unpleasant")
    unpleasant_to_choose_on = openings("anger")[:5] + openings("sadness")[:5]
    lifts = {emotion: sign > 0 for emotion, sign in SIGNS.items()}
    choose = {emotion: neutral[::2] + (unpleasant_to_choose_on if lift else ()) for emotion, lift in lifts.items()}
    report = {emotion: neutral[1::2] + (unpleasant if lift else ()) for emotion, lift in lifts.items()}
    return choose, report


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
