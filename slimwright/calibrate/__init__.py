"""Calibration: data, walks over the model one block at a time, and the statistics that they fill."""
