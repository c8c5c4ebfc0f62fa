"""Evaluation: what the pictures of an ensemble show, measured."""
