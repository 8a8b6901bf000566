"""What ΔW is. A file exports `make(place, **settings)`, which returns a `Delta`, and the tensors of a layer:
`shapes(in_features, out_features, r, **settings)`; where layers have tensors in common also
`shared_shapes(layer, in_features, out_features, r, **settings)`. `FROZEN` names those that never train, `approximates`
says why ΔW is not zero at first; `mergeable = False` that it depends on the input; `misfit(layers, others)` what keeps
the planned layers from being adapted together while others are left alone.
"""
