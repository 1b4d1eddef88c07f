"""Matrix products; Transformer Engine's and megatron-core's are classes, built in prism_mcore/model/linear.py."""
