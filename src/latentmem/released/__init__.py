"""What the authors of the method released, read into our own forms: their weights and their bank, and no more.

These are the only files that know how theirs are laid out; when they change something, these change. What they released
is text and tensors from outside, and no library of theirs is needed.
"""

from latentmem.released.bank import is_released_bank, read_bank
from latentmem.released.weights import read_weights, sections

__all__ = ["is_released_bank", "read_bank", "read_weights", "sections"]
