"""Releases that ship with sae_emotion_plugin: one YAML file each, with its files in the folder of its name."""
