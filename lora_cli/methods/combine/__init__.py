"""How W0 and ΔW make W. A file exports `make(base, delta)`, which returns an `Adapted`, and `shapes(out_features)`."""
