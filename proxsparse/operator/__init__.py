"""The mathematics: the proximal operator, sparsity patterns, stochastic rounding. No model, no file."""
