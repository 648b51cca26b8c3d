"""Asking language models for judgments: prices, the ledger of all requests, questions, replies,
statistics."""
