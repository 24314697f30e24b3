"""The sandbox: model-written programs run in it, and only in it.

This file imports nothing, because the launcher starts in an interpreter that must see no more than it needs.
"""
