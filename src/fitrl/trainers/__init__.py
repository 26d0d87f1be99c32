"""Backends: Lightning trainers with fit_rl."""
