"""How many columns B has in each layer, and when. A file exports `make()`, which returns a `Lifecycle`."""
