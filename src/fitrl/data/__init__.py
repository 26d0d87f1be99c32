"""From rollouts to microbatches."""
