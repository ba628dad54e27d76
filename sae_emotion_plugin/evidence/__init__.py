"""Statistics that answer: compared with what, on what, how sure? Arrays in, numbers out; no model and no torch."""
