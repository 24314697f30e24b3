"""The experience bank: trajectories stored durably, and a search for the nearest ones."""

from latentmem.bank.bank import ExperienceBank
from latentmem.bank.embedding import Embed
from latentmem.bank.forgetting import ForgottenReport, Receipt
from latentmem.bank.records import bank_exists, copy_records
from latentmem.bank.reports import AddReport, BankInfo, Found, VerifyReport

__all__ = [
    "AddReport",
    "BankInfo",
    "Embed",
    "ExperienceBank",
    "ForgottenReport",
    "Found",
    "Receipt",
    "VerifyReport",
    "bank_exists",
    "copy_records",
]
