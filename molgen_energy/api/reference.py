"""The public names of the package, in the order of the API reference.

The pages of `docs/api/` show them, and `tests/test_site.py` checks that none is missing there;
`tests/test_reference.py` checks that every name has a docstring with parameters, shapes, errors
and source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Page:
    """One page of the reference."""

    title: str
    text: str
    """What the names have in common."""
    names: dict[str, tuple[str, ...]]
    """Public names by module; an empty tuple stands for all names of the module's `__all__`."""

    @property
    def entries(self) -> Iterator[str]:
        """Dotted names of all entries: `molgen_energy.sample`."""
        for module, names in self.names.items():
            every = names or [n for n in import_module(module).__all__ if not n.startswith("_")]
            yield from (f"{module}.{name}" for name in every)


PAGES: tuple[Page, ...] = (
    Page(
        "Functions",
        "What `import molgen_energy` has: prepare data, train, tune, sample, evaluate, show.",
        {
            "molgen_energy": (),
            "molgen_energy.systems.molecules.tuning": (
                "TuningResult", "JudgedSampler", "SamplerChoice",
            ),
        },
    ),
    Page(
        "Losses",
        "Losses on positions and spins, for any training loop of PyTorch.",
        {"molgen_energy.losses": ()},
    ),
    Page(
        "Reports",
        "What `evaluate` returns.",
        {
            "molgen_energy.metrics.report.model": (
                "EvaluatedFile", "ReportSection", "ReportRow", "ReportColumn", "Setting",
            ),
            "molgen_energy.metrics.molecule_table": ("MoleculeTable",),
            "molgen_energy.metrics.conformers": (
                "ConformerScores", "conformer_rmsd", "heavy_atoms",
            ),
            "molgen_energy.metrics.statistics": ("Rate", "Mean", "Estimate", "RealRange"),
            "molgen_energy.systems.properties.predictor": ("load_predictor", "NetworkPredictor"),
            "molgen_energy.metrics.property_errors": ("PropertyPredictor", "property_metrics"),
            "molgen_energy.chemistry.xtb_properties": ("xtb_properties",),
        },
    ),
    Page(
        "Molecules and files",
        "Molecules as arrays, and their conversion from and to RDKit, ASE and files.",
        {
            "molgen_energy.data.molecules": ("Molecule", "Molecules", "Property", "Bonds"),
            "molgen_energy.chemistry.convert": (
                "from_rdkit", "to_rdkit", "to_ase", "molecule_from_rdkit", "molecule_from_ase",
            ),
            "molgen_energy.chemistry.molfiles": ("MoleculeReader", "MoleculeTextWriter"),
            "molgen_energy.data.hdf5": ("MoleculeFile", "MoleculeWriter"),
        },
    ),
    Page(
        "Models",
        "Networks, and the base class of a network of your own.",
        {"molgen_energy.models": ()},
    ),
    Page(
        "Systems",
        "The registries of physical systems, data sets and evaluators, and what to derive from.",
        {
            "molgen_energy.systems.registry": ("SYSTEMS", "load_config"),
            "molgen_energy.systems.base": ("System", "Generator", "SamplingResult"),
            "molgen_energy.systems.datasets": ("DATASETS",),
            "molgen_energy.datasets.base": ("Dataset", "PreprocessResult"),
            "molgen_energy.systems.evaluators": ("EVALUATORS", "Evaluator"),
        },
    ),
    Page(
        "Training",
        "Tasks and checkpoints.",
        {
            "molgen_energy.training.task": ("Task",),
            "molgen_energy.training.checkpoint": ("Checkpoint",),
            "molgen_energy.training.loop": ("TrainingInterrupted",),
            "molgen_energy.errors": ("TrainingFailedError",),
        },
    ),
)  # fmt: skip


def resolve(name: str) -> Any:
    """The object of a dotted name of `Page.entries`."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)
