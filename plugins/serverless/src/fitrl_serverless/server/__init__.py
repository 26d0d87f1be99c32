"""`fitrl serve`: the training API over `LocalTrainer`; needs the extra `server`."""
