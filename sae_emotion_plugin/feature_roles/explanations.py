"""Feature roles as what Neuronpedia calls explanations: rows of its bulk export."""

import hashlib
import json
from typing import Any

from sae_emotion_plugin.feature_roles.roles import FeatureRoles

METHOD = "sae-emotion_role"
"""Name of the method in explanations."""
LONGEST_EXPLANATION = 512
"""Characters that Neuronpedia's upload takes."""


def explanations(
    roles: FeatureRoles,
    model_id: str,
    source_id: str,
    author_id: str,
    *,
    created_at: str,
    type_name: str | None = METHOD,
    explanation_model_name: str | None = None,
) -> list[dict[str, Any]]:
    """The roles as rows of Neuronpedia's `explanations/batch-<n>.jsonl.gz`: the same keys in every row.

    The description is the role's own where it has one, else its label, at most 512 characters. The id depends on
    everything in the row but the dates, so that a changed label is another row.

    Args:
        source_id: layer and set, for example "9-emotion-res-4k".
        created_at: date and time in ISO 8601.
        type_name: `explanation_type()` has its row, which has to be imported first, since an unknown name fails the
            import; None is right where that row is not there, as on neuronpedia.org.
        explanation_model_name: where a `describe` used a language model; its row has to be there as well.
    """
    rows = []
    for role in roles.rows:
        index, description = str(role.feature), (role.description or role.label)[:LONGEST_EXPLANATION]
        identity = [model_id, source_id, index, author_id, description, type_name, explanation_model_name]
        rows.append(
            {
                "id": "role-" + hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24],
                "modelId": model_id,
                "layer": source_id,
                "index": index,
                "description": description,
                "authorId": author_id,
                "notes": role.label,
                "scoreV1": 0,
                "scoreV2": None,
                "embedding": None,
                "typeName": type_name,
                "explanationModelName": explanation_model_name,
                "createdAt": created_at,
                "updatedAt": created_at,
            }
        )
    return rows


def explanation_type(creator_id: str, creator_name: str, *, created_at: str) -> dict[str, Any]:
    """The row of `config/explanation_type.jsonl` that the explanations' type name refers to."""
    return {
        "name": METHOD,
        "displayName": "Evidence of role",
        "description": "What adding the feature promotes, what it fires on, the emotion it tells; no language model",
        "featured": True,
        "isAttention": False,
        "creatorName": creator_name,
        "creatorId": creator_id,
        "createdAt": created_at,
        "updatedAt": created_at,
    }
