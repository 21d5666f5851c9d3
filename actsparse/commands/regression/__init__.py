"""Regression cases: figures of a model that are measured again and again, and held against a reference."""
