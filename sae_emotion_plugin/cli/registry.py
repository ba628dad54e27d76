"""The commands `sae-emotion registry ...`."""

import json
import sys

import click

from sae_emotion_plugin.cli.options import json_option


@click.group()
def registry() -> None:
    """Look at the registered dictionaries."""


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

    from sae_emotion_plugin.registry import find

    entry, sae = find(name)
    data = {"release": entry.release, "model": entry.model, "repo_id": entry.repo_id}
    data |= {"sae": asdict(sae), "provenance": {k: v for k, v in asdict(entry.provenance).items() if v}}
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
