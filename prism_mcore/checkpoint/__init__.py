"""Our checkpoint format: its only reader and writer."""
