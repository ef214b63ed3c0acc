"""Trained models as INT8 weights and spikes (W8ASpike): calibrated, measured, written as folders."""
