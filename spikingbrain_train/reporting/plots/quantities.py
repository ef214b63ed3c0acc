"""Metrics in words: title, unit, and how their values are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A metric in words."""

    title: str
    unit: str
    factor: float = 1.0
    """What a value is multiplied by: 100 for a share in percent."""
    is_noisy: bool = False
    """Whether it jumps from step to step, so that a running mean is drawn."""
    is_from_zero: bool = False
    """Whether its axis begins at 0, so that noise does not look like change."""


QUANTITIES = {
    "train/loss": Quantity("Training loss", "loss", is_noisy=True),
    "train/cross_entropy": Quantity("Training cross entropy", "nats per token", is_noisy=True),
    "train/kl_divergence": Quantity("KL divergence from the teacher", "nats per token", is_noisy=True),
    "train/learning_rate": Quantity("Learning rate", "rate"),
    "train/grad_norm": Quantity("Gradient norm", "L2 norm", is_noisy=True),
    "train/parameter_norm": Quantity("Norm of all weights", "L2 norm"),
    "train/step_seconds": Quantity("Time of a step", "s", is_from_zero=True),
    "train/data_seconds": Quantity("Waiting for batches", "s", is_from_zero=True),
    "train/tokens_per_second_per_rank": Quantity(
        "Throughput of a rank", "tokens per second", is_from_zero=True
    ),
    "train/tokens_per_second": Quantity("Throughput", "tokens per second", is_from_zero=True),
    "train/mfu": Quantity("Model FLOP/s utilisation", "% of the peak", 100.0, is_from_zero=True),
    "train/tflops": Quantity("Model FLOP/s of a rank", "TFLOP/s", is_from_zero=True),
    "train/checkpoint_seconds": Quantity("Standing still for checkpoints", "s", is_from_zero=True),
    "train/compute_seconds": Quantity("Computing of a rank in a step", "s", is_from_zero=True),
    "train/compute_seconds_slowest": Quantity(
        "Computing of the slowest rank in a step", "s", is_from_zero=True
    ),
    "train/slowest_rank": Quantity("Slowest rank", "rank"),
    "train/communication_seconds": Quantity("Waiting for other ranks in a step", "s", is_from_zero=True),
    "start/seconds": Quantity("From start to first step", "s", is_from_zero=True),
    "train/memory_gib": Quantity("Peak memory of a rank", "GiB", is_from_zero=True),
    "train/tokens": Quantity("Tokens read", "tokens"),
    "valid/cross_entropy": Quantity("Held-out cross entropy", "nats per token"),
    "align/error": Quantity("Alignment error, mean of layers", "relative squared error", is_noisy=True),
    "moe/aux_loss": Quantity("Load-balancing loss (1 is even)", "aux loss", is_noisy=True),
    "moe/z_loss": Quantity("Router z-loss", "z-loss", is_noisy=True),
    "moe/dropped_tokens": Quantity(
        "Dropped by full experts", "% of assignments", 100.0, is_noisy=True, is_from_zero=True
    ),
    "moe/idle_experts": Quantity("Experts without a token", "% of experts", 100.0, is_from_zero=True),
    "moe/load_max_over_mean": Quantity("Busiest expert of all layers", "load over mean", is_noisy=True),
    "moe/expert_load": Quantity("Load of each expert", "layer"),
    "spiking/k": Quantity("Spike scale k", "k"),
    "spiking/sparsity": Quantity("Empty spike slots", "% of slots", 100.0),
    "spiking/share_up_to_7": Quantity("Channels that count up to 7", "% of channels", 100.0),
    "spiking/mean_spikes": Quantity("Mean spikes of a channel", "spikes"),
    "spiking/train_sparsity": Quantity("Empty spike slots in training", "% of slots", 100.0),
    "spiking/train_share_up_to_7": Quantity(
        "Channels in training that count up to 7", "% of channels", 100.0
    ),
    "spiking/train_mean_spikes": Quantity("Mean spikes of a channel in training", "spikes"),
    "quantization/share": Quantity("Way of weights to INT8 numbers", "% of the way", 100.0),
    "quantization/weight_error": Quantity("Error of INT8 weights", "% of the weights", 100.0),
}


def quantity_of(metric: str) -> Quantity:
    """What a metric is called; one that is not known here goes by its own name."""
    if metric.startswith("valid/cross_entropy/"):
        dataset = metric.removeprefix("valid/cross_entropy/")
        return Quantity(f"Held-out cross entropy, {dataset}", "nats per token")
    family, between, number = metric.rpartition("/layer_")
    if between and number.isdigit() and family in QUANTITIES:
        base = QUANTITIES[family]
        return Quantity(f"{base.title}, layer {number}", base.unit, base.factor, base.is_noisy)
    is_noisy = metric.startswith("train/")
    return QUANTITIES.get(metric, Quantity(metric, metric.rpartition("/")[2], is_noisy=is_noisy))
