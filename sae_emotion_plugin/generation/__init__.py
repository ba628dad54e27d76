"""Prompts and plans into continuations, each row of a batch steered differently."""
