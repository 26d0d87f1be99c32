"""What runs in the engine's environment, where fitrl is not installed: torch, vLLM and the standard library alone."""
