"""A model as pruning sees it: loaded, on disk, which weights are pruned, what flows into them."""
