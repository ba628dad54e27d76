"""What a discovery found, in words: the headline of its page, and a line on each part, for and against the features."""

from dataclasses import dataclass

from sae_emotion_plugin.discovery.layer_scan import LayerScan
from sae_emotion_plugin.discovery.method_table import MethodScore, MethodTable
from sae_emotion_plugin.discovery.rating_correlations import RatingCorrelations
from sae_emotion_plugin.discovery.reference_margins import MEAN
from sae_emotion_plugin.discovery.transfer import TransferTable
from sae_emotion_plugin.pages import charts
from sae_emotion_plugin.pages.charts import finite, number, share
from sae_emotion_plugin.pages.discovery_content import DiscoveryContent
from sae_emotion_plugin.pages.templates import amount, listed

LATENT = "latent"
RIVALS = ("difference-of-means", "dense-probe")
"""What a label-selected latent has to be compared with before anything else is said of it."""
METHOD_NAMES = {
    LATENT: "one latent",
    "difference-of-means": "difference of means",
    "difference-of-means-raw": "difference of means, raw dimensions",
    "dense-probe": "dense probe",
    "bag-of-words": "bag of words",
    "neuron": "best neuron",
}
SILENT_OFTEN = 0.1
"""A feature that is silent in more of the texts than this is said to be."""
LEVEL = 0.05
"""Below this q counts as found."""


@dataclass(frozen=True)
class Fact:
    """One line of the page's summary."""

    text: str
    good: bool | None = None
    """Whether it speaks for the features; None for what does neither."""


def method_name(method: str) -> str:
    """A method's name in words; a name that is not known stays as it is."""
    kind, _, size = method.partition("-")
    return f"probe on {size} latents" if kind == "latents" and size else METHOD_NAMES.get(method, method)


def difference_between(
    methods: MethodTable, first: str, second: str, emotion: str = MEAN
) -> tuple[float, float, float] | None:
    """By how much `first` is above `second`, and the ends of the interval; None where the two were not compared."""
    for row in methods.differences:
        if row.emotion == emotion and (row.first, row.second) == (first, second):
            return row.difference, row.low, row.high
        if row.emotion == emotion and (row.first, row.second) == (second, first):
            return -row.difference, -row.high, -row.low
    return None


def verdict(low: object, high: object) -> str:
    """`better` or `worse` when the interval of a difference excludes 0, else `unclear`."""
    left, right = finite(low), finite(high)
    return "better" if left is not None and left > 0 else "worse" if right is not None and right < 0 else "unclear"


def headline(content: DiscoveryContent) -> str:
    """Whether the label-selected latent beats or loses to what is simpler, in words and with the intervals."""
    methods = content.methods
    if not methods:
        if content.layers and not content.scores:
            return _layer_sentence(content.layers)
        return "No baselines were computed: nothing on this page says whether the features beat a simple probe."
    aurocs = {row.method: row for row in methods.scores if row.emotion == MEAN}
    if LATENT not in aurocs:
        return "No single latent was scored beside the baselines: whether one beats a simple probe is not known."
    n = len({row.emotion for row in methods.scores if row.method == LATENT and row.emotion != MEAN})
    own = aurocs[LATENT]
    opening = (
        f"One latent, chosen with labels, reads emotion in held-out texts at AUROC {number(own.auroc)} "
        f"[{number(own.low)},\u00a0{number(own.high)}], the mean of {n} {'emotion' if n == 1 else 'emotions'}"
    )
    clauses = [_against(methods, rival, aurocs.get(rival)) for rival in RIVALS]
    return f"{opening}. It {listed(clauses)}."


def _against(methods: MethodTable, rival: str, score: MethodScore | None) -> str:
    found = difference_between(methods, LATENT, rival)
    name = ("the " if rival == "dense-probe" else "") + method_name(rival)
    if found is None:
        return f"was not compared with {name}"
    difference, low, high = found
    at = number(score.auroc) if score else charts.DASH
    verb = {"better": "beats", "worse": "loses to", "unclear": "cannot be told apart from"}[verdict(low, high)]
    return f"{verb} {name} ({at}; difference {_signed(difference, low, high)})"


def _signed(value: object, low: object, high: object) -> str:
    """A difference with its interval, which no line break divides."""
    return f"{number(value, 3, True)} [{number(low, 3, True)},\u00a0{number(high, 3, True)}]"


def facts(content: DiscoveryContent) -> list[Fact]:
    """The page in a few lines, each marked by whether it speaks for the features."""
    found = _method_facts(content.methods) if content.methods else []
    if content.scores:
        best = [content.scores.top(emotion, 1)[0] for emotion in content.scores.emotions]
        above = [row for row in best if row.q_above is not None and row.q_above < LEVEL]
        text = f"For {len(above)} of {len(best)} emotions the best feature's AUROC is above 0.60 (q < {LEVEL:g})."
        found.append(Fact(text, len(above) == len(best)))
    if content.specificity:
        rows = content.specificity.rows
        own = [row for row in rows if verdict(row.low, row.high) == "better"]
        text = f"{len(own)} of {len(rows)} best features read their own emotion better than every other emotion."
        found.append(Fact(text, len(own) == len(rows)))
    if content.absorption:
        silent = [row for row in content.absorption.rows if row.true_rate is not None]
        often = [row.emotion for row in silent if (row.true_rate or 0) > SILENT_OFTEN]
        if silent:
            text = (
                f"Where a dense probe is rightly sure, {len(often)} of {len(silent)} best features are silent in more "
                f"than {share(SILENT_OFTEN)} of the texts{': ' + listed(often) if often else ''}."
            )
            found.append(Fact(text, not often))
    if content.margins:
        for reference in content.margins.references:
            row = content.margins.of(reference)
            interval = _signed(row.margin, row.low, row.high)
            text = f"Mean margin of the best features over the reference {reference}: {interval}."
            found.append(Fact(text, verdict(row.low, row.high) == "better"))
    found += [_transfer_fact(name, table) for name, table in content.transfers.items()]
    if content.ratings:
        found += _rating_fact(content.ratings)
    if content.ranks:
        first = [row for row in content.ranks.rows if row.place == 1]
        other = [row for row in first if row.auroc_place > 1]
        counts = f"{len(other)} of {len(first)} emotions"
        found.append(Fact(f"For {counts} the feature to steer with first is not the one that tells its texts best."))
    if content.calibration:
        one = content.calibration
        text = (
            f"In permuted labels {share(one.share)} of the runs found something [{share(one.low)}, {share(one.high)}], "
            f"{share(one.level)} were allowed: the tests {'keep' if one.holds else 'DO NOT keep'} their promise."
        )
        found.append(Fact(text, one.holds))
    if content.layers and (content.scores or content.methods):
        found.append(Fact(_layer_sentence(content.layers)))
    return found


def _method_facts(methods: MethodTable) -> list[Fact]:
    found = []
    for row in methods.differences:
        if row.emotion != MEAN or not row.first.startswith(LATENT):
            continue
        same = [r for r in methods.differences if (r.first, r.second) == (row.first, row.second) and r is not row]
        verdicts = [verdict(each.low, each.high) for each in same if each.emotion != MEAN]
        counts = ", ".join(f"{word} for {verdicts.count(word)}" for word in ("better", "worse", "unclear"))
        names = f"{method_name(row.first)} against {method_name(row.second)}"
        text = (
            f"{names[0].upper()}{names[1:]}: {_signed(row.difference, row.low, row.high)}; "
            f"not worse by more than {amount(row.margin)}: {'shown' if row.not_worse else 'NOT shown'}"
            f"{'; by emotion: ' + counts if verdicts else ''}."
        )
        found.append(Fact(text, row.not_worse))
    return found


def _transfer_fact(name: str, table: TransferTable) -> Fact:
    """How many of the best features lose, on the other corpus, to the best one that it chooses itself."""
    rows = [row for row in table.rows if row.subset == "all" and row.auroc is not None]
    if not rows:
        return Fact(f"On {name} there are too few texts of any emotion to score the best features.")
    worse = [row.emotion for row in rows if verdict(row.gap_low, row.gap_high) == "better"]
    mean = sum(row.auroc or 0.0 for row in rows) / len(rows)
    text = (
        f"On {name} the best features have a mean AUROC of {number(mean)}; {len(worse)} of {len(rows)} lose to the "
        f"feature that {name} would choose itself{': ' + listed(worse) if worse else ''}."
    )
    return Fact(text, not worse)


def _rating_fact(ratings: RatingCorrelations) -> list[Fact]:
    """For each rating the best feature that goes with it most closely; it speaks for nothing and against nothing."""
    largest = []
    for name in dict.fromkeys(row.rating for row in ratings.rows):
        rows = [row for row in ratings.rows if row.rating == name and finite(row.spearman) is not None]
        if rows:
            row = max(rows, key=lambda row: abs(row.spearman or 0.0))
            own = _signed(row.spearman, row.spearman_low, row.spearman_high)
            largest.append(f"with {name} {own} ({row.emotion})")
    return [Fact(f"Largest rank correlations of the best features with ratings: {listed(largest)}.")] if largest else []


def _layer_sentence(layers: LayerScan) -> str:
    rows = [row for row in layers.rows if row.emotion == MEAN] or layers.rows
    best = max(rows, key=lambda row: finite(row.probe) or 0.0, default=None)
    if best is None:
        return "The layer scan has no layers."
    interval = f"{number(best.probe)} [{number(best.low)}, {number(best.high)}]"
    return f"A linear probe reads emotion best at layer {best.layer} ({best.pooling}), at AUROC {interval}."
