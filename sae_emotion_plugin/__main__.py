"""`python -m sae_emotion_plugin` is the command `sae-emotion`."""

from sae_emotion_plugin.cli import main

if __name__ == "__main__":
    main()
