"""What steering does, at which dose, at what cost, and compared with what."""
