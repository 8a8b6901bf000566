"""How gradients become steps. A file exports `make(groups, train, adapter)`, which returns a torch optimizer."""
