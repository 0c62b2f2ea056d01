"""From a mask to a model that is used: written, checked, run sparse."""
