"""The experience bank: what a team has lived through, stored for good, and the nearest of it found."""

from latentmem.bank.bank import ExperienceBank
from latentmem.bank.embedding import Embed
from latentmem.bank.reports import AddReport, BankInfo, Found, VerifyReport

__all__ = ["AddReport", "BankInfo", "Embed", "ExperienceBank", "Found", "VerifyReport"]
