"""The mini world: drawn characters with texts, small enough to learn on a laptop."""
