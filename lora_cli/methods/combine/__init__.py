"""How W0 and ΔW make W. A file exports `make(base)`, which returns an `Adapted`."""
