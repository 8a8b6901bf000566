"""How gradients become steps. A file exports `make(groups, train)`, which returns a torch optimizer."""
