"""The command line: click only. Each command parses, calls one function and prints."""

from sae_emotion_plugin.cli.commands import main as main
