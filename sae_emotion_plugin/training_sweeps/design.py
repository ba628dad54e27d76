"""`SweepDesign`: a base recipe and what is varied around it, as data. No torch."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from sae_emotion_plugin.recipes import ARCHITECTURES, TrainingRecipe

EXPANSIONS = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
LARGEST_EXPANSION = 64.0
SPARSITY = (0.5, 1.0, 2.0)
"""Of the recipe's k or L1 coefficient, where neither is given."""


@dataclass(frozen=True)
class Cell:
    """One training of a sweep."""

    name: str
    expansion: float
    recipe: TrainingRecipe


@dataclass(frozen=True)
class SweepDesign:
    """What is trained: every combination of the values below, all else as in the recipe."""

    recipe: TrainingRecipe
    expansions: tuple[float, ...] = EXPANSIONS
    """Features for each dimension of the hook, 1 to 64."""
    ks: tuple[int, ...] | None = None
    """By default half, once and twice the recipe's; none for an architecture without k."""
    l1s: tuple[float, ...] | None = None
    """Coefficients, in the same way."""
    lrs: tuple[float, ...] = ()
    """Peak learning rates, taken as they are; without them the recipe's, which may depend on the width."""
    seeds: tuple[int, ...] = (0,)
    """Of weights and order; the texts are those of the recipe's seed."""
    tokens: int = 200_000
    """Tokens that are collected, about."""
    held_out_texts: int = 400
    """Held-out texts that FVU and loss recovered are measured on, about, drawn evenly."""
    loss_tokens: int = 2_000
    """The cross-entropies are measured on about this many tokens of them."""

    def __post_init__(self) -> None:
        if self.recipe.reference is not None:
            raise ValueError(f"{self.recipe.name} is of a reference ({self.recipe.reference}): give a trained one's")
        k, l1 = self.recipe.k, self.recipe.l1_coefficient
        if self.ks is None:
            usual = () if k is None else dict.fromkeys(max(1, round(k * one)) for one in SPARSITY)
            object.__setattr__(self, "ks", tuple(usual))
        if self.l1s is None:
            object.__setattr__(self, "l1s", () if l1 is None else tuple(l1 * one for one in SPARSITY))
        for name in ("expansions", "ks", "l1s", "lrs", "seeds"):
            values = getattr(self, name)
            if twice := [one for one in values if values.count(one) > 1]:
                raise ValueError(f"{name} has {twice[0]} twice")
            if bad := [one for one in values if not math.isfinite(one) or one < 0 or (one == 0 and name != "seeds")]:
                raise ValueError(f"{name} has {bad[0]:g} (valid: {'from 0' if name == 'seeds' else 'above 0'})")
        if not self.expansions or not self.seeds:
            raise ValueError("a sweep needs at least one expansion and one seed")
        if bad := [one for one in self.expansions if not 1 <= one <= LARGEST_EXPANSION]:
            raise ValueError(f"expansion {bad[0]:g} is not between 1 and {LARGEST_EXPANSION:g}")
        used = ARCHITECTURES[self.recipe.architecture]
        for name, key, values in (("k", "k", self.ks), ("l1", "l1_coefficient", self.l1s)):
            if values and key not in used:
                valid = "k" if "k" in used else "l1" if "l1_coefficient" in used else "neither k nor l1"
                raise ValueError(f"{name} is not used by architecture {self.recipe.architecture!r} (valid: {valid})")
        for name in ("tokens", "held_out_texts", "loss_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} (valid: a whole number from 1)")

    def cells(self, d_in: int) -> tuple[Cell, ...]:
        """The trainings for a hook of so many dimensions, the narrow ones first. ValueError for a k above a width."""
        found = []
        axes = (sorted(self.expansions), self.ks or (None,), self.l1s or (None,), self.lrs or (None,), self.seeds)
        for expansion, k, l1, lr, seed in itertools.product(*axes):
            changes: dict[str, Any] = {"d_sae": round(expansion * d_in), "seed": seed}
            parts = [f"x{expansion:g}"]
            if k is not None:
                changes["k"] = k
                parts.append(f"k{k}")
            if l1 is not None:
                changes["l1_coefficient"] = l1
                parts.append(f"l1-{l1:g}")
            if lr is not None:
                changes["lr"] = lr
                if self.recipe.lr_reference_width is not None:
                    changes["lr_reference_width"] = None
                parts.append(f"lr{lr:g}")
            name = "-".join([*parts, f"seed{seed}"])
            found.append(Cell(name, expansion, replace(self.recipe, name=f"{self.recipe.name}-{name}", **changes)))
        names = [cell.name for cell in found]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two trainings would be called {twice[0]}: their values differ too little")
        return tuple(found)

    def settings(self) -> dict[str, Any]:
        """What the cells depend on, as JSON can hold it: the recipe by its keys, and the values of the sweep."""
        own = {"expansions": sorted(self.expansions), "ks": self.ks, "l1s": self.l1s, "lrs": self.lrs}
        counts = {name: getattr(self, name) for name in ("seeds", "tokens", "held_out_texts", "loss_tokens")}
        return {
            **{f"recipe {key}": value for key, value in vars(self.recipe).items() if key != "texts"},
            **own,
            **counts,
        }
