"""Sampling: the seam to inference, and loops over tasks."""
