"""Everything with weights: radiance field, generator, discriminator. Losses, loops and files do not live here."""
