"""Which texts and tokens fire a set of features, at a known rate of false alarms."""
