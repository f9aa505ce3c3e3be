"""How a model's cache of keys and values is kept, one file each."""
