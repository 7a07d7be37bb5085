"""Temperature of sampling: less or more noise, or a larger or smaller score, in a range of levels.

The noise level of positions is σ/α times their scale: the standard deviation of the noise in Å.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molgen_energy.errors import InputError, unknown_name

TARGETS = ("noise", "score")
"""What a temperature acts on."""


@dataclass(frozen=True)
class Temperature:
    """How a sampler changes random noise and score; the defaults change nothing.

    A step belongs to the noise level at which it starts, and where the network is evaluated. The
    same factors apply to all fields.

    Parameters
    ----------
    value
        τ. Below 1 samples concentrate on probable structures, above 1 they are more diverse. At
        least 0, for a score above 0.
    of
        `noise` multiplies the random noise of a step by τ. `score` multiplies the predicted noise
        ε̂, and with it the score −ε̂/σ, by 1/τ. Dhariwal and Nichol (NeurIPS 2021, appendix) have
        both. Neither draws from the density to the power 1/τ.
    low, high
        Noise levels between which the temperature acts, both included, in the unit of the
        positions; None is open.
    final_noise
        Factor of the random noise of steps below `low`, and of that which the ancestral sampler
        adds to the last clean prediction. At least 0.

    Raises
    ------
    InputError
        A number is out of range, or `of` is unknown.
    """

    value: float = 1.0
    of: str = "noise"
    low: float | None = 0.3
    high: float | None = None
    final_noise: float = 1.0

    def __post_init__(self) -> None:
        if self.of not in TARGETS:
            raise InputError(unknown_name("--temperature-of", self.of, TARGETS))
        if not 0 <= self.value < math.inf:
            raise InputError(
                f"--temperature {self.value:g}: expected a number from 0 (no noise); 1 changes "
                "nothing"
            )
        if self.of == "score" and self.value == 0:
            raise InputError(
                "--temperature 0 is for --temperature-of noise; the score needs one above 0"
            )
        low, high = (0.0 if self.low is None else self.low), self.high
        if not 0 <= low < (math.inf if high is None else high) or high == math.inf:
            raise InputError(
                f"--temperature-range {range_text(self.low, self.high)}: expected two ascending "
                "noise levels in Å, such as 0.3:5, 0.3: or :5"
            )
        if not 0 <= self.final_noise < math.inf:
            raise InputError(
                f"--final-noise {self.final_noise:g}: expected a number from 0 (none); 1 changes "
                "nothing"
            )

    @property
    def changes_score(self) -> bool:
        """Whether predictions change."""
        return self.of == "score" and self.value != 1

    @property
    def changes_noise(self) -> bool:
        """Whether random noise changes, of any step."""
        return (self.of == "noise" and self.value != 1) or self.final_noise != 1

    def noise_factors(self, ratios: Tensor) -> list[float]:
        """Factor of the random noise of the step from each level, at the end of the last noise.

        Parameters
        ----------
        ratios
            Noise level of the positions at each visited level, (V,), descending.
        """
        factors = self._within(ratios, self.value if self.of == "noise" else 1.0)
        if self.low is not None:
            factors[ratios < self.low] = self.final_noise
        factors[-1] = self.final_noise
        return [float(factor) for factor in factors]

    def score_factors(self, ratios: Tensor) -> list[float]:
        """Factor of ε̂ at each level; for the parameter see `noise_factors`."""
        factors = self._within(ratios, 1 / self.value if self.of == "score" else 1.0)
        return [float(factor) for factor in factors]

    def _within(self, ratios: Tensor, factor: float) -> Tensor:
        """The factor at levels in the range, else 1, (V,) float64."""
        factors = torch.ones(len(ratios), dtype=torch.float64)
        inside = torch.ones(len(ratios), dtype=torch.bool)
        if self.low is not None:
            inside &= ratios >= self.low
        if self.high is not None:
            inside &= ratios <= self.high
        factors[inside] = factor
        return factors

    def describe(self) -> str:
        """What changes, in words, such as `temperature 0.9 of the noise from 0.3 Å`."""
        parts = []
        if self.value != 1:
            ends = {"from": self.low, "to": self.high}
            levels = [f" {word} {end:g} Å" for word, end in ends.items() if end is not None]
            parts.append(f"temperature {self.value:g} of the {self.of}{''.join(levels)}")
        if self.final_noise != 1:
            parts.append(f"final noise {self.final_noise:g}")
        return ", ".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """The options of sampling that stand for it, with their values."""
        return {
            "temperature": self.value,
            "temperature_of": self.of,
            "temperature_range": (self.low, self.high),
            "final_noise": self.final_noise,
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Temperature:
        """The temperature of `options`, which may hold others."""
        low, high = options["temperature_range"]
        return cls(
            options["temperature"], options["temperature_of"], low, high, options["final_noise"]
        )

    def provenance(self) -> dict[str, str]:
        """The options that differ from the default, as text, for the file of samples.

        Named `sampling_temperature` and so on, since data may have a property `temperature`.
        """
        texts = {
            "temperature": f"{self.value:g}",
            "temperature_of": self.of,
            "temperature_range": range_text(self.low, self.high),
            "final_noise": f"{self.final_noise:g}",
        }
        own, default = self.options, Temperature().options
        return {
            f"sampling_{name}": text for name, text in texts.items() if own[name] != default[name]
        }


def range_text(low: float | None, high: float | None) -> str:
    """A range of noise levels as the command line has it, such as `0.3:`."""
    return ":".join("" if end is None else f"{end:g}" for end in (low, high))
