"""Checkpoints and banks on the Hugging Face hub; both are checked before they are sent, or put into place.

Whatever is pulled is data from outside: tensors and JSON of a checkpoint, or tables of a bank. None of it is executed.
"""

from latentmem.hub.bank import pull_bank, push_bank
from latentmem.hub.cards import Origin
from latentmem.hub.checkpoints import pull_checkpoint, push_checkpoint

__all__ = ["Origin", "pull_bank", "pull_checkpoint", "push_bank", "push_checkpoint"]
