"""Methods are data, axes are code: one folder an axis, one file a part, the file name is its name in a recipe."""
