"""How W0 is stored. A file exports `wraps`, the type of module it is for, and `View`, a `Base`.

With `fits(module)` it may leave some of that type alone.
"""
