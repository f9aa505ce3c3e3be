"""Merge methods: several models in, one out. One file each; the contract is ``slimwright.methods.merging``."""
