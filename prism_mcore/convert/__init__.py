"""Exchange with Hugging Face: weights in and out, to the bit, in any parallel layout."""
