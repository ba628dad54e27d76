"""A `SteeringPlan` (which features, how strongly) and the hook that carries it out on a model."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_emotion_plugin.activations import HookedModel, canonical_hook
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.sparse_codes import CHUNK_ENTRIES, checked_hook, flat_heads, token_settings
from sae_emotion_plugin.tables import html_table

if TYPE_CHECKING:
    import pandas

Mode = Literal["add", "clamp"]
Unit = Literal["residual_norm", "raw"]
Where = Callable[[Float[Tensor, "row position d_in"]], Bool[Tensor, "row position"] | None]


@dataclass(frozen=True)
class Intervention:
    """What happens to one feature.

    `add` adds the feature's unit decoder direction, whatever the feature's own activation; `clamp` sets the size of
    the feature's contribution and leaves everything else, the SAE's error term included, as it is.
    """

    feature: int
    amount: float | int
    mode: Mode = "add"

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount", float(self.amount))
        if self.mode not in get_args(Mode):
            raise ValueError(f"unknown mode {self.mode!r} (valid: {', '.join(get_args(Mode))})")
        if not math.isfinite(self.amount):
            raise ValueError(f"the amount of feature {self.feature} is {self.amount}; it must be finite")
        if self.feature < 0:
            raise ValueError(f"feature {self.feature} is negative (features count from 0)")


@dataclass(frozen=True)
class SteeringPlan:
    """Which features to steer at one hook, and how strongly. Plain data: no tensors, readable as JSON.

    In unit `residual_norm` an amount is a fraction of `residual_norm`, the mean norm of the activations at the hook
    (BOS excluded: `activations.mean_norm` measures it): 0.1 makes a change, or a clamped contribution, a tenth as long
    as a usual activation. In unit `raw` an added amount is a length in the model's own units, and a clamped amount the
    feature's activation itself.
    """

    hook_name: str
    interventions: tuple[Intervention, ...]
    unit: Unit = "residual_norm"
    residual_norm: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "interventions", tuple(self.interventions))
        if self.unit not in get_args(Unit):
            raise ValueError(f"unknown unit {self.unit!r} (valid: {', '.join(get_args(Unit))})")
        if not self.interventions:
            raise ValueError("a steering plan needs at least one intervention")
        features = self.features
        if repeated := sorted({feature for feature in features if features.count(feature) > 1}):
            raise ValueError(f"feature {repeated[0]} stands twice in the plan; give it one amount")
        norm = self.residual_norm
        if norm is None and self.unit == "residual_norm":
            raise ValueError("unit 'residual_norm' needs the norm: residual_norm=, or unit='raw'")
        if norm is not None and not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"residual_norm is {norm}; it must be finite and above 0")

    @classmethod
    def of(
        cls,
        amounts: Mapping[int, float | int],
        sae: Any,
        *,
        residual_norm: float | None = None,
        mode: Mode = "add",
        unit: Unit = "residual_norm",
    ) -> "SteeringPlan":
        """The plan that steers each feature of `amounts` by its amount, at the hook of `sae`.

        Raises:
            ValueError: no features, one that the SAE lacks, or an amount that is not finite.
        """
        interventions = tuple(Intervention(int(feature), amount, mode) for feature, amount in amounts.items())
        plan = cls(sae.cfg.metadata.hook_name, interventions, unit, residual_norm)
        check_plan(plan, sae)
        return plan

    @property
    def features(self) -> tuple[int, ...]:
        return tuple(intervention.feature for intervention in self.interventions)

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
        return {**asdict(self), "interventions": [asdict(one) for one in self.interventions]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SteeringPlan":
        """The plan of a dictionary as `to_dict` makes it. ValueError for missing and unknown keys."""
        _check_keys(cls, data)
        interventions = []
        for one in data["interventions"]:
            _check_keys(Intervention, one)
            interventions.append(Intervention(**one))
        return cls(**{**data, "interventions": tuple(interventions)})

    def save(self, path: str | Path) -> Path:
        """Returns `path` after writing the plan there as JSON; the file appears whole or not at all."""
        return write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "SteeringPlan":
        """The plan written by `save`."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path} holds no steering plan (a JSON object), but a {type(data).__name__}")
        return cls.from_dict(data)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each intervention: feature, mode, amount, unit."""
        import pandas as pd

        return pd.DataFrame([{**asdict(one), "unit": self.unit} for one in self.interventions])

    def __repr__(self) -> str:
        parts = (f"{one.mode} {one.amount:+g} x feature {one.feature}" for one in self.interventions)
        norm = "" if self.residual_norm is None else f" of {self.residual_norm:g}"
        return f"SteeringPlan({', '.join(parts)}; {self.unit}{norm} at {self.hook_name})"

    def _repr_html_(self) -> str:
        lines = ((str(one.feature), one.mode, f"{one.amount:+g}") for one in self.interventions)
        norm = "" if self.residual_norm is None else f" of {self.residual_norm:g}"
        caption = f"SteeringPlan at {self.hook_name}, amounts in {self.unit}{norm}"
        return html_table(caption, ("feature", "mode", "amount"), lines)


@contextmanager
def steering(
    model: HookedModel, sae: Any, plan: SteeringPlan, *, mask: Bool[Tensor, "row position"] | None = None
) -> Iterator[None]:
    """A context in which every call of the model is steered by the plan; leaving it restores the model exactly.

    BOS is never steered, as its activation is of another kind (an order of magnitude longer). Without a `mask` that is
    decided by position: when the SAE's metadata say that texts begin with BOS, the first position of every call is
    left alone, except in calls with a single position, which are the steps of a generation with a cache. So
    `model(tokens)`, `model(text)` and `model.generate` work, and padding on the right does no harm. For calls padded
    on the left give the mask.

    Added directions are summed; clamped features are read off the activation as it was before any of them.

    Args:
        mask: True where a position is steered, for every row and position of the calls made in this context; calls
            with a single position are steered there, as above.

    Raises:
        ValueError: the plan names a feature that the SAE lacks or was made for another hook; the SAE does not fit.
    """
    checked_hook(model, sae)
    skip_first = token_settings(sae)["prepend_bos"]

    def where(vectors: Float[Tensor, "row position d_in"]) -> Bool[Tensor, "row position"] | None:
        if mask is not None or not skip_first or vectors.shape[1] == 1:
            return _at(mask, vectors)
        steered = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        steered[:, 0] = False
        return steered

    with _hooked(model, sae, [plan], where):
        yield


@contextmanager
def row_steering(
    model: HookedModel,
    sae: Any,
    plans: Sequence[SteeringPlan | None],
    mask: Bool[Tensor, "row position"] | None = None,
) -> Iterator[None]:
    """A context in which row `i` of every batch is steered by `plans[i]`, or not at all where that is None.

    Args:
        mask: True where a position is steered: not on BOS and padding. Calls with a single position, the steps of a
            generation with a cache, are steered there whatever the mask; without a mask every position is steered.

    Raises:
        ValueError: as `steering`, save that the SAE's width is not checked; another number of rows than plans.
    """
    with _hooked(model, sae, plans, lambda vectors: _at(mask, vectors)):
        yield


def check_plan(plan: SteeringPlan, sae: Any) -> None:
    """Refuse a plan that was made for another hook or names a feature that the SAE lacks (ValueError)."""
    if plan.hook_name != sae.cfg.metadata.hook_name:
        raise ValueError(f"the plan steers {plan.hook_name}, the SAE reads {sae.cfg.metadata.hook_name}")
    for feature in plan.features:
        if feature >= sae.cfg.d_sae:
            raise ValueError(f"the SAE has no feature {feature} (valid: 0 to {sae.cfg.d_sae - 1})")


@contextmanager
def _hooked(model: HookedModel, sae: Any, plans: Sequence[SteeringPlan | None], where: Where) -> Iterator[None]:
    for plan in dict.fromkeys(plans):
        if plan is not None:
            check_plan(plan, sae)
    active = [plan for plan in plans if plan is not None]
    if not active:
        yield
        return
    added = _added(sae, plans)
    clamped = _Clamps.of(sae, plans)

    def steer(tensor: Tensor, hook: Any) -> Tensor:
        vectors = tensor.flatten(start_dim=2)
        if len(plans) not in (1, len(vectors)):
            raise ValueError(f"{len(plans)} plans for a batch of {len(vectors)} rows")
        changed = vectors + added.to(vectors)[:, None]
        if clamped is not None:
            changed = changed + clamped.change(vectors.detach()).to(vectors)
        steered = where(vectors)
        if steered is not None:
            changed = torch.where(steered.to(vectors.device)[..., None], changed, vectors)
        return changed.view_as(tensor)

    with model.hooks(fwd_hooks=[(canonical_hook(model, active[0].hook_name), steer)]):
        yield


@torch.no_grad()
def _added(sae: Any, plans: Sequence[SteeringPlan | None]) -> Float[Tensor, "row d_in"]:
    """What the `add` interventions add to each row's activations."""
    rows = torch.zeros(len(plans), sae.cfg.d_in)
    known: dict[SteeringPlan, Tensor] = {}
    for row, plan in enumerate(plans):
        if plan is None:
            continue
        if plan not in known:
            adds = [one for one in plan.interventions if one.mode == "add"]
            weights = torch.tensor([one.amount * (_norm(plan) or 1.0) for one in adds])
            known[plan] = weights @ _unit_directions(sae, [one.feature for one in adds])
        rows[row] = known[plan]
    return rows.to(sae.device)


@dataclass(frozen=True)
class _Clamps:
    """The `clamp` interventions of a batch; a row with fewer than `k` has the rest at `wanted` False."""

    sae: Any
    features: Int[Tensor, "row k"]
    wanted: Bool[Tensor, "row k"]
    amounts: Float[Tensor, "row k"]
    """The contribution's length, or the activation itself in unit raw."""
    raw: Bool[Tensor, "row k"]
    directions: Float[Tensor, "row k d_in"]
    lengths: Float[Tensor, "row k"]
    """The length of one unit of activation in the SAE's own space."""

    @classmethod
    @torch.no_grad()
    def of(cls, sae: Any, plans: Sequence[SteeringPlan | None]) -> "_Clamps | None":
        clamps = [[(plan, one) for one in plan.interventions if one.mode == "clamp"] if plan else [] for plan in plans]
        k = max(len(row) for row in clamps)
        if k == 0:
            return None
        features = torch.zeros(len(plans), k, dtype=torch.int64)
        wanted, raw = torch.zeros(len(plans), k, dtype=torch.bool), torch.zeros(len(plans), k, dtype=torch.bool)
        amounts = torch.zeros(len(plans), k)
        for row, column, plan, one in (
            (row, column, *pair) for row, pairs in enumerate(clamps) for column, pair in enumerate(pairs)
        ):
            features[row, column], wanted[row, column] = one.feature, True
            raw[row, column] = plan.unit == "raw"
            amounts[row, column] = one.amount * (_norm(plan) or 1.0)
        norms = sae.W_dec.detach()[features.to(sae.device)].float().norm(dim=-1)
        # Some SAEs count activations in lengths of the contribution and divide by the row's norm when decoding.
        lengths = torch.ones_like(norms) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else norms
        directions = _unit_directions(sae, features.flatten().tolist()).view(len(plans), k, -1)
        moved = (tensor.to(sae.device) for tensor in (features, wanted, amounts, raw, directions, lengths))
        return cls(sae, *moved)

    @torch.no_grad()
    def change(self, vectors: Float[Tensor, "row position d_in"]) -> Float[Tensor, "row position d_in"]:
        """What has to be added so that each clamped feature contributes its amount."""
        rows, positions = vectors.shape[:2]
        vectors = vectors.to(self.sae.device, self.sae.dtype)
        features = self.features.expand(rows, -1)[:, None].expand(-1, positions, -1)
        codes = _codes_of(self.sae, vectors.flatten(0, 1), features.flatten(0, 1)).view(rows, positions, -1)
        one_unit = self.lengths[:, None] * _token_scale(self.sae, vectors)
        target = torch.where(self.raw[:, None], self.amounts[:, None] * one_unit, self.amounts[:, None])
        missing = (target - codes * one_unit) * self.wanted[:, None]
        return torch.einsum("rpk,rkd->rpd", missing, self.directions.expand(rows, -1, -1))


def _at(
    mask: Bool[Tensor, "masked_row masked"] | None, vectors: Float[Tensor, "row position d_in"]
) -> Bool[Tensor, "row position"] | None:
    """The mask of a call: none for the steps of a generation with a cache, which see new tokens alone."""
    if mask is None or vectors.shape[1] == 1 != mask.shape[1]:
        return None
    if mask.shape != vectors.shape[:2]:
        raise ValueError(f"the mask is {tuple(mask.shape)}, the activations {tuple(vectors.shape[:2])}")
    return mask


def _norm(plan: SteeringPlan) -> float | None:
    return plan.residual_norm if plan.unit == "residual_norm" else None


def _unit_directions(sae: Any, features: Sequence[int]) -> Float[Tensor, "feature d_in"]:
    return torch.nn.functional.normalize(sae.W_dec.detach()[list(features)].float().cpu(), dim=-1)


def _codes_of(
    sae: Any, vectors: Float[Tensor, "token d_in"], features: Int[Tensor, "token k"]
) -> Float[Tensor, "token k"]:
    """The activations of the given features of each token, by the SAE's own `encode`."""
    step = max(1, CHUNK_ENTRIES // sae.cfg.d_sae)
    parts = []
    with flat_heads(sae):
        for chunk, wanted in zip(vectors.split(step), features.split(step), strict=True):
            codes = sae.encode(chunk)
            parts.append((codes.to_dense() if codes.is_sparse else codes).gather(1, wanted).float())
    return torch.cat(parts)


def _token_scale(sae: Any, vectors: Float[Tensor, "row position d_in"]) -> Float[Tensor, "row position 1"] | float:
    """By how much the SAE stretches each token's reconstruction, to undo its normalisation of the input.

    `decode` is no way to find out: a layer-normed SAE forgets the mean and deviation after one call.
    """
    if sae.cfg.normalize_activations == "layer_norm":
        return vectors.float().std(dim=-1, keepdim=True)  # unbiased, as SAELens and the published code have it
    if sae.cfg.normalize_activations == "constant_norm_rescale":
        return vectors.float().norm(dim=-1, keepdim=True) / math.sqrt(sae.cfg.d_in)
    return 1.0


def _check_keys(kind: type, data: Mapping[str, Any]) -> None:
    names = [field.name for field in fields(kind)]
    required = [name for name in names if not hasattr(kind, name)]
    if missing := [name for name in required if name not in data]:
        raise ValueError(f"{kind.__name__} has no {missing[0]!r} (valid keys: {', '.join(names)})")
    if unknown := [name for name in data if name not in names]:
        raise ValueError(f"{kind.__name__} has an unknown key {unknown[0]!r} (valid: {', '.join(names)})")
