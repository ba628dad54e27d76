"""What the commands share: options, and errors of one line."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from sae_emotion_plugin.feature_labels import FeatureLabel

Command = TypeVar("Command", bound=Callable[..., Any])


class OneLineErrors(click.Group):
    """Shows what the user can mend as one line with exit code 2; any other error keeps its traceback.

    An interrupt is a line too, with the exit code 130 of shells.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            if isinstance(error, ModuleNotFoundError | BrokenPipeError):
                raise
            message = " ".join(str(error).split())
            click.echo(f"Error: {message}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("\nInterrupted. Given again, the command goes on from what it has kept.", err=True)
            ctx.exit(130)


def model_option(command: Command) -> Command:
    return click.option(
        "--model",
        default="embedded",
        show_default=True,
        help="'embedded', a Hugging Face id, a folder, a .gguf file.",
    )(command)


def dictionary_option(command: Command) -> Command:
    return click.option(
        "--dictionary",
        default="gemma-3-270m-emotion",
        show_default=True,
        help="A registry name, 'owner/repo:id', a folder, or an OpenAI-format file or URL.",
    )(command)


def page_name(dictionary: str) -> str:
    """What a page calls a dictionary: a folder or file by its own name, since others read the page."""
    return Path(dictionary).resolve().name if Path(dictionary).exists() else dictionary


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


def label_options(command: Command) -> Command:
    path = click.Path(path_type=Path)
    for option in (
        click.option("--author", help="With --scores: who says so."),
        click.option("--scores", type=path, help="Label the features that hold on the held-out texts of SCORES."),
        click.option("--labels", multiple=True, type=path, help="More labels, in JSON Lines (repeatable)."),
    ):
        command = option(command)
    return command


def labels_of(labels: tuple[Path, ...], scores: Path | None, author: str | None) -> "list[FeatureLabel]":
    """The labels that `label_options` name."""
    from sae_emotion_plugin.feature_labels import labels_from_scores, read_labels

    found = [label for path in labels for label in read_labels(path)]
    if scores is not None:
        if not author:
            raise ValueError(f"--scores {scores} needs --author NAME")
        from sae_emotion_plugin.discovery.scores import FeatureScores

        found += labels_from_scores(FeatureScores.load(scores), author=author)
    elif author:
        raise ValueError("--author goes with --scores")
    return found
