"""Judges of generated text, none of which has seen what features are selected on, and how good each of them is."""
