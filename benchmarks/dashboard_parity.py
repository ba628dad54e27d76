"""Our dashboards against SAEDashboard's own, definition by definition, on the same tiny models, SAEs and tokens.

    python benchmarks/dashboard_parity.py [--peer-python PYTHON [--record FOLDER]]

PYTHON has `sae-dashboard` 0.8.0 in an environment of its own, where upstream's Neuronpedia runner runs as it is.
Without it, upstream's side is what was recorded (tests/data/sae_dashboard, which `--record` writes). A line is one
definition in one setting: the largest difference over all features, and whether that is within upstream's rounding
(3 decimals, of percents too). Where we differ on purpose (`build_dashboards` says why) the line says what is compared.
The last line is one JSON object; `agree` is false, and the exit status 1, where a line goes beyond the rounding.
"""

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.setting import gpt2_config, random_gpt2, random_words, read_folder, run_peer, word_tokenizer, write_folder

RECORDED = Path(__file__).parents[1] / "tests" / "data" / "sae_dashboard"
HOOK = "blocks.1.hook_resid_post"
WORDS = random_words(120)
CONFIG = gpt2_config(WORDS, n_embd=16, n_layer=3, n_head=2, n_positions=32)
D_SAE, PROMPTS, CONTEXT = 24, 50, 20
ROUNDING = 0.0006
"""Upstream's 3 decimals, to 4 or 5 before in some places, and float32's own for activations up to 100."""
PERCENT_ROUNDING = 0.0000051


@dataclass(frozen=True)
class Setting:
    name: str
    sae: str
    prepend_bos: bool = True
    eos_inside: bool = False
    """Some texts spell out the EOS token."""


SETTINGS = (
    Setting("relu", "relu", prepend_bos=False),
    Setting("jumprelu", "jumprelu", prepend_bos=False),
    Setting("topk", "topk", prepend_bos=False),
    Setting("topk-bos", "topk"),
    Setting("relu-bos-eos", "relu", eos_inside=True),
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
    parser.add_argument("--record", type=Path, help="folder for upstream's input and output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        recorded = RECORDED
        if options.peer_python:
            recorded = options.record or Path(work) / "recorded"
            record(options.peer_python, recorded)
        lines, versions = [], {}
        for folder in sorted(path for path in recorded.iterdir() if path.is_dir()):
            theirs = json.loads(gzip.decompress((folder / "features.json.gz").read_bytes()))
            versions = theirs["versions"]
            lines += compared(folder, our_dashboards(folder, Path(work) / folder.name), theirs["features"])
    for line in lines:
        verdict = "equal" if line.agrees else "DIFFERS"
        print(f"{line.setting:14} {line.definition:66} {line.difference:10.2g} {verdict}")
    agree = all(line.agrees for line in lines)
    largest = {line.definition: 0.0 for line in lines}
    for line in lines:
        largest[line.definition] = max(largest[line.definition], line.difference)
    print(json.dumps({"agree": agree, "lines": len(lines), "largest_differences": largest, "peer": versions}))
    sys.exit(not agree)


def record(python: str, folder: Path) -> None:
    """Write what SAEDashboard reads, and what it makes of it, for each setting."""
    for setting in SETTINGS:
        write_setting(setting, folder / setting.name)
    with tempfile.TemporaryDirectory() as work:
        for setting, made in zip(
            SETTINGS, run_peer(python, [folder / setting.name for setting in SETTINGS], Path(work)), strict=True
        ):
            kept = {"features": made["features"], "versions": made["versions"]}
            (folder / setting.name / "features.json.gz").write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))


def write_setting(setting: Setting, folder: Path) -> None:
    ids = np.random.default_rng(1).integers(3, len(WORDS), (PROMPTS, CONTEXT))
    if setting.eos_inside:
        ids[::4, CONTEXT // 2] = 1
    if setting.prepend_bos:
        ids[:, 0] = 0
    texts = [" ".join(WORDS[word] for word in row) for row in ids[:8]]
    write_folder(
        folder, tiny_model(), CONFIG, WORDS, tiny_sae(setting), ids, texts, features_per_batch=D_SAE, batches=1
    )


def our_dashboards(folder: Path, out: Path) -> Any:
    """Our dashboards of what SAEDashboard reads in the folder."""
    from sae_emotion_plugin.dashboards.build import build_dashboards
    from sae_emotion_plugin.models import load_model

    model, words, sae, tokens = read_folder(folder)
    first = int(sae.cfg.metadata.prepend_bos)
    texts = [" ".join(words[word] for word in row[first:]) for row in tokens]
    return build_dashboards(load_model(model, tokenizer=word_tokenizer(words)), sae, texts, out, progress=False)


def tiny_model() -> Any:
    """Random weights with mean 0 over the residual stream, where SAEDashboard's loading would move them."""
    model = random_gpt2(CONFIG)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 0.3 + ("ln" in name and "weight" in name)
            )
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
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if setting.sae == "relu":
            sae.b_enc -= 10
        if setting.sae == "jumprelu":
            sae.threshold.fill_(10.0)
        sae.b_enc[5] = -1e6  # a feature that never fires
    return sae.eval()


def compared(folder: Path, ours: Any, features: list[dict[str, Any]]) -> Iterator[Line]:
    """The lines of one setting: our dashboards, and the features of upstream's batches."""
    tokens = np.load(folder / "tokens.npy")
    shown, prepend_bos = tokens.size, bool((tokens[:, 0] == 0).all())
    # BOS and EOS are silent in both, but upstream counts them among the tokens.
    of_all = ours.n_tokens / shown
    pairs = [(ours.feature(peer["feature_index"]), peer) for peer in features]
    alive = [(own, peer) for own, peer in pairs if own.n_active]
    dead = [(own, peer) for own, peer in pairs if not own.n_active]
    if not dead or len(alive) < len(pairs) // 2:
        raise ValueError(f"{folder.name}: {len(alive)} features fire and {len(dead)} do not; both kinds are needed")

    def line(definition: str, differences: Iterator[float], allowed: float = 0.0) -> Line:
        return Line(folder.name, definition, max(differences), allowed)

    yield line("features that fire", (float(bool(own.n_active) != (peer["frac_nonzero"] > 0)) for own, peer in pairs))
    yield line(
        "share of tokens on which it fires, BOS and EOS counted",
        (abs(own.fraction_active * of_all - peer["frac_nonzero"]) for own, peer in pairs),
        PERCENT_ROUNDING,
    )
    # Of equal values upstream makes bins without a width; ours begin at 0.
    spread = [(own, peer) for own, peer in alive if own.activations.lowest]
    for name, histogram, those in (("freq", "activations", spread), ("logits", "logits", pairs)):
        places = f"{name}_hist_data_bar_values"
        yield line(
            f"{histogram}: centres of the 50 bins",
            (largest(getattr(own, histogram).centres, peer[places]) for own, peer in those),
            ROUNDING,
        )
        heights = f"{name}_hist_data_bar_heights"
        yield line(
            f"{histogram}: tokens in another bin",
            (np.abs(np.subtract(getattr(own, histogram).counts, peer[heights])).sum() / 2 for own, peer in those),
            1.0,  # at a bin's very end the rounding of the models' own activations decides
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
    yield from groups(prepend_bos, alive, of_all, line)
    tables = [("neuron_alignment", "aligned_neurons", "value", "l1_share", ("values", "l1"), pairs)]
    if ours.n_tokens == shown:  # with BOS upstream's correlations are over other tokens
        for name in ("neurons", "features"):
            rows = f"correlated_{name}"
            tables.append((rows, rows, "pearson", "cosine", ("pearson", "l1"), alive))
    for key, rows, first, second, columns, those in tables:
        # Upstream lists features that are not correlated, or negatively; we only positive correlations.
        cut = [
            (
                getattr(own, rows),
                {name: peer[f"{key}_{name}"][: len(getattr(own, rows))] for name in ("indices", *columns)},
            )
            for own, peer in those
        ]
        yield line(f"{key}: which", (float([one.index for one in own] != peer["indices"]) for own, peer in cut))
        for ours_name, name in zip((first, second), columns, strict=True):
            yield line(
                f"{key}: {ours_name}",
                (largest([getattr(one, ours_name) for one in own], peer[name]) for own, peer in cut),
                ROUNDING,
            )


def groups(
    prepend_bos: bool, alive: list[tuple[Any, dict[str, Any]]], of_all: float, line: Callable[..., Line]
) -> Iterator[Line]:
    """The lines on sequences."""
    cut = int(not prepend_bos)  # upstream shows no sequence's first token, whatever it is
    tops, rows, ends, shares, sampled = [], [], [], [], []
    for own, peer in alive:
        top, *parts = own.groups
        of_bin: dict[tuple[float, float], list[dict[str, Any]]] = {}
        for row in peer["activations"]:
            of_bin.setdefault((row["bin_min"], row["bin_max"]), []).append(row)
        (first, *bins), (their_top, *their_parts) = of_bin, of_bin.values()
        ends.append(largest((-1, top.highest), first))
        strongest = their_top[: own.n_active]  # upstream fills the group up with silent tokens
        distinct = list(dict.fromkeys(tuple(row["tokens"]) for row in strongest))
        # Texts that begin alike are tied, so what is compared is the maxima.
        maxima = {one.tokens[cut:]: one.maximum for one in top.sequences}
        found = [maxima.get(tokens, float("inf")) for tokens in distinct]
        tops.append(largest(found, [one.maximum for one in top.sequences[: len(found)]]))
        of_tokens = {tuple(row["tokens"]): row["values"] for row in strongest}
        rows += [
            largest(one.values[cut:], of_tokens[one.tokens[cut:]])
            for one in top.sequences
            if one.tokens[cut:] in of_tokens
        ]
        # Upstream's groups without a row do not appear in its output.
        held = [part for part in parts if part.share or part.lowest == 0]
        if len(held) != len(bins):
            ends.append(float("inf"))
        for part, limits, theirs in zip(held, bins, their_parts, strict=False):
            ends.append(largest((part.lowest, part.highest), limits))
            silent = 1 - of_all if part.lowest == 0 else 0
            shares.append(abs(part.share * of_all + silent - theirs[0]["bin_contains"]))
            within = [part.lowest <= one.maximum <= part.highest for one in part.sequences]
            sampled.append(float(not all(within) or len(theirs) > 5))
    yield line("strongest: sequences in order, upstream's repetitions folded", iter(tops), ROUNDING)
    yield line("strongest: values of their tokens", iter(rows), ROUNDING)
    yield line("groups: their order and ends", iter(ends), ROUNDING)
    yield line("intervals: share of the tokens, BOS and EOS counted", iter(shares), PERCENT_ROUNDING)
    yield line("intervals: at most 5 sequences, ours with their maximum inside", iter(sampled))


def largest(one: Any, other: Any) -> float:
    """The largest difference; infinite where the lengths differ."""
    if len(one) != len(other):
        return float("inf")
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).max(initial=0))


if __name__ == "__main__":
    main()
