"""The commands `sae-emotion registry ...`."""

import json
import re
import sys
from pathlib import Path

import click

from sae_emotion_plugin.cli.options import json_option, label_options, labels_of


@click.group()
def registry() -> None:
    """Look at the registered dictionaries, add and remove your own."""


@registry.command("list")
@json_option
def list_entries(as_json: bool) -> None:
    """Every registered dictionary, a line each."""
    from sae_emotion_plugin.registry import entries

    rows = [
        {"name": f"{entry.release}/{sae.id}", "model": entry.model, "source": entry.repo_id or "installed"}
        for entry in entries()
        for sae in entry.saes
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['name']}  {row['model']}  {row['source']}")


@registry.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """All that is known of the dictionary NAME."""
    from dataclasses import asdict

    import yaml

    from sae_emotion_plugin.registry import find, labels

    entry, sae = find(name)
    data = {"release": entry.release, "model": entry.model, "repo_id": entry.repo_id}
    data |= {"sae": asdict(sae), "provenance": {k: v for k, v in asdict(entry.provenance).items() if v}}
    found = labels(entry, sae)
    data["labels"] = {"number": len(found), "authors": sorted({label.author for label in found})}
    click.echo(json.dumps(data, indent=2) if as_json else yaml.safe_dump(data, sort_keys=False).rstrip())


@registry.command()
@click.argument("name", required=False)
@json_option
def check(name: str | None, as_json: bool) -> None:
    """Compare the files of the dictionary NAME, or of all, with their SHA-256; exit code 1 when one differs."""
    from sae_emotion_plugin.registry import check as problems_of
    from sae_emotion_plugin.registry import entries, find

    chosen = (find(name)[0],) if name else entries()
    found = {entry.release: list(problems_of(entry)) for entry in chosen}
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for release, problems in found.items():
            click.echo(f"{release}: {'; '.join(problems) or 'sound'}")
    if any(found.values()):
        sys.exit(1)


@registry.command()
@click.argument("source")
@label_options
@click.option("--as", "name", help="Another name for the release.")
@click.option("--revision", help="Of the repository: a branch, tag or commit.")
@click.option("--force", is_flag=True, help="Replace another dictionary of the same name.")
@json_option
def add(
    source: str,
    labels: tuple[Path, ...],
    scores: Path | None,
    author: str | None,
    name: str | None,
    revision: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Add SOURCE to your registry: owner/repo on the Hub, a trained folder, or a registered name for more labels.

    Every file is checked against its SHA-256. A dictionary that is there already keeps its files, and labels are
    merged with what others said. With --labels or --scores the release must have one dictionary.
    """
    from dataclasses import replace

    from sae_emotion_plugin.registry import listed, user_folder
    from sae_emotion_plugin.release_files import install, open_release

    more = labels_of(labels, scores, author)
    if not Path(source).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not _registered(source):
        from sae_emotion_plugin.publishing.hub import fetch

        release = fetch(source, revision=revision)
    elif revision is not None:
        raise ValueError(f"--revision {revision} is for a repository, and {source} is none")
    else:
        release = open_release(source)
    if name is not None:
        release = replace(release, entry=replace(release.entry, release=name))
    ids = [sae.id for sae in release.entry.saes]
    if more and len(ids) > 1:
        raise ValueError(f"the labels are for one dictionary, and {source} has {listed(ids)}")
    entry = install(release, user_folder(), labels={ids[0]: more} if more else None, force=force)
    names = [f"{entry.release}/{sae.id}" for sae in entry.saes if sae.id in ids]
    click.echo(json.dumps(names) if as_json else "\n".join(f"added {one}" for one in names))


@registry.command()
@click.argument("name")
def remove(name: str) -> None:
    """Take the release NAME, or one dictionary of it (release/id), out of your registry, with its files."""
    from sae_emotion_plugin.registry import user_folder
    from sae_emotion_plugin.release_files import remove as take_out

    take_out(name, user_folder())
    click.echo(f"removed {name}")


@registry.command()
@click.argument("name")
@click.option("--repo", help="The repository where it was published (owner/name), where the entry does not know it.")
def export(name: str, repo: str | None) -> None:
    """Print the release NAME as a stanza for SAELens's pretrained_saes.yaml."""
    from sae_emotion_plugin.registry import entries, find
    from sae_emotion_plugin.release_files import stanza

    releases = {entry.release: entry for entry in entries()}
    click.echo(stanza(releases[name] if name in releases else find(name)[0], repo).rstrip())


def _registered(name: str) -> bool:
    from sae_emotion_plugin.registry import entries

    return name.split("/")[0] in {entry.release for entry in entries()}
