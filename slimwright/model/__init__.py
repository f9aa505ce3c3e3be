"""Structure of a model: discovery, names, groups."""
