"""Find, steer and train emotion features of language models with sparse autoencoders, beside SAELens.

Every public name is imported on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_emotion_plugin.activations import mean_norm as mean_norm
    from sae_emotion_plugin.dashboards.build import build_dashboards as build_dashboards
    from sae_emotion_plugin.dashboards.build import merge_dashboards as merge_dashboards
    from sae_emotion_plugin.dashboards.types import Dashboards as Dashboards
    from sae_emotion_plugin.discovery.emotion_features import discover as discover
    from sae_emotion_plugin.discovery.keywords import emotion_keywords as emotion_keywords
    from sae_emotion_plugin.discovery.layer_scan import scan_layers as scan_layers
    from sae_emotion_plugin.discovery.method_comparison import compare_methods as compare_methods
    from sae_emotion_plugin.discovery.scores import FeatureScores as FeatureScores
    from sae_emotion_plugin.discovery.scoring import choose_pooling as choose_pooling
    from sae_emotion_plugin.discovery.scoring import score_features as score_features
    from sae_emotion_plugin.discovery.transfer import transfer as transfer
    from sae_emotion_plugin.discovery_study import study as study
    from sae_emotion_plugin.dose_study import sweep_study as sweep_study
    from sae_emotion_plugin.emotion_texts import LabelledTexts as LabelledTexts
    from sae_emotion_plugin.evaluation import evaluate as evaluate
    from sae_emotion_plugin.feature_labels import FeatureLabel as FeatureLabel
    from sae_emotion_plugin.feature_labels import labels_from_scores as labels_from_scores
    from sae_emotion_plugin.feature_labels import read_labels as read_labels
    from sae_emotion_plugin.feature_roles.output_scores import steering_order as steering_order
    from sae_emotion_plugin.feature_roles.steering_ranks import steering_ranks as steering_ranks
    from sae_emotion_plugin.generation.continuations import generate as generate
    from sae_emotion_plugin.generation.records import Generations as Generations
    from sae_emotion_plugin.generation.streaming import stream as stream
    from sae_emotion_plugin.interventions.exports import export_plan as export_plan
    from sae_emotion_plugin.interventions.hooks import actual_plan as actual_plan
    from sae_emotion_plugin.interventions.hooks import steering as steering
    from sae_emotion_plugin.interventions.plans import SteeringPlan as SteeringPlan
    from sae_emotion_plugin.models import load_model as load_model
    from sae_emotion_plugin.monitoring.feature_sets import emotion_sets as emotion_sets
    from sae_emotion_plugin.monitoring.monitor import live_monitor as live_monitor
    from sae_emotion_plugin.monitoring.monitor import monitor as monitor
    from sae_emotion_plugin.monitoring.thresholds import calibrate_monitor as calibrate_monitor
    from sae_emotion_plugin.openai_format import load_openai_checkpoint as load_openai_checkpoint
    from sae_emotion_plugin.openai_format import openai_disk_loader as openai_disk_loader
    from sae_emotion_plugin.openai_format import openai_huggingface_loader as openai_huggingface_loader
    from sae_emotion_plugin.openai_format import save_openai_checkpoint as save_openai_checkpoint
    from sae_emotion_plugin.plugin import load_dictionary as load_dictionary
    from sae_emotion_plugin.plugin import register as register
    from sae_emotion_plugin.publishing.neuronpedia_export import export_neuronpedia as export_neuronpedia
    from sae_emotion_plugin.rated_texts import read_ratings as read_ratings
    from sae_emotion_plugin.recipe_sweep import sweep_recipe as sweep_recipe
    from sae_emotion_plugin.recipes import TrainingRecipe as TrainingRecipe
    from sae_emotion_plugin.sparse_codes import SparseCodes as SparseCodes
    from sae_emotion_plugin.sparse_codes import encode_texts as encode_texts
    from sae_emotion_plugin.sparse_codes import open_codes as open_codes
    from sae_emotion_plugin.steering_studies.combinations import study_combinations as study_combinations
    from sae_emotion_plugin.steering_studies.methods import compare_steering as compare_steering
    from sae_emotion_plugin.text_lens import logit_lens as logit_lens
    from sae_emotion_plugin.training.runs import train as train
    from sae_emotion_plugin.training_sweeps.design import SweepDesign as SweepDesign

_HOMES = {
    "Dashboards": "dashboards.types",
    "FeatureLabel": "feature_labels",
    "FeatureScores": "discovery.scores",
    "Generations": "generation.records",
    "LabelledTexts": "emotion_texts",
    "SparseCodes": "sparse_codes",
    "SteeringPlan": "interventions.plans",
    "SweepDesign": "training_sweeps.design",
    "TrainingRecipe": "recipes",
    "actual_plan": "interventions.hooks",
    "build_dashboards": "dashboards.build",
    "calibrate_monitor": "monitoring.thresholds",
    "choose_pooling": "discovery.scoring",
    "compare_methods": "discovery.method_comparison",
    "compare_steering": "steering_studies.methods",
    "discover": "discovery.emotion_features",
    "emotion_keywords": "discovery.keywords",
    "emotion_sets": "monitoring.feature_sets",
    "encode_texts": "sparse_codes",
    "evaluate": "evaluation",
    "export_neuronpedia": "publishing.neuronpedia_export",
    "export_plan": "interventions.exports",
    "generate": "generation.continuations",
    "labels_from_scores": "feature_labels",
    "live_monitor": "monitoring.monitor",
    "load_dictionary": "plugin",
    "load_model": "models",
    "load_openai_checkpoint": "openai_format",
    "logit_lens": "text_lens",
    "mean_norm": "activations",
    "merge_dashboards": "dashboards.build",
    "monitor": "monitoring.monitor",
    "open_codes": "sparse_codes",
    "openai_disk_loader": "openai_format",
    "openai_huggingface_loader": "openai_format",
    "read_labels": "feature_labels",
    "read_ratings": "rated_texts",
    "register": "plugin",
    "save_openai_checkpoint": "openai_format",
    "scan_layers": "discovery.layer_scan",
    "score_features": "discovery.scoring",
    "steering": "interventions.hooks",
    "steering_order": "feature_roles.output_scores",
    "steering_ranks": "feature_roles.steering_ranks",
    "stream": "generation.streaming",
    "study": "discovery_study",
    "study_combinations": "steering_studies.combinations",
    "sweep_recipe": "recipe_sweep",
    "sweep_study": "dose_study",
    "train": "training.runs",
    "transfer": "discovery.transfer",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll] (a test compares it with the imports above)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
