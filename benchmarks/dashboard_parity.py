"""Our dashboards against SAEDashboard's own, definition by definition, on the same tiny models, SAEs and tokens.

    python benchmarks/dashboard_parity.py --peer-python PYTHON

PYTHON has `sae-dashboard` 0.8.0 installed, in an environment of its own; it runs upstream's Neuronpedia runner as it is.
Every line is one definition in one setting: the largest difference over all features, and whether that is within
upstream's rounding (3 decimals, percents too). What must agree is compared as it is; where we differ on purpose
(`build_dashboards` says why) the line says what is compared. The last line is one JSON object; `agree` is false, and
the exit status 1, where a line goes beyond the rounding. Without --peer-python nothing is compared.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.setting import gpt2_config, random_gpt2, random_words, run_peer, word_tokenizer, write_folder

HOOK = "blocks.1.hook_resid_post"
WORDS = random_words(200)
CONFIG = gpt2_config(WORDS, n_embd=32, n_layer=3, n_head=2, n_positions=64)
D_SAE, PROMPTS, CONTEXT = 48, 60, 24
ROUNDING = 0.00051
PERCENT_ROUNDING = 0.0000051


@dataclass(frozen=True)
class Setting:
    name: str
    sae: str
    prepend_bos: bool = True
    eos_inside: bool = False
    """Some texts spell out the EOS token."""


SETTINGS = (
    Setting("ReLU, no BOS", "relu", prepend_bos=False),
    Setting("TopK, no BOS", "topk", prepend_bos=False),
    Setting("JumpReLU, no BOS", "jumprelu", prepend_bos=False),
    Setting("ReLU, BOS and EOS", "relu", eos_inside=True),
    Setting("TopK, BOS", "topk"),
)


@dataclass(frozen=True)
class Line:
    """One definition in one setting."""

    setting: str
    definition: str
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python", help="a Python that has sae-dashboard")
    options = parser.parse_args()
    if not options.peer_python:
        print(json.dumps({"agree": None, "reason": "no --peer-python: a Python that has sae-dashboard 0.8.0"}))
        return
    with tempfile.TemporaryDirectory() as work:
        folders = [Path(work) / str(number) for number in range(len(SETTINGS))]
        ours = [prepared(setting, folder) for setting, folder in zip(SETTINGS, folders, strict=True)]
        theirs = run_peer(options.peer_python, folders)
        lines = [
            line
            for setting, own, peer in zip(SETTINGS, ours, theirs, strict=True)
            for line in compared(setting, own, peer)
        ]
    for line in lines:
        verdict = "equal" if line.agrees else "DIFFERS"
        print(f"{line.setting:18} {line.definition:62} {line.difference:10.2g} {verdict}")
    agree = all(line.agrees for line in lines)
    print(
        json.dumps(
            {
                "agree": agree,
                "lines": len(lines),
                "largest": {
                    name: max(line.difference for line in lines if line.definition == name)
                    for name in dict.fromkeys(line.definition for line in lines)
                },
                "peer": theirs[0]["versions"],
            }
        )
    )
    sys.exit(not agree)


def prepared(setting: Setting, folder: Path) -> Any:
    """Our dashboards; SAEDashboard's folder is written."""
    from sae_emotion_plugin.dashboards.build import build_dashboards
    from sae_emotion_plugin.models import load_model

    model, sae = tiny_model(), tiny_sae(setting)
    ids = np.random.default_rng(1).integers(3, len(WORDS), (PROMPTS, CONTEXT))
    if setting.eos_inside:
        ids[::4, CONTEXT // 2] = 1
    if setting.prepend_bos:
        ids[:, 0] = 0
    texts = [" ".join(WORDS[word] for word in row[int(setting.prepend_bos) :]) for row in ids]
    write_folder(folder, model, CONFIG, WORDS, sae, ids, texts, features_per_batch=D_SAE, batches=1)
    hooked = load_model(model, tokenizer=word_tokenizer(WORDS))
    return build_dashboards(hooked, sae, texts, folder / "ours", progress=False)


def tiny_model() -> Any:
    """Random weights with mean 0 over the residual stream, where SAEDashboard's loading would move them."""
    model = random_gpt2(CONFIG)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + ("ln" in name and "weight" in name))
            if name.endswith(("wte.weight", "wpe.weight")) or "c_proj" in name:
                parameter -= parameter.mean(dim=-1, keepdim=True)
    return model


def tiny_sae(setting: Setting) -> Any:
    """Random weights; decoder rows of several lengths, so that folding shows."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    common: dict[str, Any] = {
        "d_in": CONFIG["n_embd"],
        "d_sae": D_SAE,
        "metadata": SAEMetadata(
            hook_name=HOOK, model_name="model", context_size=CONTEXT, prepend_bos=setting.prepend_bos
        ),
    }
    sae = {
        "relu": lambda: StandardSAE(StandardSAEConfig(**common)),
        "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**common)),
        "topk": lambda: TopKSAE(TopKSAEConfig(k=4, rescale_acts_by_decoder_norm=True, **common)),
    }[setting.sae]()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if setting.sae == "relu":
            sae.b_enc -= 10
        if setting.sae == "jumprelu":
            sae.threshold.fill_(10.0)
        sae.b_enc[5] = -1e6  # a feature that never fires
    return sae.eval()


def compared(setting: Setting, ours: Any, theirs: dict[str, Any]) -> Iterator[Line]:
    """The lines of one setting."""
    shown = PROMPTS * CONTEXT
    # BOS and EOS are silent in both, but upstream counts them among the tokens.
    of_all = ours.n_tokens / shown
    pairs = [(ours.feature(peer["feature_index"]), peer) for peer in theirs["features"]]
    alive = [(own, peer) for own, peer in pairs if own.n_active]
    dead = [(own, peer) for own, peer in pairs if not own.n_active]
    if not dead or len(alive) < D_SAE // 2:
        raise ValueError(f"{setting.name}: {len(alive)} features fire and {len(dead)} do not; both kinds are needed")

    def line(definition: str, differences: Iterator[float], allowed: float = 0.0) -> Line:
        return Line(setting.name, definition, max(differences), allowed)

    yield line("features that fire", (float(bool(own.n_active) != (peer["frac_nonzero"] > 0)) for own, peer in pairs))
    yield line(
        "share of tokens on which it fires, BOS and EOS counted",
        (abs(own.fraction_active * of_all - peer["frac_nonzero"]) for own, peer in pairs),
        PERCENT_ROUNDING,
    )
    for name, histogram in (("freq", "activations"), ("logits", "logits")):
        places = f"{name}_hist_data_bar_values"
        yield line(
            f"{histogram}: centres of the 50 bins",
            (largest(getattr(own, histogram).centres, peer[places]) for own, peer in alive),
            ROUNDING,
        )
        heights = f"{name}_hist_data_bar_heights"
        yield line(
            f"{histogram}: counts in the bins",
            (largest(getattr(own, histogram).counts, peer[heights]) for own, peer in alive),
        )
    for side, effects in (("pos", "promoted"), ("neg", "suppressed")):
        yield line(
            f"{effects}: the ten tokens",
            (float([one.token for one in getattr(own, effects)] != peer[f"{side}_str"]) for own, peer in pairs),
        )
        yield line(
            f"{effects}: effects on their logits",
            (largest([one.effect for one in getattr(own, effects)], peer[f"{side}_values"]) for own, peer in pairs),
            ROUNDING,
        )
    yield from groups(setting, alive, of_all, line)
    tables = [("neuron_alignment", "aligned_neurons", "value", "l1_share", ("values", "l1"), pairs)]
    if ours.n_tokens == shown:  # with BOS upstream's correlations are over other tokens
        for name in ("neurons", "features"):
            rows = f"correlated_{name}"
            tables.append((rows, rows, "pearson", "cosine", ("pearson", "l1"), alive))
    for key, rows, first, second, columns, those in tables:
        # Upstream lists features that are not correlated, or negatively; we only positive correlations.
        cut = [
            (getattr(own, rows), {name: peer[f"{key}_{name}"][: len(getattr(own, rows))] for name in ("indices", *columns)})
            for own, peer in those
        ]
        yield line(
            f"{key}: which", (float([one.index for one in own] != peer["indices"]) for own, peer in cut)
        )
        for ours_name, name in zip((first, second), columns, strict=True):
            yield line(
                f"{key}: {ours_name}",
                (largest([getattr(one, ours_name) for one in own], peer[name]) for own, peer in cut),
                ROUNDING,
            )


def groups(
    setting: Setting, alive: list[tuple[Any, dict[str, Any]]], of_all: float, line: Callable[..., Line]
) -> Iterator[Line]:
    """The lines on sequences."""
    cut = int(not setting.prepend_bos)  # upstream shows no sequence's first token, whatever it is
    tops, rows, intervals, samples = [], [], [], []
    for own, peer in alive:
        top, *parts = own.groups
        of_bin: dict[tuple[float, float], list[dict[str, Any]]] = {}
        for row in peer["activations"]:
            of_bin.setdefault((row["bin_min"], row["bin_max"]), []).append(row)
        bins = list(of_bin)
        strongest = [row for row in of_bin[bins[0]] if qualifying(row) != 0]
        distinct = list(dict.fromkeys(tuple(row["tokens"]) for row in strongest))
        tops.append(float(distinct != [one.tokens[cut:] for one in top.sequences[: len(distinct)]]))
        of_tokens = {tuple(row["tokens"]): row["values"] for row in strongest}
        rows += [largest(one.values[cut:], of_tokens[one.tokens[cut:]]) for one in top.sequences if one.tokens[cut:] in of_tokens]
        intervals.append(abs(bins[0][1] - top.highest) if bins[0][0] == -1 else np.inf)
        intervals += [largest((part.lowest, part.highest), ends) for part, ends in zip(parts, bins[1:], strict=True)]
        for part, ends in zip(parts, bins[1:], strict=True):
            silent = 1 - of_all if part.lowest == 0 else 0
            samples.append(abs(part.share * of_all + silent - of_bin[ends][0]["bin_contains"]))
    yield line("strongest: sequences and their order, upstream's repetitions folded", iter(tops))
    yield line("strongest: values of their tokens", iter(rows), ROUNDING)
    yield line("intervals: ends and order of the groups", iter(intervals), ROUNDING)
    yield line("intervals: share of the tokens, BOS and EOS counted", iter(samples), PERCENT_ROUNDING)


def qualifying(row: dict[str, Any]) -> float:
    """The value on the token for which upstream took the row; NaN for the sequence's first, which it does not show."""
    place = row["qualifying_token_index"]
    return row["values"][place] if place >= 0 else float("nan")


def largest(one: Any, other: Any) -> float:
    """The largest difference; infinite where the lengths differ."""
    if len(one) != len(other):
        return float("inf")
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).max(initial=0))


if __name__ == "__main__":
    main()
