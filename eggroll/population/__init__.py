"""Maps a function over the population: pairs, chunks, devices."""
