"""Folds: scales moved between neighbours before weights are put on a grid."""
