"""The L1 loss inside feed-forwards in every step, and how much of them is zero in those that are reported."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.models.feed_forwards.gated_activation import GatedActivation, activations_in
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class ActivationSparsity(Callback):
    """Sets what ``stage.sparsity`` says for every step; counts zeros of activations that have some.

    ``ffn/sparsity`` is the share of products inside feed-forwards that are zero, over all tokens of the step
    (ProSparse, arXiv 2402.13516, section 3.1). Of experts, those that tokens are sent to count.
    ``ffn/sparsity/layer_<i>`` is that of a layer. Nothing is read from the device before a report.
    """

    def start(self) -> None:
        self._activations: list[tuple[int, GatedActivation]] = []
        for layer in self.run.state.model.modules():
            if isinstance(layer, TransformerLayer):
                self._activations += [(layer.layer_number - 1, each) for each in activations_in(layer)]

    def step_begin(self) -> None:
        config, done = self.run.config, self.run.state.iteration
        is_reported = done + 1 >= config.stage.train_iters or (done + 1) % config.logging.log_interval == 0
        self._l1_factor = config.stage.sparsity.l1_factor(done)
        for _, activation in self._activations:
            activation.reset(is_counting=is_reported)
            activation.l1_factor = self._l1_factor

    def report_due(self, report: Report) -> None:
        config = self.run.config
        if config.model.activation_func is ActivationFunc.silu:
            return  # never zero: nothing is counted on any rank
        if config.stage.sparsity.l1_factors:
            report.add("ffn/l1_factor", self._l1_factor)
        counts = torch.zeros(config.model.num_layers, 2, dtype=torch.int64, device=self.run.groups.device)
        for layer, activation in self._activations:
            counts[layer] += activation.counts
        # Ranks have channels, experts, tokens and layers of their own.
        torch.distributed.all_reduce(counts)
        zeros, everything = counts[:, 0].tolist(), counts.sum(1).tolist()
        if not any(everything):  # a stage that does not run them
            return
        report.add("ffn/sparsity", sum(zeros) / sum(everything), Shown("zeros", "{:.1%}"))
        for layer, (zero, of) in enumerate(zip(zeros, everything, strict=True)):
            if of:
                report.add(f"ffn/sparsity/layer_{layer}", zero / of)
