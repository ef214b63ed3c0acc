"""The loop, its stages and callbacks, optimizer, metrics. See :mod:`~spikingbrain_train.training.trainer`."""
