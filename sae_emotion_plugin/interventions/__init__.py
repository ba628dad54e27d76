"""Steering plans, the hooks that carry them out, and the same plans as files for other tools."""
