"""A `SteeringPlan`: which features to steer, how strongly, where and when. Plain data: no tensors, readable as JSON."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.models import weights_identity
from sae_emotion_plugin.tables import html_table

if TYPE_CHECKING:
    import pandas

Mode = Literal["add", "clamp", "scale", "ablate", "project-out"]
Unit = Literal["residual_norm", "max_activation", "activation", "raw"]
DIMENSIONLESS = ("scale", "ablate", "project-out")
"""Modes whose amount is a plain factor, whatever the plan's unit."""
NEEDS_CODES = ("clamp", "scale", "ablate")
"""Modes that read the feature's own activation, and so act only where the SAE reads."""
PLACES = ("all", "prompt", "generated", "last")
_RANGE = re.compile(r"(\d*):(\d*)")


@dataclass(frozen=True)
class Intervention:
    """What happens to one feature.

    - `add` adds the feature's decoder direction, whatever the feature's own activation.
    - `clamp` sets the feature's contribution and leaves everything else as it is, the SAE's error term included.
    - `scale` multiplies the feature's contribution by the amount, a factor.
    - `ablate` takes the contribution away: the amount is the share that goes, 1 is all of it.
    - `project-out` takes away what the activation has along the decoder direction, active or not, in the same shares.
    """

    feature: int
    amount: float | int
    mode: Mode = "add"
    max_activation: float | None = None
    """The feature's largest activation on some corpus; needed by the unit of that name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount", float(self.amount))
        if self.mode not in get_args(Mode):
            raise ValueError(f"unknown mode {self.mode!r} (valid: {', '.join(get_args(Mode))})")
        if not math.isfinite(self.amount):
            raise ValueError(f"the amount of feature {self.feature} is {self.amount}; it must be finite")
        if self.feature < 0:
            raise ValueError(f"feature {self.feature} is negative (features count from 0)")
        largest = self.max_activation
        if largest is not None and not (math.isfinite(largest) and largest > 0):
            raise ValueError(f"max_activation of feature {self.feature} is {largest}; it must be finite and above 0")


@dataclass(frozen=True)
class Gate:
    """Steer a token only where a feature of the same dictionary is more active than `above` on it.

    A probe is a gate too: make it a feature of a dictionary of directions (`directions.direction_dictionary`).
    """

    feature: int
    above: float = 0.0

    def __post_init__(self) -> None:
        if self.feature < 0:
            raise ValueError(f"the gate's feature {self.feature} is negative (features count from 0)")
        if not math.isfinite(self.above):
            raise ValueError(f"the gate opens above {self.above}; it must be finite")


@dataclass(frozen=True)
class SteeringPlan:
    """Which features to steer, and how strongly, where and when. Plain data: no tensors, readable as JSON.

    What an amount of 0.1 of `add` or `clamp` means is said by the unit:

    - `residual_norm` (default): a change, or a clamped contribution, a tenth as long as a usual activation; a fraction
      of `residual_norm`, the mean norm of the activations at the hook (BOS excluded: `activations.mean_norm`).
    - `activation`: the feature's contribution when its activation is 0.1: the decoder row as it is, stretched as the
      SAE stretches its reconstructions. An SAE on layer-normed activations has its decoder in normalised space: the
      contribution is then as many times longer as the token's own standard deviation.
    - `max_activation`: the same, in multiples of the intervention's `max_activation`.
    - `raw`: an added amount is a length in the model's own units along the unit direction, whatever the SAE's
      normalisation (the usual "x20"); a clamped amount is an activation.

    `scale`, `ablate` and `project-out` have factors, not units.
    """

    hook_name: str
    """Where the dictionary reads."""
    interventions: tuple[Intervention, ...]
    unit: Unit = "residual_norm"
    residual_norm: float | None = None
    at: tuple[str, ...] = ()
    """The hooks where the plan acts; empty for `hook_name`. Elsewhere only `add` and `project-out` make sense."""
    positions: str = "all"
    """`all`, `prompt`, `generated`, `last` (what predicts the continuation: the prompt's last token and all generated
    ones), or a range such as `2:5` or `3:` of tokens counted from the text's first, BOS not counted."""
    first_tokens: int | None = None
    """Only that many generated tokens are steered (what the prompt gets is not changed)."""
    decay: float = 1.0
    """The n-th generated token (from 1) is changed by decay^n times the amounts; does not apply to the prompt."""
    gate: Gate | None = None
    keep_error: bool = True
    """False replaces the activation by the SAE's reconstruction before anything else, as many snippets do."""
    dictionary: str | None = None
    """SHA-256 of the dictionary's weights; a plan that names it is refused with another dictionary."""
    model: str | None = None
    """SHA-256 of what identifies the model; a plan that names it is refused on another model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "interventions", tuple(self.interventions))
        object.__setattr__(self, "at", tuple(self.at))
        object.__setattr__(self, "decay", float(self.decay))
        if self.unit not in get_args(Unit):
            raise ValueError(f"unknown unit {self.unit!r} (valid: {', '.join(get_args(Unit))})")
        if not self.interventions:
            raise ValueError("a steering plan needs at least one intervention")
        features = self.features
        if repeated := sorted({feature for feature in features if features.count(feature) > 1}):
            raise ValueError(f"feature {repeated[0]} stands twice in the plan; give it one amount")
        self._check_amounts()
        self._check_places()

    def _check_amounts(self) -> None:
        norm = self.residual_norm
        measured = [one for one in self.interventions if one.mode not in DIMENSIONLESS]
        if norm is None and self.unit == "residual_norm" and measured:
            raise ValueError("unit 'residual_norm' needs the norm: residual_norm=, or unit='raw'")
        if norm is not None and not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"residual_norm is {norm}; it must be finite and above 0")
        if self.unit == "max_activation":
            for one in measured:
                if one.max_activation is None:
                    raise ValueError(f"unit 'max_activation' needs the max_activation of feature {one.feature}")
        removed = {one.amount for one in self.interventions if one.mode == "project-out"}
        if len(removed) > 1:
            raise ValueError(f"directions projected out together need one amount, got {sorted(removed)}")

    def _check_places(self) -> None:
        if repeated := [hook for hook in self.at if self.at.count(hook) > 1]:
            raise ValueError(f"the hook {repeated[0]} stands twice in the plan")
        elsewhere = [hook for hook in self.at if hook != self.hook_name]
        reads = [one.mode for one in self.interventions if one.mode in NEEDS_CODES]
        if elsewhere and (reads or not self.keep_error):
            what = reads[0] if reads else "keep_error=False"
            raise ValueError(f"{what} reads the SAE's activations at {self.hook_name} and cannot act at {elsewhere[0]}")
        if self.gate is not None and elsewhere:
            raise ValueError(f"a gate is read at {self.hook_name} and cannot act at {elsewhere[0]}")
        if self.positions not in PLACES:
            match = _RANGE.fullmatch(self.positions)
            begin, end = (match[1], match[2]) if match else ("", "")
            if not match or (begin and end and int(begin) >= int(end)):
                valid = f"{', '.join(PLACES)}, or a range such as 2:5"
                raise ValueError(f"unknown positions {self.positions!r} (valid: {valid})")
        if self.first_tokens is not None and self.first_tokens < 1:
            raise ValueError(f"first_tokens is {self.first_tokens}; it must be at least 1")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; it must be above 0 and at most 1")

    @classmethod
    def of(
        cls,
        amounts: Mapping[int, float | int],
        sae: Any,
        *,
        residual_norm: float | None = None,
        mode: Mode = "add",
        unit: Unit = "residual_norm",
        max_activations: Mapping[int, float] | None = None,
        model: Any = None,
        **where: Any,
    ) -> "SteeringPlan":
        """The plan that steers each feature of `amounts` by its amount, bound to `sae`, and to `model` where given.

        Args:
            max_activations: each feature's largest activation on some corpus (`interventions.activations_on`).
            where: further fields, by name: `at`, `positions`, `first_tokens`, `decay`, `gate`, `keep_error`.

        Raises:
            ValueError: no features, one that the SAE lacks, or an amount that is not finite.
        """
        plan = cls(
            sae.cfg.metadata.hook_name,
            tuple(
                Intervention(int(feature), amount, mode, (max_activations or {}).get(feature))
                for feature, amount in amounts.items()
            ),
            unit,
            residual_norm,
            dictionary=dictionary_sha256(sae),
            model=None if model is None else model_sha256(model),
            **where,
        )
        check_plan(plan, sae)
        return plan

    def unbound(self) -> "SteeringPlan":
        """The plan for whatever dictionary and model it is used with: features and directions may mean other things."""
        return replace(self, dictionary=None, model=None)

    @property
    def features(self) -> tuple[int, ...]:
        return tuple(intervention.feature for intervention in self.interventions)

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks where the plan acts."""
        return self.at or (self.hook_name,)

    @property
    def span(self) -> tuple[int, int | None] | None:
        """First position and the one behind the last (None: no end) of `positions` given as a range; else None."""
        match = _RANGE.fullmatch(self.positions)
        return (int(match[1] or 0), int(match[2]) if match[2] else None) if match else None

    @property
    def everywhere(self) -> bool:
        """Whether every token but BOS is steered alike."""
        return self.positions == "all" and self.first_tokens is None and self.decay == 1 and self.gate is None

    @property
    def amount(self) -> float:
        """The sum of the amounts' sizes; negative when every amount is at most 0."""
        amounts = [intervention.amount for intervention in self.interventions]
        total = math.fsum(abs(amount) for amount in amounts)
        return -total if total and max(amounts) <= 0 else total

    @property
    def mode(self) -> str:
        """The mode of all interventions, or `mixed`."""
        modes = {intervention.mode for intervention in self.interventions}
        return modes.pop() if len(modes) == 1 else "mixed"

    def scaled(self, factor: float | int) -> "SteeringPlan":
        """The plan with every amount times `factor`."""
        scaled = tuple(replace(one, amount=one.amount * factor) for one in self.interventions)
        return replace(self, interventions=scaled)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return {**asdict(self), "interventions": [asdict(one) for one in self.interventions], "at": list(self.at)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SteeringPlan":
        """The plan of a dictionary as `to_dict` makes it. ValueError for missing and unknown keys."""
        _check_keys(cls, data)
        given = dict(data)
        for name, kind in (("interventions", Intervention), ("gate", Gate)):
            parts = given.get(name) or ()
            for one in [parts] if isinstance(parts, Mapping) else parts:
                _check_keys(kind, one)
        given["interventions"] = tuple(Intervention(**one) for one in given["interventions"])
        given["at"] = tuple(given.get("at", ()))
        if given.get("gate"):
            given["gate"] = Gate(**given["gate"])
        return cls(**given)

    def save(self, path: str | Path) -> Path:
        """Returns `path` after writing the plan there as JSON; the file appears whole or not at all."""
        return write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "SteeringPlan":
        """The plan written by `save`. ValueError for a file that holds something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path} holds no steering plan (a JSON object), but a {type(data).__name__}")
        return cls.from_dict(data)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each intervention: feature, amount, mode, max_activation, unit."""
        import pandas as pd

        return pd.DataFrame([{**asdict(one), "unit": self.unit} for one in self.interventions])

    def __repr__(self) -> str:
        parts = (f"{one.mode} {one.amount:+g} x feature {one.feature}" for one in self.interventions)
        return f"SteeringPlan({', '.join(parts)}; {self._where()})"

    def _repr_html_(self) -> str:
        lines = ((str(one.feature), one.mode, f"{one.amount:+g}") for one in self.interventions)
        return html_table(f"SteeringPlan: amounts in {self._where()}", ("feature", "mode", "amount"), lines)

    def _where(self) -> str:
        norm = "" if self.residual_norm is None else f" of {self.residual_norm:g}"
        extras = [
            "" if self.positions == "all" else f"positions {self.positions}",
            "" if self.first_tokens is None else f"first {self.first_tokens} tokens",
            "" if self.decay == 1 else f"decay {self.decay:g}",
            f"where feature {self.gate.feature} > {self.gate.above:g}" if self.gate else "",
            "" if self.keep_error else "without the error term",
        ]
        return ", ".join([f"{self.unit}{norm} at {' and '.join(self.hooks)}", *filter(None, extras)])


def check_plan(plan: SteeringPlan, sae: Any, model: Any = None) -> None:
    """Refuse a plan of another hook, dictionary or model, or with a feature that the SAE lacks (ValueError)."""
    if plan.hook_name != sae.cfg.metadata.hook_name:
        raise ValueError(f"the plan steers {plan.hook_name}, the SAE reads {sae.cfg.metadata.hook_name}")
    for feature in (*plan.features, *([plan.gate.feature] if plan.gate else [])):
        if feature >= sae.cfg.d_sae:
            raise ValueError(f"the SAE has no feature {feature} (valid: 0 to {sae.cfg.d_sae - 1})")
    if plan.dictionary is not None and plan.dictionary != (own := dictionary_sha256(sae)):
        raise ValueError(f"the plan was made for the dictionary {plan.dictionary[:12]}, this one is {own[:12]}")
    if model is not None and plan.model is not None and plan.model != (own := model_sha256(model)):
        raise ValueError(f"the plan was made for the model {plan.model[:12]}, this one is {own[:12]}")


def dictionary_sha256(sae: Any) -> str:
    """A hash of the dictionary's weights and of the way it is applied, the same wherever it was loaded from."""
    weights = {name: value for name, value in sae.state_dict().items()}
    versions = tuple((name, value.data_ptr(), value._version) for name, value in weights.items())
    known = _HASHES.get(sae)
    if known is None or known[0] != versions:
        settings = sae.cfg.to_dict()  # with the architecture by which the SAE is saved
        config = [settings["architecture"], sae.cfg.normalize_activations, getattr(sae.cfg, "k", None)]
        digest = hashlib.sha256(json.dumps(config, default=str).encode())
        for name, value in sorted(weights.items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().data)
        _HASHES[sae] = known = (versions, digest.hexdigest())
    return known[1]


_HASHES: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()


def model_sha256(model: Any) -> str:
    """A hash of what identifies the model's weights (`models.weights_identity`)."""
    return hashlib.sha256(json.dumps(weights_identity(model), sort_keys=True).encode()).hexdigest()


def _check_keys(kind: type, data: Mapping[str, Any]) -> None:
    names = [field.name for field in fields(kind)]
    required = [name for name in names if not hasattr(kind, name)]
    if missing := [name for name in required if name not in data]:
        raise ValueError(f"{kind.__name__} has no {missing[0]!r} (valid keys: {', '.join(names)})")
    if unknown := [name for name in data if name not in names]:
        raise ValueError(f"{kind.__name__} has an unknown key {unknown[0]!r} (valid: {', '.join(names)})")
