"""Dashboards, labels and steering vectors as rows of Neuronpedia's tables: the same keys in every row of a table."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sae_emotion_plugin.dashboards.types import FeatureDashboard, Histogram, SequenceGroup
from sae_emotion_plugin.feature_labels import FeatureLabel
from sae_emotion_plugin.publishing.neuronpedia_source import NeuronpediaSource
from sae_emotion_plugin.publishing.neuronpedia_tables import BOT, LONGEST_LABEL, finite, line, mended, rounded, row_id

NO_MODEL = "no-language-model"
"""What stands for the explaining model of a label made from statistics."""
USUAL_STRENGTH = 10.0
"""Neuronpedia's default, for features that are never active."""


def metadata_rows(
    source: NeuronpediaSource, saelens_config: Mapping[str, Any] | None, n_prompts: int, prompt_tokens: int
) -> dict[str, dict[str, Any]]:
    """The one row of each of `release.jsonl`, `model.jsonl`, `sourceset.jsonl` and `source.jsonl`."""
    model, date = source.model, source.date
    description, urls = mended(source.description), [mended(url) for url in source.urls]
    shared = {"creatorId": BOT, "visibility": source.visibility, "createdAt": date}
    creator = {"creatorName": mended(source.creator)}
    return {
        "release.jsonl": {
            **shared,
            **creator,
            "name": source.release,
            "creatorNameShort": mended(source.creator_short or source.creator),
            "description": description,
            "descriptionShort": mended(source.description_short or source.description),
            "urls": urls,
        },
        "model.jsonl": {
            **shared,
            "id": model.id,
            "displayName": mended(model.display_name or model.id),
            "displayNameShort": mended(model.display_name or model.id),
            "tlensId": model.hf_id,
            "dimension": model.dimension,
            "instruct": model.instruct,
            "layers": model.layers,
            "neuronsPerLayer": model.neurons_per_layer,
            "owner": mended(model.owner),
            "updatedAt": date,
            "website": f"https://huggingface.co/{model.hf_id}" if model.hf_id else None,
        },
        "sourceset.jsonl": {
            **shared,
            **creator,
            "modelId": model.id,
            "name": source.set_name,
            "hasDashboards": True,
            "description": description,
            "type": mended(source.kind),
            "urls": urls,
            "releaseName": source.release,
        },
        "source.jsonl": {
            **shared,
            "id": source.id,
            "modelId": model.id,
            "setName": source.set_name,
            "hasDashboards": True,
            # True only where an inference server has the dictionary: its owner says so there.
            "inferenceEnabled": False,
            "saelensConfig": None if saelens_config is None else dict(saelens_config),
            "saelensRelease": source.hf_repo_id,
            "saelensSaeId": source.hf_folder,
            "hfRepoId": source.hf_repo_id,
            "hfFolderId": source.hf_folder,
            "num_prompts": n_prompts,
            "num_tokens_in_prompt": prompt_tokens,
            "dataset": source.dataset,
        },
    }


def feature_row(source: NeuronpediaSource, dashboard: FeatureDashboard) -> dict[str, Any]:
    """The row of one feature of a dictionary, with its largest activation as its first steering strength.

    It has no vector: with one, Neuronpedia would take it for a user's own, not for a feature of the dictionary.
    """
    largest = _number(f"the maximum of feature {dashboard.feature}", dashboard.maximum)
    near, like, aligned = dashboard.correlated_neurons, dashboard.correlated_features, dashboard.aligned_neurons
    where = f"feature {dashboard.feature}"
    return {
        **_feature(source, str(dashboard.feature)),
        "maxActApprox": largest,
        "vectorDefaultSteerStrength": largest or USUAL_STRENGTH,
        "frac_nonzero": finite(where, dashboard.fraction_active),
        **_histogram(where, "freq_hist_data_bar", dashboard.activations),
        **_histogram(where, "logits_hist_data_bar", dashboard.logits),
        "pos_str": [mended(one.token) for one in dashboard.promoted],
        "pos_values": _numbers(where, [one.effect for one in dashboard.promoted]),
        "neg_str": [mended(one.token) for one in dashboard.suppressed],
        "neg_values": _numbers(where, [one.effect for one in dashboard.suppressed]),
        "correlated_neurons_indices": [one.index for one in near],
        "correlated_neurons_pearson": _numbers(where, [one.pearson for one in near]),
        # Upstream's columns of this name hold the cosine similarity.
        "correlated_neurons_l1": _numbers(where, [one.cosine for one in near]),
        "correlated_features_indices": [one.index for one in like],
        "correlated_features_pearson": _numbers(where, [one.pearson for one in like]),
        "correlated_features_l1": _numbers(where, [one.cosine for one in like]),
        "neuron_alignment_indices": [one.index for one in aligned],
        "neuron_alignment_values": _numbers(where, [one.value for one in aligned]),
        "neuron_alignment_l1": _numbers(where, [one.l1_share for one in aligned]),
    }


def vector_row(source: NeuronpediaSource, index: int, vector: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a steering vector, given as `interventions.neuronpedia.neuronpedia_vectors` gives it."""
    label = mended(str(vector["label"]))
    return {
        **_feature(source, str(index)),
        "hasVector": True,
        "vector": rounded(f"vector {label!r}", np.asarray(vector["vector"], float), digits=7),
        "vectorLabel": label,
        "vectorDefaultSteerStrength": finite(f"the strength of {label!r}", vector["default_steer_strength"]),
        "hookName": f"blocks.{vector['layer_num']}.{vector['hook_type']}",
        "frac_nonzero": -1,
    }


def activation_rows(source: NeuronpediaSource, dashboard: FeatureDashboard) -> list[dict[str, Any]]:
    """A row for each sequence of each group, the strongest first, then the intervals from the highest down."""
    return [
        row
        for number, group in enumerate(dashboard.groups)
        for row in _group_rows(source, dashboard.feature, number, group)
    ]


def explanation_row(source: NeuronpediaSource, label: FeatureLabel, *, self_hosted: bool = False) -> dict[str, Any]:
    """The row of a label. Who made it, how, and its statistics are JSON in `notes`, which no page shows.

    `self_hosted` names the method, whose row `config_rows` has; neuronpedia.org lacks it and would refuse the name.
    """
    evidence = {key: value for key, value in label.to_dict().items() if key not in ("feature", "text")}
    return {
        "id": row_id("explanation", source.model.id, source.id, label.to_dict()),
        "modelId": source.model.id,
        "layer": source.id,
        "index": str(label.feature),
        "description": mended(label.text.strip())[:LONGEST_LABEL],
        "authorId": BOT,
        "notes": mended(line(evidence)),
        "scoreV1": 0,
        "scoreV2": None,
        # Of a model of OpenAI's; any other's would be compared with those.
        "embedding": None,
        "typeName": _method(label) if self_hosted else None,
        "explanationModelName": NO_MODEL if self_hosted else None,
        "createdAt": source.date,
        "updatedAt": source.date,
    }


def config_rows(source: NeuronpediaSource, labels: Iterable[FeatureLabel]) -> dict[str, list[dict[str, Any]]]:
    """The rows of `v1/config` that self-hosted labels refer to, by table."""
    shared = {
        "featured": True,
        "creatorName": mended(source.creator),
        "createdAt": source.date,
        "updatedAt": source.date,
    }
    methods = sorted({_method(label) for label in labels})
    described = "A label with its statistics on labelled texts; no language model wrote it"
    return {
        "explanation_type": [
            {
                **shared,
                "name": name,
                "displayName": name,
                "description": described,
                "isAttention": False,
                "creatorId": BOT,
            }
            for name in methods
        ],
        "explanation_model_type": [
            {**shared, "name": NO_MODEL, "displayName": "no language model", "description": described}
        ],
    }


def _feature(source: NeuronpediaSource, index: str) -> dict[str, Any]:
    lists = ("pos", "neg")
    empty = [f"{side}_{what}" for side in lists for what in ("str", "values")]
    empty += [f"{name}_data_bar_{what}" for name in ("freq_hist", "logits_hist") for what in ("heights", "values")]
    empty += [
        f"{name}_{what}"
        for name in ("correlated_neurons", "correlated_features")
        for what in ("indices", "pearson", "l1")
    ]
    empty += [f"neuron_alignment_{what}" for what in ("indices", "values", "l1")]
    return {
        "modelId": source.model.id,
        "layer": source.id,
        "index": index,
        "sourceSetName": source.set_name,
        "creatorId": BOT,
        "createdAt": source.date,
        "maxActApprox": 0,
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": USUAL_STRENGTH,
        "hookName": None,
        "frac_nonzero": 0,
        **{name: [] for name in (*empty, "topkCosSimIndices", "topkCosSimValues")},
    }


def _group_rows(source: NeuronpediaSource, feature: int, number: int, group: SequenceGroup) -> Iterable[dict[str, Any]]:
    ends = (-1, _number("an interval", group.highest)) if group.lowest is None else None
    low, high = ends or (_number("an interval", group.lowest or 0.0), _number("an interval", group.highest))
    for rank, sequence in enumerate(group.sequences):
        values = _numbers(f"an activation of feature {feature}", sequence.values)
        tokens = [mended(token) for token in sequence.tokens]
        yield {
            "id": row_id("activation", source.model.id, source.id, feature, number, rank, tokens, values),
            "modelId": source.model.id,
            "layer": source.id,
            "index": str(feature),
            "creatorId": BOT,
            "createdAt": source.date,
            "tokens": tokens,
            "values": values,
            "maxValue": values[sequence.strongest],
            "minValue": min(values),
            "maxValueTokenIndex": sequence.strongest,
            "qualifyingTokenIndex": sequence.strongest,
            "binMin": low,
            "binMax": high,
            "binContains": -1 if group.share is None else finite("a share", group.share),
            "dataIndex": None,
            "dataSource": None,
            "dfaTargetIndex": None,
            "dfaValues": [],
            "lossValues": [],
            "logitContributions": None,
        }


def _histogram(where: str, name: str, histogram: Histogram) -> dict[str, Any]:
    """Unrounded centres: the page takes their distance for the bins' width. Equal values make one bin."""
    centres = [finite(where, centre) for centre in histogram.centres]
    heights = list(histogram.counts)
    if centres and centres[0] == centres[-1]:
        centres, heights = centres[:1], [sum(heights)]
    return {f"{name}_heights": heights, f"{name}_values": centres}


def _numbers(where: str, values: Iterable[float | int]) -> list[float | int]:
    return rounded(where, np.fromiter(values, float))


def _number(where: str, value: float | int) -> float | int:
    return _numbers(where, [value])[0]


def _method(label: FeatureLabel) -> str:
    return mended(label.method.strip() or "label")
