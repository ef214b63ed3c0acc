"""Hugging Face formats, one file a family or closely related set, both ways.

:mod:`~spikingbrain_train.conversion.formats.hf_format` says what a format is,
:mod:`~spikingbrain_train.conversion.formats.registry` lists all. A new one is a new file here and an entry in
that list. No torch: what a format cannot hold is refused before it is imported.
"""
