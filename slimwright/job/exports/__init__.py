"""Writing results in the formats of others: one file per target."""
