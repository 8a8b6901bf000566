"""How W0 is stored. A file exports `wraps`, the type of module it is for, and `View`, a `Base`.

With `fits(module)` it may leave some of that type alone. With `quantise(plain, W)` it can be asked for, by
`model.quantize`; with `reads(stored)` it says what a config says of files with its codes, which its `Layer` unpacks.
Both have `require()`, which says what is missing.
"""
