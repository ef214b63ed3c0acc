"""What a multiply-accumulate costs where spikes are added instead (SpikingBrain, arXiv 2509.05276, 5.5).

At 45 nm a spike adds a weight, which is all that event-driven hardware does: E = mean spikes * E_add. Reading
memory is left out on all sides, as the paper leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from spikingbrain_train.errors import ConfigurationError


@dataclass(frozen=True)
class EnergyModel:
    """Energies in pJ; the defaults are the paper's, for 45 nm.

    Raises:
        ConfigurationError: one that is not above 0.
    """

    fp16_mac: float = 1.5
    """Of a multiply-accumulate in FP16."""
    int8_mac: float = 0.23
    """Of a multiply-accumulate in INT8."""
    int8_add: float = 0.03
    """Of the addition that a spike is."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 < value < float("inf"):
                flag = f"--energy-{each.name.replace('_', '-')}"
                raise ConfigurationError(f"{flag} is {value:g}; give pJ above 0, e.g. {each.default}")

    def of_spikes(self, mean_spikes: float) -> float:
        """pJ a multiply-accumulate, whose input sends so many spikes on average."""
        return mean_spikes * self.int8_add

    def saving(self, mean_spikes: float, mac: float) -> float:
        """Share of ``mac`` pJ that is saved; negative where spikes cost more."""
        return 1 - self.of_spikes(mean_spikes) / mac
