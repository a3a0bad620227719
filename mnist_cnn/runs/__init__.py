"""How Hydra starts a command, a run's folder, a sweep; imports no torch."""
