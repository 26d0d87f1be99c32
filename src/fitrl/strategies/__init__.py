"""Lightning strategies that keep a policy alive between calls."""
