"""Between what people see and what the trunk reads: text <-> ids, pictures <-> normalised latents."""
