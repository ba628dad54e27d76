"""One recipe at many widths, sparsities, learning rates and seeds, on activations that are collected once."""
