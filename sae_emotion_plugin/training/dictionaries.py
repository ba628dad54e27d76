"""`TrainedDictionary`: a folder that plain SAELens loads, what made it and how good it is; and its registration."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from sae_emotion_plugin.evaluation import DictionaryReport
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.recipes import TrainingRecipe
from sae_emotion_plugin.registry import RegistryEntry
from sae_emotion_plugin.release_files import ReleaseFiles, install, trained_entry

PACKAGES = ("sae-emotion-plugin", "sae-lens", "torch", "transformer-lens", "transformers")
"""Whose versions a dictionary's provenance names."""


@dataclass(frozen=True)
class TrainedDictionary:
    """A folder that plain SAELens loads, with what made it and how good it is."""

    folder: Path
    recipe: TrainingRecipe
    report: DictionaryReport
    sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file in the folder."""

    @classmethod
    def load(cls, folder: str | Path) -> "TrainedDictionary":
        """The dictionary that `train` wrote to `folder`. FileNotFoundError or ValueError for any other folder."""
        folder = Path(folder)
        if not (folder / "report.json").is_file():
            raise FileNotFoundError(f"no trained dictionary in {folder}: it has no report.json")
        recipe = TrainingRecipe.read(folder / "recipe.yaml")
        return cls(folder, recipe, DictionaryReport.load(folder / "report.json"), file_hashes(folder))

    def provenance(self) -> dict[str, Any]:
        """What the dictionary was made from: model, texts, versions, seed."""
        return json.loads((self.folder / "provenance.json").read_text(encoding="utf-8"))


def write_dictionary(
    out_dir: Path,
    recipe: TrainingRecipe,
    model: Any,
    evaluated: Callable[[Any], DictionaryReport],
    save_weights: Callable[[Path], None],
    provenance: dict[str, Any],
) -> TrainedDictionary:
    """The dictionary whose weights `save_weights` writes, with its report, recipe and provenance; whole or not at all.

    Args:
        evaluated: the report on held-out documents of an SAE as it was saved.
        save_weights: writes `cfg.json` and `sae_weights.safetensors` into the folder that it is given.
        provenance: what is added to the model, the seed and the versions.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed in here
    try:
        scratch.mkdir()
        save_weights(scratch)
        from sae_lens import SAE

        report = evaluated(SAE.load_from_disk(scratch))
        report.save(scratch / "report.json")
        (scratch / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        record = {
            "model": model_identity(model),
            "held_out_documents": report.n_documents,
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "seed": recipe.seed,
            **({"reference": recipe.reference} if recipe.reference else {}),
            **provenance,
        }
        write_whole(scratch / "provenance.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        for path in scratch.iterdir():
            path.chmod(0o644)
        os.replace(scratch, out_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return TrainedDictionary(out_dir, recipe, report, file_hashes(out_dir))


def register_dictionary(trained: TrainedDictionary, folder: str | Path) -> RegistryEntry:
    """The registry entry of a trained dictionary, after its files were copied to `folder` and the YAML file written.

    It comes beside the other dictionaries of its release.

    Raises:
        ValueError: the release has another dictionary of that id or is of another model, or a name in the recipe
            cannot stand in a registry.
    """
    hashes = file_hashes(trained.folder)
    entry = trained_entry(trained.recipe, asdict(trained.report), trained.provenance(), hashes)
    files = {f"{trained.recipe.sae_id}/{name}": trained.folder / name for name in hashes}
    return install(ReleaseFiles(entry, files), folder)


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file directly in a folder, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()
    }
