"""The network: modules on megatron-core's parallel layers and the specs that assemble them into a GPTModel.

Read :mod:`~spikingbrain_train.models.layer_specs` first: it says what a layer is made of.
"""
