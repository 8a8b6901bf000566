"""What ΔW is. A file exports `make(base, r, scale, dropout, bias)` and `shapes(in_features, out_features, r)`."""
