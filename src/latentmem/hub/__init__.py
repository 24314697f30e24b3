"""Checkpoints and banks on the Hugging Face hub: what goes out is checked first, what comes in before it is in place.

What comes in is data from outside: tensors and JSON of a checkpoint, tables of a bank, and nothing that is executed.
"""

from latentmem.hub.bank import pull_bank, push_bank
from latentmem.hub.cards import Origin
from latentmem.hub.checkpoints import pull_checkpoint, push_checkpoint

__all__ = ["Origin", "pull_bank", "pull_checkpoint", "push_bank", "push_checkpoint"]
