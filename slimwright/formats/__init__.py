"""Formats of others: read and written here, independent of any model."""
