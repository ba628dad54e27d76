"""Where a dictionary stands in Neuronpedia: its model, release, set and source, and what their pages say of it."""

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from sae_emotion_plugin.dashboards.types import Dashboards
from sae_emotion_plugin.publishing.neuronpedia_checks import HF_FOLDER, SET_NAME

_MODEL_ID = re.compile(r"[a-z0-9][a-z0-9._-]*")
_KINDS = {"resid": ("res", "Residual"), "mlp": ("mlp", "MLP"), "attn": ("att", "Attention")}


@dataclass(frozen=True)
class NeuronpediaModel:
    """A model as Neuronpedia knows it."""

    id: str
    """Neuronpedia's own short name, such as gpt2-small."""
    layers: int
    dimension: int
    """Width of the residual stream."""
    neurons_per_layer: int = 0
    display_name: str = ""
    owner: str = ""
    hf_id: str | None = None
    instruct: bool = False

    def __post_init__(self) -> None:
        if not _MODEL_ID.fullmatch(self.id):
            raise ValueError(f"model id is {self.id!r}; valid: lower-case letters, digits, '.', '_' and '-'")
        if self.layers < 1 or self.dimension < 1 or self.neurons_per_layer < 0:
            raise ValueError(f"layers is {self.layers}, dimension {self.dimension}; valid: from 1")


@dataclass(frozen=True)
class NeuronpediaSource:
    """Where a dictionary stands in Neuronpedia, and what its page says of it."""

    model: NeuronpediaModel
    layer: int
    set_name: str
    """Such as emotion-res-4k: without the layer."""
    release: str
    """Name of the release, which is also its address; several sources may share it."""
    creator: str
    description: str
    created_at: str
    """Date and time in ISO 8601; without a zone, UTC."""
    hf_repo_id: str
    """OWNER/REPO of the published dictionary."""
    hf_folder: str
    """Of its cfg.json and weights in the repository; Neuronpedia cannot read them at the top."""
    suffix: str = ""
    creator_short: str = ""
    description_short: str = ""
    kind: str = "Residual"
    visibility: str = "PUBLIC"
    dataset: str | None = None
    """What the texts of the dashboards are."""
    urls: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not SET_NAME.fullmatch(self.set_name) or self.set_name == "neurons":
            raise ValueError(f"set name is {self.set_name!r}; valid: lower-case letters, digits, single hyphens")
        if self.layer < 0 or (self.suffix and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", self.suffix)):
            raise ValueError(f"layer is {self.layer}, suffix {self.suffix!r}; valid: from 0; letters, digits, '.', '-'")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.release):
            raise ValueError(f"release is {self.release!r}; valid: letters, digits, '.', '_' and '-'")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.hf_repo_id) or not HF_FOLDER.fullmatch(self.hf_folder):
            found = f"{self.hf_repo_id}:{self.hf_folder}"
            raise ValueError(f"the published dictionary is {found!r}; valid: OWNER/REPO:FOLDER, FOLDER not empty")
        if self.visibility not in ("PUBLIC", "UNLISTED"):
            raise ValueError(f"visibility is {self.visibility!r}; valid: PUBLIC, UNLISTED (PRIVATE hides everything)")
        for name in ("creator", "description", "kind"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty; the page shows it")
        _date(self.created_at)

    @property
    def id(self) -> str:
        """Neuronpedia's `<layer>-<set>[__<suffix>]`."""
        return f"{self.layer}-{self.set_name}" + (f"__{self.suffix}" if self.suffix else "")

    @property
    def date(self) -> str:
        """`created_at` in UTC, as Neuronpedia writes it."""
        return _date(self.created_at)


def source_at(
    sae: Any,
    model: NeuronpediaModel,
    *,
    published: str,
    creator: str,
    created_at: str,
    release: str | None = None,
    set_name: str | None = None,
    description: str | None = None,
    **more: Any,
) -> NeuronpediaSource:
    """The source of a dictionary, with what its configuration and metadata say.

    Args:
        published: where the dictionary is on the Hugging Face Hub, as OWNER/REPO:FOLDER.
        release: by default the repository's name.
        set_name: by default that of the SAE's `neuronpedia_id`, else such as emotion-res-4k.
        more: other fields of `NeuronpediaSource`.

    Raises ValueError for an SAE that reads no layer's hook, and for names that Neuronpedia would not take.
    """
    metadata = sae.cfg.metadata
    hook = str(metadata.hook_name)
    at = re.fullmatch(r"blocks\.(\d+)\.(?:hook_)?(resid|mlp|attn).*", hook)
    if at is None:
        raise ValueError(f"the dictionary reads {hook}; valid: the residual stream, MLP or attention of a block")
    code, kind = _KINDS[at[2]]
    width, named = int(sae.cfg.d_sae), str(metadata.neuronpedia_id or "").partition("/")[2]
    size = f"{width // 1024}k" if width % 1024 == 0 else str(width)
    own_set = re.sub(r"^\d+-|__.*$", "", named) or f"emotion-{code}-{size}"
    repo, _, folder = published.partition(":")
    return NeuronpediaSource(
        model=model,
        layer=int(at[1]),
        set_name=set_name or own_set,
        release=release or repo.rpartition("/")[2],
        creator=creator,
        description=description or f"Emotion features of {model.display_name or model.id} at {hook}, {width} in all",
        created_at=created_at,
        hf_repo_id=repo,
        hf_folder=folder,
        **{"kind": kind, "description_short": f"Emotion, {kind}, {size}", **more},
    )


def shown_config(sae: Any) -> dict[str, Any]:
    """The dictionary's configuration as the page shows it: one level, as JSON can hold it."""
    nested = json.loads(json.dumps(sae.cfg.to_dict(), default=str))
    metadata = nested.pop("metadata", {})
    nested.pop("device", None)
    layer = re.match(r"blocks\.(\d+)\.", str(metadata.get("hook_name")))
    shown = {
        **metadata,
        **nested,
        "hook_layer": int(layer[1]) if layer else None,
        "architecture": sae.cfg.architecture(),
    }
    return {key: value for key, value in shown.items() if isinstance(value, str | int | float | bool)}


def check_same_dictionary(dashboards: Dashboards, sae: Any) -> None:
    """ValueError where the dashboards are of another dictionary, by the largest weights of its decoder rows.

    Not by a hash: that depends on the machine that the dictionary was loaded on.
    """
    made = dashboards.meta["hook_name"], dashboards.d_sae
    if made != (own := (sae.cfg.metadata.hook_name, int(sae.cfg.d_sae))):
        raise ValueError(
            f"the dashboards are of {made[1]} features at {made[0]}; the dictionary has {own[1]} at {own[0]}"
        )
    rows = sae.W_dec.detach().float().cpu().numpy()
    if dashboards.meta.get("folded"):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    aligned = np.asarray(dashboards.aligned_neurons)
    inside = aligned.max(initial=0) < rows.shape[1]
    if not inside or not np.allclose(np.take_along_axis(rows, aligned, 1), dashboards.aligned_values, 1e-2, 1e-3):
        raise ValueError("the dashboards are of another dictionary: its decoder has other weights")


def _date(text: str) -> str:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"created_at is {text!r}; valid: a date and time such as 2026-01-31T12:00:00Z") from None
    utc = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    return utc.strftime("%Y-%m-%dT%H:%M:%S.000Z")
