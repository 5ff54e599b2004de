"""Pruning, and retraining what is left."""
