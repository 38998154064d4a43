"""How the networks learn: losses, optimisers, schedules, averaging and the loop. Scores, pictures and files do not live here."""
