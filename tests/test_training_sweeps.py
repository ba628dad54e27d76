"""A sweep on a tiny model: one buffer, cells that stay when the process is killed, and a design that may not change."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HOOK, WORDS, labelled
from test_cli import refused

from sae_emotion_plugin import activation_store, recipe_sweep
from sae_emotion_plugin.activations import activation_batches
from sae_emotion_plugin.evaluation import DictionaryReport, Evaluation
from sae_emotion_plugin.evidence.scaling_laws import ScalingLaw
from sae_emotion_plugin.plugin import load_dictionary
from sae_emotion_plugin.recipe_sweep import sweep_recipe
from sae_emotion_plugin.recipes import TextSource, TrainingRecipe
from sae_emotion_plugin.training import TrainedDictionary
from sae_emotion_plugin.training.steps import TrainingDiverged
from sae_emotion_plugin.training_sweeps import cells
from sae_emotion_plugin.training_sweeps.design import SweepDesign
from sae_emotion_plugin.training_sweeps.laws import best_rates, scaling_laws, trends
from sae_emotion_plugin.training_sweeps.results import SweepCell, TrainingSweep

RECIPE = TrainingRecipe(
    name="tiny-sweep",
    sae_id="layer-0",
    model="tiny",
    hook_name=HOOK,
    texts=(TextSource("texts.jsonl", licence="CC0 1.0"),),
    architecture="openai-topk",
    d_sae=64,
    k=4,
    k_aux=8,
    multi_topk=2,
    epochs=1.0,
    lr=0.01,
    context_size=16,
    held_out_share=0.1,
    batch_size=32,
    dead_token_window=256,
    ema_decay=0.9,
)
DESIGN = SweepDesign(RECIPE, (1.0, 2.0), ks=(4,), seeds=(1,), tokens=600, held_out_texts=10, loss_tokens=50)
TEXTS = labelled(each=60, seed=0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[4:], size=rng.integers(4, 12))) for _ in range(150)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_store, "SHARD_TOKENS", 200)


def run(bridge: Any, root: Path, out: Path, design: SweepDesign = DESIGN, **options: Any) -> TrainingSweep:
    return sweep_recipe(design, bridge, root, out, texts=TEXTS, progress=False, **options)


@pytest.fixture(scope="module")
def swept(bridge: Any, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TrainingSweep, Path]]:
    out = tmp_path_factory.mktemp("swept") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_store, "SHARD_TOKENS", 200)
        yield run(bridge, root, out), out


def files(folder: Path) -> dict[str, bytes]:
    """All that a sweep leaves, apart from the activations and the pages, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def test_every_cell_is_a_dictionary_that_loads_with_its_figures(swept: tuple[TrainingSweep, Path]) -> None:
    sweep, out = swept
    assert [row.name for row in sweep.rows] == ["x1-k4-seed1", "x2-k4-seed1"]
    assert [row.d_sae for row in sweep.rows] == [32, 64]
    for row in sweep.rows:
        trained = TrainedDictionary.load(out / "cells" / row.name)
        assert (trained.recipe.d_sae, trained.recipe.seed, trained.report.fvu) == (row.d_sae, row.seed, row.fvu)
        assert load_dictionary(str(out / "cells" / row.name)).cfg.d_sae == row.d_sae
        kept = json.loads((out / "cells" / f"{row.name}.json").read_text())
        assert SweepCell.from_dict(kept["cell"]) == row and kept["sha256"] == trained.sha256
        assert f"d_sae: {row.d_sae}" in kept["recipe"] and kept["versions"]["torch"]
        assert row.curve and row.curve[-1][0] == row.tokens and 0 <= (row.dead_share or 0) < 1
        assert row.auroc is not None and row.random_auroc is not None and row.margin is not None
        assert row.margin == pytest.approx(row.auroc - row.random_auroc)
        assert row.l0 == pytest.approx(4, abs=0.6) and row.note == ""
    assert not list((out / "work").glob("x*")), "checkpoints of finished cells are several times the dictionaries"


def test_the_result_reads_as_it_was_saved_and_is_shown(swept: tuple[TrainingSweep, Path]) -> None:
    sweep, out = swept
    assert TrainingSweep.load(out / "sweep.json") == sweep
    assert len(sweep.to_pandas()) == 2
    shown = repr(sweep)
    assert "x2-k4-seed1" in shown and "L(N), k 4: no fit, it needs 5 different N, and there are 2" in shown
    assert "x2-k4-seed1" in sweep._repr_html_() and "x2-k4-seed1" in (out / "index.html").read_text()
    (out / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json holds no sweep"):
        TrainingSweep.load(out / "other.json")
    (out / "other.json").unlink()


def test_activations_are_collected_once_for_all_cells(
    bridge: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def counted(model: Any, texts: list[str], *arguments: Any, **options: Any) -> Any:
        seen.extend(texts)
        return activation_batches(model, texts, *arguments, **options)

    monkeypatch.setattr(activation_store, "activation_batches", counted)
    monkeypatch.setattr(recipe_sweep, "run_cell", lambda cell, *_: SweepCell(cell.name, 1.0, 32, 4, None, 1.0, 0))
    run(bridge, root, tmp_path / "a")
    assert seen and len(seen) == len(set(seen))
    assert len(list((tmp_path / "a/work").glob("activations-*"))) == 1
    before = len(seen)
    run(bridge, root, tmp_path / "a")
    assert len(seen) == before


def test_a_finished_cell_is_not_made_again_but_a_damaged_one_is(
    bridge: Any, root: Path, swept: tuple[TrainingSweep, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, out = swept
    before = files(out)
    (out / "cells/x2-k4-seed1.json").write_text('{"key": "')
    made = []
    monkeypatch.setattr(cells, "fit_recipe", lambda *_, **__: pytest.fail("its dictionary was whole"))
    assert run(bridge, root, out, say=made.append) == sweep
    assert [line for line in made if "cell" in line] == ["cell 2 of 2: x2-k4-seed1 ..."]
    assert files(out) == before


def test_a_sweep_that_was_killed_goes_on_and_ends_as_one_that_was_not(
    bridge: Any, root: Path, swept: tuple[TrainingSweep, Path], tmp_path: Path
) -> None:
    _, whole = swept
    # In the second cell, in the sixth step of its training, behind a checkpoint.
    pid = os.fork()
    if pid == 0:
        _killed(bridge, root, tmp_path / "sweep")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    finished = sorted(path.name for path in (tmp_path / "sweep/cells").glob("*.json"))
    assert finished == ["x1-k4-seed1.json"]
    assert list((tmp_path / "sweep/work/x2-k4-seed1").glob("checkpoints-*/step-*"))
    run(bridge, root, tmp_path / "sweep")
    ours, theirs = (files(one) for one in (tmp_path / "sweep", whole))
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if ours[name] != theirs[name]]
    # How often it was interrupted is on record, and so are the hashes of that record.
    assert set(differing) <= {"cells/x2-k4-seed1/provenance.json", "cells/x2-k4-seed1.json"}
    assert ours["sweep.json"] == theirs["sweep.json"]


def _killed(bridge: Any, root: Path, out: Path) -> None:
    from sae_emotion_plugin.training import fitting, loop
    from sae_emotion_plugin.training.steps import Trainer

    usual, whole_step = fitting.loop_settings, Trainer.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "loop_settings", lambda *a, **k: replace(usual(*a, **k), checkpoint_steps=3))

        def step(self: Trainer, batch: Any) -> Any:
            if self.sae.cfg.d_sae == 64 and self.step_number == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole_step(self, batch)

        patch.setattr(loop.Trainer, "step", step)
        run(bridge, root, out)


def test_a_changed_design_is_refused_with_the_difference(
    bridge: Any, root: Path, swept: tuple[TrainingSweep, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = swept
    monkeypatch.setattr(recipe_sweep, "collect", lambda *_: pytest.fail("nothing is to be collected"))
    with pytest.raises(ValueError, match=r"expansions was \[1.0, 2.0\] and is \[1.0, 2.0, 3.0\]\. Go on with"):
        run(bridge, root, out, replace(DESIGN, expansions=(1.0, 3.0, 2.0)))
    with pytest.raises(ValueError, match=r"recipe batch_size was 32 and is 64"):
        run(bridge, root, out, replace(DESIGN, recipe=replace(RECIPE, batch_size=64)))
    with pytest.raises(ValueError, match=r"tokens was 600 and is 500"):
        run(bridge, root, out, replace(DESIGN, tokens=500))


def test_a_training_that_diverges_is_a_result(
    bridge: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> Any:
        raise TrainingDiverged("training diverged at step 3: NaN; look at lr; the last good checkpoint is here")

    monkeypatch.setattr(cells, "fit_recipe", diverge)
    sweep = run(bridge, root, tmp_path / "sweep", DESIGN)
    assert all(row.fvu is None and row.note == "training diverged at step 3: NaN; look at lr" for row in sweep.rows)
    assert TrainingSweep.load(tmp_path / "sweep/sweep.json") == sweep
    assert "Every training diverged" in (tmp_path / "sweep/index.html").read_text()


def test_a_dictionary_that_is_silent_on_the_labelled_texts_has_no_auroc_and_says_why(
    bridge: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: Any, **__: Any) -> Any:
        raise ValueError("no feature is active in any training text")

    made_up = DictionaryReport(1, 2, 64, 0.5, 0.5, 0, 0.1, 0.5, 4.0, 0, 1.0, 2.0, 3.0, 9.0)
    monkeypatch.setattr(Evaluation, "report", lambda *_: replace(made_up, cross_entropy_spliced=float("inf")))
    monkeypatch.setattr(cells, "reference_margins", silent)
    (row,) = run(bridge, root, tmp_path / "sweep", replace(DESIGN, expansions=(1.0,))).rows
    assert row.auroc is None and row.note == "no AUROC: no feature is active in any training text"
    assert row.fvu == 0.5 and row.loss_recovered is None


def test_the_shipped_dictionary_s_architecture_is_swept_too(bridge: Any, root: Path, tmp_path: Path) -> None:
    topk = TrainingRecipe(**{**vars(RECIPE), "architecture": "topk", **dict.fromkeys(UNUSED)})
    (row,) = run(bridge, root, tmp_path / "s", SweepDesign(topk, (2.0,), (4,), tokens=300, loss_tokens=50)).rows
    assert row.fvu is not None and row.curve[-1][0] == row.tokens == 9 * 32


UNUSED = ("k_aux", "multi_topk", "multi_topk_weight", "tied_init")


def test_a_design_is_every_combination_of_its_values_around_the_recipe() -> None:
    found = SweepDesign(RECIPE, (2.0, 1.0), ks=(2, 4), lrs=(0.1, 0.2), seeds=(0, 5)).cells(32)
    assert len(found) == 16 and len({cell.name for cell in found}) == 16
    first, last = found[0], found[-1]
    assert (first.name, last.name) == ("x1-k2-lr0.1-seed0", "x2-k4-lr0.2-seed5")
    assert replace(last.recipe, name=RECIPE.name, seed=0, lr=0.01) == RECIPE
    assert SweepDesign(RECIPE).ks == (2, 4, 8) and SweepDesign(RECIPE).l1s == ()
    relu = TrainingRecipe.read("blog-distilgpt2-mlp5")
    assert SweepDesign(relu).l1s == (2.0, 4.0, 8.0) and SweepDesign(relu).ks == ()


def test_given_learning_rates_are_taken_as_they_are() -> None:
    scaled = replace(RECIPE, lr_reference_width=16)
    assert all(cell.recipe.lr_reference_width is None for cell in SweepDesign(scaled, lrs=(0.1, 0.2)).cells(32))
    assert all(cell.recipe.lr_reference_width == 16 for cell in SweepDesign(scaled).cells(32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expansions": (128.0,)}, "expansion 128 is not between 1 and 64"),
        ({"expansions": (2.0, 2.0)}, r"expansions has 2\.0 twice"),
        ({"expansions": ()}, "at least one expansion and one seed"),
        ({"lrs": (0.0,)}, "lrs has 0 .valid: above 0."),
        ({"lrs": (float("nan"),)}, "lrs has nan"),
        ({"seeds": (-1,)}, "seeds has -1 .valid: from 0."),
        ({"l1s": (1.0,)}, "l1 is not used by architecture 'openai-topk' .valid: k."),
        ({"tokens": 0}, "tokens is 0"),
    ],
)
def test_a_design_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepDesign(RECIPE, **changes)


def test_a_k_above_a_width_is_refused_before_anything_is_begun(bridge: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k 40 is not between 1 and d_sae 32"):
        run(bridge, root, tmp_path / "sweep", replace(DESIGN, ks=(40,)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused_and_kept(bridge: Any, root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds mine\.txt, and no sweep: choose a folder that does not exist"):
        run(bridge, root, tmp_path)
    with pytest.raises(ValueError, match=r"mine\.txt is a file: choose a folder"):
        run(bridge, root, tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_too_few_tokens_for_a_batch_are_refused(bridge: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens are fewer than one batch of 32"):
        run(bridge, root, tmp_path / "sweep", replace(DESIGN, tokens=5))


def planted(expansion: int, k: int, lr: float = 0.1, seed: int = 0, fvu: float | None = 0.0) -> SweepCell:
    """A cell that follows known laws: FVU 0.05 + 9 N^-0.6, falling with tokens to it; AUROC +0.01 a doubling."""
    width = 640 * expansion
    loss = (0.05 + 9 * width**-0.6) * (32 / k) ** 0.3 if fvu == 0.0 else fvu
    tokens = np.geomspace(2e3, 2e5, 60).astype(int).tolist()
    curve = tuple((t, (loss or 1) + 3 * math.exp(-t / (3 * width))) for t in tokens)
    auroc = 0.7 + 0.01 * math.log2(expansion)
    figures = (None, None) if fvu is None else (auroc, auroc - 0.6)
    return SweepCell(
        f"x{expansion}", float(expansion), width, k, None, lr, seed, 200_000, loss, auroc=figures[0], margin=figures[1],
        curve=curve,
    )  # fmt: skip


def test_laws_are_fitted_for_each_sparsity_and_find_what_was_planted() -> None:
    rows = [planted(expansion, k) for k in (16, 32, 64) for expansion in (2, 3, 4, 6, 8, 12, 16)]
    laws = {law.name: law for law in scaling_laws(rows, 640)}
    assert list(laws)[:3] == ["L(N), k 16", "L(C), k 16", "tokens to convergence, k 16"] and len(laws) == 11
    found = {one.name: one.value for one in laws["L(N), k 32"].parameters}
    assert found == pytest.approx({"e": 0.05, "a": 9, "b": 0.6}, rel=0.01)
    converged = {one.name: one.value for one in laws["tokens to convergence, k 32"].parameters}
    assert converged["b"] == pytest.approx(1, abs=0.3)
    assert "needs 4 widths with a stable rate" in str(laws["lr(N)"])
    found = {trend.name: trend for trend in trends(rows)}
    assert list(found) == [  # none of the loss recovered, which no cell has
        "FVU per doubling of the width",
        "AUROC per doubling",
        "margin over random directions per doubling",
    ]
    fvu, *aurocs = found.values()
    assert all(trend.value == pytest.approx(0.01) for trend in aurocs) and fvu.high < 0


def test_the_best_learning_rate_stands_for_a_width_and_diverged_ones_bound_the_stable_rate() -> None:
    expansions = (2, 4, 8, 16)
    rows = []
    for expansion in expansions:
        good, poor = planted(expansion, 32, 0.1 / expansion), planted(expansion, 32, 0.05 / expansion)
        rows += [good, replace(poor, fvu=1.5 * (poor.fvu or 0)), planted(expansion, 32, 0.4 / expansion, fvu=None)]
    assert [row.lr for row in best_rates(rows)] == [0.1 / one for one in expansions]
    law = scaling_laws(rows, 640)[-1]
    assert law.reason is None and law.parameters[1].low <= 1 <= law.parameters[1].high
    assert law.left_out[0].measured == pytest.approx(0.1)  # between 0.05 and 0.2
    # Where every rate diverged for one seed, none of them was stable.
    lost = [replace(row, seed=1, fvu=None) for row in rows if row.d_sae == 1280]
    assert "there are 3" in str(scaling_laws([*rows, *lost], 640)[-1])


def test_trainings_that_had_not_converged_are_counted_beside_the_law() -> None:
    rows = [planted(expansion, 32) for expansion in (2, 3, 4, 6, 8, 12, 16)]
    steep = tuple((tokens, 5e5 / tokens) for tokens in range(1000, 200_000, 2000))

    def converged(rows: list[SweepCell]) -> ScalingLaw:
        return next(law for law in scaling_laws(rows, 640) if law.name.startswith("tokens to convergence"))

    assert converged(rows[:3]).note == ""
    law = converged([*rows[:6], replace(rows[-1], curve=steep)])
    assert law.note == "2 of 7 trainings had not converged at their end and are left out"
    assert str(law).endswith(law.note) and ScalingLaw.from_dict(law.to_dict()) == law


def test_values_that_would_share_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two trainings would be called x2-k4-seed0: their values differ too little"):
        SweepDesign(RECIPE, (2.0, 2.0000001), ks=(4,)).cells(32)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    texts = ("--texts", str(tmp_path))
    out = str(tmp_path / "out")
    line = refused("sweep", "no-such-recipe", out, *texts)
    assert "no such recipe: no-such-recipe (valid: a YAML file, or blog-distilgpt2-mlp5" in line
    assert "embedded-sweep" in line and "blog-gpt2" not in line
    assert "--expansion is '2;4' (valid: numbers parted by commas)" in refused(
        "sweep", "embedded-sweep", out, *texts, "--expansion", "2;4"
    )
    assert "--k is '1.5' (valid: whole numbers" in refused("sweep", "embedded-sweep", out, *texts, "--k", "1.5")
    assert "expansion 100 is not between" in refused("sweep", "embedded-sweep", out, *texts, "--expansion", "100")
    assert "l1 is not used" in refused("sweep", "embedded-sweep", out, *texts, "--l1", "0.1")
    assert not Path(out).exists()


def test_the_defaults_of_the_command_are_those_of_the_design() -> None:
    from sae_emotion_plugin.cli import main
    from sae_emotion_plugin.training_sweeps.design import EXPANSIONS

    offered = {one.name: one.default for one in main.commands["sweep"].params}
    usual = SweepDesign(TrainingRecipe.read("embedded-sweep"))
    assert tuple(map(float, str(offered["expansion"]).split(","))) == EXPANSIONS == usual.expansions
    assert (offered["tokens"], offered["seed"]) == (usual.tokens, "0")


def test_a_design_loads_no_model_library() -> None:
    code = (
        "import sys\n"
        "from sae_emotion_plugin.recipes import TrainingRecipe\n"
        "from sae_emotion_plugin.training_sweeps.design import SweepDesign\n"
        "SweepDesign(TrainingRecipe.read('embedded-sweep'))\n"
        "print([name for name in ('torch', 'sae_lens') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_cells_are_names_of_files() -> None:
    found = SweepDesign(RECIPE, (1.5,), lrs=(1e-5, 3e-4)).cells(32)
    assert all(re.fullmatch(r"[\w.-]+", cell.name) for cell in found)
