"""Evaluators of files of samples, by physical system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molgen_energy.metrics.report.model import Report


@dataclass(frozen=True)
class Evaluator:
    """How samples of a physical system are evaluated."""

    evaluate: Callable[..., Report]
    """Called as `evaluate(inputs, **options)` with a list of paths, and the options that were given
    of those below."""
    options: frozenset[str] = frozenset()
    """Names of the options of `molgen_energy.api.evaluate.evaluate` that it takes."""
    parallel: bool = False
    """Whether it also takes `progress` and `peers`, for long work in several processes."""


def _evaluate_molecules(
    inputs: Any, predictor: str | PathLike[str] | None = None, **options: Any
) -> Report:
    from molgen_energy.metrics.evaluation import evaluate_molecules

    if predictor is None:
        return evaluate_molecules(inputs, **options)
    from molgen_energy.metrics.property_errors import add_properties, compare_sources
    from molgen_energy.systems.properties.predictor import choose_predictor

    judge, real = choose_predictor(predictor, options.get("reference"), options.get("subset"))
    sources = inputs if isinstance(inputs[0], Path) else [inputs]
    # First, since bad input is to be refused before minutes of work.
    compared = compare_sources(sources, judge, options.get("skip_bad", False))
    report = evaluate_molecules(inputs, **options)
    add_properties(report, compared, judge, real)
    return report


def _evaluate_shapes(inputs: Any) -> Report:
    from molgen_energy.systems.shapes.metrics import evaluate_shapes

    return evaluate_shapes(inputs)


def _evaluate_spins(inputs: Any) -> Report:
    from molgen_energy.systems.spins.metrics import evaluate_spins

    return evaluate_spins(inputs)


EVALUATORS: dict[str, Evaluator] = {
    "molecules": Evaluator(
        _evaluate_molecules,
        frozenset(
            {
                "reference", "train", "metrics", "bonds", "valence", "angles", "types", "subset",
                "workers", "timeout", "skip_bad", "per_molecule", "predictor",
            }
        ),
        parallel=True,
    ),
    "shapes": Evaluator(_evaluate_shapes),
    "spins": Evaluator(_evaluate_spins),
}  # fmt: skip
"""Evaluators by physical system."""
