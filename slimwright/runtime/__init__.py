"""Loading and running compressed models in transformers."""
