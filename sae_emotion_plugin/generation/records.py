"""Steered continuations beside their baselines, judged: rows, their file, and what steering did and cost over many."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_emotion_plugin.evidence.resampling import bootstrap_mean_interval
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.tables import html_table

if TYPE_CHECKING:
    import pandas

Part = Literal["choose", "report", "demo"]
ROWS_SHOWN = 12


@dataclass(frozen=True)
class Generation:
    """A steered continuation beside the unsteered one of the same prompt and decoding: a row of `generations.json`."""

    prompt: str
    emotion: str
    features: tuple[int, ...]
    mode: str
    amount: float
    """Sum of the sizes of the plan's amounts (`SteeringPlan.amount`)."""
    unit: str
    temperature: float
    seed: int
    part: Part
    baseline_text: str
    text: str
    baseline_valence: float
    valence: float
    baseline_nll: float | None
    nll: float | None
    degenerate: bool
    baseline_degenerate: bool


@dataclass(frozen=True)
class Summary:
    """Effect and cost of steering over some rows."""

    n_rows: int
    n_prompts: int
    valence_change: float
    low: float | None
    """Ends of the bootstrap interval (95 %) over prompts; None with a single prompt."""
    high: float | None
    perplexity_ratio: float | None
    degenerate_share: float
    baseline_degenerate_share: float


@dataclass(frozen=True)
class Generations:
    """Steered continuations with their baselines, and how they were made."""

    meta: dict[str, Any]
    rows: tuple[Generation, ...]

    def to_pandas(self) -> "pandas.DataFrame":
        """One line for each row, columns named as the fields of `Generation`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows], columns=[one.name for one in fields(Generation)])

    def save(self, path: str | Path) -> Path:
        """Returns `path` after writing `{"meta": {...}, "rows": [...]}` there; the file appears whole or not at all."""
        meta = json.dumps(self.meta, ensure_ascii=False, allow_nan=False, indent=1)
        rows = (json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) for row in self.rows)
        return write_whole(path, f'{{"meta": {meta},\n"rows": [\n' + ",\n".join(rows) + "\n]}\n")

    @classmethod
    def load(cls, path: str | Path) -> "Generations":
        """The generations written by `save`. ValueError for a file that holds something else."""
        names = {one.name for one in fields(Generation)}
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            meta, rows = data["meta"], data["rows"]
            if wrong := [row for row in rows if set(row) != names]:
                raise ValueError(f"a row lacks or adds {', '.join(sorted(set(wrong[0]) ^ names))}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no generations: {error}") from error
        return cls(meta, tuple(Generation(**{**row, "features": tuple(row["features"])}) for row in rows))

    def _table(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows[:ROWS_SHOWN]:
            how = "greedy" if row.temperature == 0 else f"T {row.temperature:g}, seed {row.seed}"
            dose = f"{row.emotion or '/'.join(map(str, row.features))} {row.amount:+g}"
            before, after = (" ".join(text.split()) for text in (row.baseline_text, row.text))
            yield row.prompt, f"{dose} ({how})", before, after, f"{row.baseline_valence:+.2f} to {row.valence:+.2f}"

    def __repr__(self) -> str:
        prompts = len({row.prompt for row in self.rows})
        lines = [f"Generations({len(self.rows)} rows, {prompts} prompts, {min(len(self.rows), ROWS_SHOWN)} shown)"]
        for prompt, dose, before, after, change in self._table():
            lines += [f"{prompt!r} | {dose} | valence {change}", f"  before: {before}", f"  after:  {after}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(f"{len(self.rows)} rows", ("prompt", "steering", "before", "after", "valence"), self._table())


def perplexity_ratio(rows: Sequence[Generation]) -> float | None:
    """Perplexity of the steered over that of the unsteered continuations: the geometric mean over prompts.

    A prompt's rows (seeds) are averaged in log space first. Rows with an empty continuation have no likelihood and
    are left out; None when no row remains.
    """
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.nll is not None and row.baseline_nll is not None:
            ratios.setdefault(row.prompt, []).append(row.nll - row.baseline_nll)
    mean = mean_of_known(mean_of_known(logs) for logs in ratios.values())
    return None if mean is None else math.exp(mean)


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known; None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def summary(rows: Sequence[Generation], *, seed: int = 0) -> Summary:
    """Mean change of valence with its bootstrap interval over prompts, perplexity ratio and degenerate shares.

    ValueError when there are no rows. The seed is the bootstrap's.
    """
    if not rows:
        raise ValueError("no generations to summarise")
    changes = [row.valence - row.baseline_valence for row in rows]
    prompts = [row.prompt for row in rows]
    n_prompts = len(set(prompts))
    interval = bootstrap_mean_interval(changes, groups=prompts, seed=seed) if n_prompts > 1 else None
    return Summary(
        n_rows=len(rows),
        n_prompts=n_prompts,
        valence_change=math.fsum(changes) / len(changes),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        perplexity_ratio=perplexity_ratio(rows),
        degenerate_share=sum(row.degenerate for row in rows) / len(rows),
        baseline_degenerate_share=sum(row.baseline_degenerate for row in rows) / len(rows),
    )
