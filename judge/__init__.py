"""Asking language models for judgments, and how far these can be trusted.

In the order of imports: prices; the ledger of all requests; how replies are read; questions; the
client, which sends one request; which models there are; the endpoint, which asks many questions;
statistics of judgments; a synthetic judge that needs no model.
"""
