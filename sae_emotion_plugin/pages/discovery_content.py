"""What a discovery's page shows, computed before: `DiscoveryContent`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_emotion_plugin.discovery.absorption import Absorption
from sae_emotion_plugin.discovery.layer_scan import LayerScan
from sae_emotion_plugin.discovery.method_table import MethodTable
from sae_emotion_plugin.discovery.probe_losses import LatentProbes
from sae_emotion_plugin.discovery.rating_correlations import RatingCorrelations
from sae_emotion_plugin.discovery.reference_margins import ReferenceMargins
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.discovery.specificity import Specificity
from sae_emotion_plugin.discovery.transfer import TransferTable
from sae_emotion_plugin.evidence.calibration import Calibration
from sae_emotion_plugin.feature_roles.steering_ranks import SteeringRanks
from sae_emotion_plugin.pages.discovery_charts import RocCurve
from sae_emotion_plugin.pages.report_content import HighlightedText, ScoreDistribution
from sae_emotion_plugin.text_lens import LogitLens

PARTS = {
    "scores": "ranked features",
    "methods": "baselines on the same texts",
    "rocs": "ROC curves",
    "specificity": "specificity",
    "absorption": "where features are silent",
    "activations": "activation histograms",
    "examples": "top texts",
    "layers": "the layer scan",
    "lens": "a logit lens",
    "calibration": "the calibration of the tests",
    "margins": "margins over reference dictionaries",
    "probes": "one-latent probes",
    "ranks": "what to steer with",
    "ratings": "correlations with ratings",
    "transfers": "other corpora",
}


@dataclass(frozen=True)
class DiscoveryContent:
    """Everything on the page, computed before; a part that is None is named on the page as not computed."""

    title: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    """How the run was made, for the foot of the page."""
    scores: FeatureScores | None = None
    methods: MethodTable | None = None
    rocs: Sequence[RocCurve] | None = None
    """Held-out curves of each emotion's best feature (method `latent`) and of some baselines."""
    specificity: Specificity | None = None
    absorption: Absorption | None = None
    activations: Sequence[ScoreDistribution] | None = None
    examples: Sequence[HighlightedText] | None = None
    layers: LayerScan | None = None
    lens: LogitLens | None = None
    calibration: Calibration | None = None
    margins: ReferenceMargins | None = None
    links: Mapping[int, str] = field(default_factory=dict)
    """A page about a feature, by the feature's index; anything but http(s) is not linked."""
    probes: LatentProbes | None = None
    ranks: SteeringRanks | None = None
    ratings: RatingCorrelations | None = None
    transfers: Mapping[str, TransferTable] = field(default_factory=dict)
    """By the name of the other corpus."""
