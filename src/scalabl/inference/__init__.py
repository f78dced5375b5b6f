"""A finished run at work: predictions, evaluation, promises, what to label next, and the report."""
