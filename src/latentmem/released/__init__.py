"""Readers for what the authors of the method released: their weights and their bank, turned into our own forms.

Only these files know the authors' formats, so only they change when the formats change. The release is text and tensors
from outside; reading it needs no library of theirs.
"""

from latentmem.released.bank import is_released_bank, read_bank
from latentmem.released.weights import read_weights, sections

__all__ = ["is_released_bank", "read_bank", "read_weights", "sections"]
