"""The commands `sae-emotion publish ...`."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import click

from sae_emotion_plugin.cli.options import json_option, label_options, labels_of


@click.group()
def publish() -> None:
    """Make a dictionary public."""


@publish.command()
@click.argument("dictionary")
@click.argument("repo", metavar="OWNER/REPO")
@label_options
@click.option("--neuronpedia", type=click.Path(path_type=Path), help="Folder of an export for Neuronpedia.")
@click.option("--report", "page", type=click.Path(path_type=Path), help="A report in HTML.")
@click.option("--licence", help="Licence of the dictionary, for the card; by default what the registry says.")
@click.option("--dataset", "datasets", multiple=True, help="A dataset on the Hub, for the card (repeatable).")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--revision", help="Branch to commit to; created when it is not there.")
@click.option("--pull-request", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--force", is_flag=True, help="Publish over another dictionary, or over something else.")
@click.option("--dry-run", is_flag=True, help="List every file with its size and SHA-256; nothing is sent.")
@json_option
def hub(
    dictionary: str,
    repo: str,
    labels: tuple[Path, ...],
    scores: Path | None,
    author: str | None,
    neuronpedia: Path | None,
    page: Path | None,
    licence: str | None,
    datasets: tuple[str, ...],
    private: bool,
    revision: str | None,
    pull_request: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish DICTIONARY (a registry name or a trained folder) on the Hugging Face Hub as OWNER/REPO, in one commit.

    Plain SAE.from_pretrained("OWNER/REPO", id) loads it from there, and `sae-emotion registry add OWNER/REPO` fetches
    it with its labels. The token is the one of `hf auth login` or HF_TOKEN.
    """
    from sae_emotion_plugin.publishing.hub import publish as run
    from sae_emotion_plugin.publishing.hub_files import prepare
    from sae_emotion_plugin.release_files import open_release

    release = open_release(dictionary)
    what = {
        "labels": labels_of(labels, scores, author),
        "neuronpedia": neuronpedia,
        "page": page,
        "licence": licence,
        "datasets": datasets or None,
    }
    if dry_run:
        publication = prepare(release, repo, **what)
        click.echo(json.dumps(publication.to_dict(), indent=2) if as_json else repr(publication))
        return
    done = run(release, repo, private=private, revision=revision, pull_request=pull_request, force=force, **what)
    if as_json:
        click.echo(json.dumps(vars(done), indent=2))
    else:
        click.echo(f"published at {done.pull_request or done.url}" if done.changed else f"{repo} has all of it already")


@publish.command()
@click.argument("dictionary")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dashboards", type=click.Path(path_type=Path), help="Folder of the dictionary's dashboards.")
@label_options
@click.option(
    "--plan", "plans", multiple=True, type=click.Path(path_type=Path), help="A steering plan as a vector (repeatable)."
)
@click.option("--published", metavar="OWNER/REPO:FOLDER", help="Where the dictionary is on the Hugging Face Hub.")
@click.option("--creator", help="Name shown as the creator's.")
@click.option("--release", help="Name of the release and of its page; by default the repository's.")
@click.option("--set", "set_name", help="Name of the set, such as emotion-res-4k, without the layer.")
@click.option("--description", help="Shown on the page of the release.")
@click.option("--dataset", help="What the texts of the dashboards are.")
@click.option("--model-id", help="Neuronpedia's name of the model; by default the dictionary's, without its owner.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of the model; by default it is loaded to see.")
@click.option("--model", default="embedded", show_default=True, help="The model to load where --layers is not given.")
@click.option("--created-at", metavar="DATE", help="Date in all rows; the same input then gives the same bytes.")
@click.option("--unlisted", is_flag=True, help="Seen only by those who know the address.")
@click.option(
    "--self-hosted", is_flag=True, help="For a server of your own: name the labels' methods, with their rows."
)
@click.option("--force", is_flag=True, help="Put the export in the place of an earlier one at OUT.")
@click.option("--push", "to_push", is_flag=True, help="Send the export by Neuronpedia's API; the same command resumes.")
@click.option("--dry-run", is_flag=True, help="Print what --push would send; nothing is sent or kept.")
@click.option("--server", help="With --push: another server, such as http://localhost:3000/api.")
@click.option("--create-model", is_flag=True, help="With --push: create the model first.")
@click.option("--no-lists", is_flag=True, help="With --push: no lists of the features of each emotion.")
@json_option
def neuronpedia(
    dictionary: str,
    out: Path,
    force: bool,
    to_push: bool,
    dry_run: bool,
    server: str | None,
    create_model: bool,
    no_lists: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Write the bulk-import folder OUT for Neuronpedia: dashboards of DICTIONARY, labels, vectors.

    Send the folder OUT/v1/MODEL/SOURCE to Neuronpedia's team, import it into a server of your own, or --push it. A push
    takes the key from the environment variable NEURONPEDIA_API_KEY. An export that is at OUT already is pushed as it
    is, unless --force writes it anew.
    """
    if (server or create_model or no_lists) and not (to_push or dry_run):
        raise ValueError("--server, --create-model and --no-lists need --push or --dry-run")
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            kept = out.exists() and not force
            folder = out if kept else Path(scratch) / "export"
            if not kept:
                _export(dictionary, folder, False, **given)
            _print_plan(folder, not no_lists, create_model, as_json)
        return
    done: dict[str, Any] = {}
    if not (to_push and out.exists() and not force):
        done = _export(dictionary, out, force, **given).to_dict()
    if to_push:
        from sae_emotion_plugin.publishing.neuronpedia_api import SERVER
        from sae_emotion_plugin.publishing.neuronpedia_push import push

        report = push(out, server=server or SERVER, lists=not no_lists, create_model=create_model)
        done |= {"sent": report.sent, "skipped": report.skipped, "journal": str(report.journal)}
        done["answers"] = dict(report.answers)
    if as_json:
        click.echo(json.dumps(done, ensure_ascii=False, indent=2))
        return
    for source in done.get("sources", ()):
        counts = ", ".join(f"{source[name]} {name}" for name in ("features", "activations", "explanations"))
        click.echo(f"{out}/v1/{source['model_id']}/{source['source_id']}: {counts}")
    if "n_bytes" in done:
        click.echo(f"{done['n_bytes']} bytes, {done['bytes_per_feature']} a feature; checked")
    if to_push:
        click.echo(f"{done['sent']} requests sent, {done['skipped']} were done before; journal: {done['journal']}")


def _export(
    dictionary: str,
    out: Path,
    force: bool,
    *,
    dashboards: Path | None,
    labels: tuple[Path, ...],
    scores: Path | None,
    author: str | None,
    plans: tuple[Path, ...],
    published: str | None,
    creator: str | None,
    release: str | None,
    set_name: str | None,
    description: str | None,
    dataset: str | None,
    model_id: str | None,
    layers: int | None,
    model: str,
    created_at: str | None,
    unlisted: bool,
    self_hosted: bool,
) -> Any:
    if dashboards is None or creator is None:
        raise ValueError(f"an export needs {'--dashboards FOLDER' if dashboards is None else '--creator NAME'}")
    published = published or _published(dictionary)

    from datetime import UTC, datetime

    from sae_emotion_plugin.dashboards.types import Dashboards
    from sae_emotion_plugin.feature_labels import merge_labels

    made = Dashboards.load(dashboards)
    found = merge_labels(_labels(dictionary), labels_of(labels, scores, author))

    from sae_emotion_plugin.interventions.neuronpedia import neuronpedia_vectors
    from sae_emotion_plugin.interventions.plans import SteeringPlan
    from sae_emotion_plugin.plugin import load_dictionary
    from sae_emotion_plugin.publishing.neuronpedia_export import export_neuronpedia
    from sae_emotion_plugin.publishing.neuronpedia_source import (
        NeuronpediaModel,
        check_same_dictionary,
        shown_config,
        source_at,
    )

    sae = load_dictionary(dictionary, device="cpu")
    check_same_dictionary(made, sae)
    name, neurons = str(sae.cfg.metadata.model_name or ""), 0
    if layers is None:
        from sae_emotion_plugin.models import load_model

        loaded = load_model(model).cfg
        layers, neurons = int(loaded.n_layers), int(loaded.d_mlp or 0)
    source = source_at(
        sae,
        NeuronpediaModel(
            id=model_id or name.rpartition("/")[2].lower(),
            layers=layers,
            dimension=int(sae.cfg.d_in),
            neurons_per_layer=neurons,
            display_name=name.rpartition("/")[2],
            owner=name.rpartition("/")[0],
            hf_id=name if "/" in name else None,
        ),
        published=published,
        creator=creator,
        created_at=created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        release=release,
        set_name=set_name,
        description=description,
        dataset=dataset,
        visibility="UNLISTED" if unlisted else "PUBLIC",
    )
    vectors = [
        vector
        for path in plans
        for vector in neuronpedia_vectors(SteeringPlan.load(path), sae, model_id=source.model.id)
    ]
    return export_neuronpedia(
        made,
        found,
        source,
        out,
        saelens_config=shown_config(sae),
        vectors=vectors,
        self_hosted=self_hosted,
        overwrite=force,
    )


def _published(dictionary: str) -> str:
    """OWNER/REPO:FOLDER, where the dictionary's own name or its release says so."""
    registered = _registered(dictionary)
    if registered is not None and registered[0].repo_id:
        return f"{registered[0].repo_id}:{registered[1].path}"
    if registered is None and ":" in dictionary and not Path(dictionary).exists():
        return dictionary
    raise ValueError(f"{dictionary} is nowhere on the Hugging Face Hub yet: give --published OWNER/REPO:FOLDER")


def _labels(dictionary: str) -> Any:
    from sae_emotion_plugin.registry import labels

    registered = _registered(dictionary)
    return labels(*registered) if registered is not None else ()


def _registered(dictionary: str) -> Any:
    """The release and the record of a dictionary that the registry has; None for a folder or a name elsewhere."""
    from sae_emotion_plugin.registry import entries, find

    release = re.split("[/:]", dictionary, maxsplit=1)[0]
    return find(dictionary) if release in {entry.release for entry in entries()} else None


def _print_plan(folder: Path, lists: bool, create_model: bool, as_json: bool) -> None:
    from sae_emotion_plugin.publishing.neuronpedia_requests import planned_requests

    n_requests = n_bytes = 0
    for request in planned_requests(folder, lists=lists, create_model=create_model):
        n_requests, n_bytes = n_requests + 1, n_bytes + request.n_bytes
        if as_json:
            click.echo(json.dumps({"path": request.path, "body": dict(request.body)}, ensure_ascii=False))
        else:
            click.echo(f"POST {request.path}  {request.subject}  {request.n_bytes} bytes")
    if not as_json:
        click.echo(f"{n_requests} requests, {n_bytes} bytes; nothing was sent")
