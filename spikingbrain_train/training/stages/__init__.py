"""How every kind of stage trains; what plans know of them is in :mod:`spikingbrain_train.planning.stages`."""
