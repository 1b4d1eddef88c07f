"""The MLPs' activations."""
