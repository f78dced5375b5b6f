"""A run on disk: its record, its recipe, its base model, and how it is loaded."""
