"""Stochastic variational inference in anybody's Trainer: the ELBO callback, its schedules, its parameter group."""
