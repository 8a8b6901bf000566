"""Rows -> Example (ids and which of them are trained on) -> Batch."""
