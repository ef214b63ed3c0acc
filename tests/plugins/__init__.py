"""Kinds from outside: what somebody writes who adds a mixer, a feed-forward or a linear transform.

Each is a pair of files: a description without torch, which ``plugins=[tests.plugins.fixed_decay]`` imports,
and the modules that its ``spec`` or ``transform`` names. Nothing in ``spikingbrain_train/`` knows of them.
"""
