"""One folder per checkpoint format: `source` reads it, `output` lays its files out."""
