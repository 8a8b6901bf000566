"""The first ΔW. A file exports `init(delta, start)`, which fills the factors in place, in float32.

`shifts = True` says that the first B·A stands for a part of W0 that is taken off it, by the init or by quantising.
"""
