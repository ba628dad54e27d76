"""What the commands share: options, and errors of one line."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class OneLineErrors(click.Group):
    """Shows what the user can mend as one line with exit code 2; any other error keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, FileNotFoundError, ImportError) as error:
            if isinstance(error, ModuleNotFoundError):
                raise
            message = " ".join(str(error).split())
            click.echo(f"Error: {message}", err=True)
            ctx.exit(2)


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
        help="A registry name, 'owner/repo:id', a folder, or an OpenAI-format .pt file.",
    )(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)
