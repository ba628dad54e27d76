"""Which features fire on an emotion, with baselines, controls and references."""
