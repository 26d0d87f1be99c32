"""The model that is trained, and its run folder."""
