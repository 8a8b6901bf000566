"""What ΔW is. A file exports `make(place)`, which returns a `Delta`, and `shapes(in_features, out_features, r)`.

Both are given the part's settings, too, by name.
"""
