"""How the networks learn: losses, optimisers, schedules, averaging, the loop. Scores, pictures and files do not."""
