"""The words of `wordy_model_dir`, the tiny model whose tokens are words."""

WORDS = tuple(f"{a}{b}{c}u" for a in "bdfgklmprstv" for b in "aeiou" for c in "bnt")
"""Each is one token there, with a blank before it and without."""
