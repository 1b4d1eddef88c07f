"""Ops of prism_mcore's models; `backends.select` says which implementation of each is used."""
