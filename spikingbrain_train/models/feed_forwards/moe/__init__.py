"""Mixture of experts: what this project adds to megatron-core's MoELayer, router and experts.

:mod:`~spikingbrain_train.models.feed_forwards.moe.router` holds the routing rule and its losses,
:mod:`~spikingbrain_train.models.feed_forwards.moe.experts` the feed-forwards behind it;
:mod:`~spikingbrain_train.models.feed_forward` puts both into a layer's spec.
"""
