"""What every feature of a dictionary does on a corpus: activating sequences, histograms, logits, correlations."""
