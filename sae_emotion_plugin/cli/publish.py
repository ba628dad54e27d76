"""The commands `sae-emotion publish ...`."""

import json
from pathlib import Path

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
