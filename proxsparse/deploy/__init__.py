"""From a mask to a model that is used: write it, check it, run it sparse."""
