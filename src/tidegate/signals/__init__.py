"""What policies need to know beyond the ledger's counts, and who produces it."""
