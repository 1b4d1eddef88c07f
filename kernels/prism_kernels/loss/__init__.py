"""Cross entropy fused with the output projection, and the logits of a decode step."""
