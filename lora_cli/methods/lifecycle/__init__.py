"""What happens between steps. A file exports `make()`, which returns a `Lifecycle`."""
