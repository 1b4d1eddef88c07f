"""A study: a YAML of models, mixtures, RL mixes, controls and seeds becomes a graph of runs, and one report."""
