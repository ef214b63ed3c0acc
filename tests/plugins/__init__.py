"""Kinds from outside: what somebody writes who adds a mixer and a feed-forward without touching the package.

Each is a pair of files: a description without torch, which ``plugins=[tests.plugins.fixed_decay]`` imports,
and the modules that its ``spec`` names. Nothing in ``spikingbrain_train/`` knows of them.
"""
