"""Molecules with fixed atoms: how many are valid, and how many are the molecule they come from.

    python benchmarks/fragments.py --checkpoint qm9_energy --data qm9.h5 --work work
    python benchmarks/fragments.py --checkpoint ccd_energy --data ccd.h5 --work work --steps 50

Cuts held-out molecules (test split, with bonds) into atoms that stay and atoms to generate, of
three kinds: `part`, one side of a single bond outside of rings; `linker`, what joins two ends;
`groups`, all but the scaffold of Bemis and Murcko with its hydrogens. `sample --keep` gets the
fixed atoms and the number of the others, once with and once without `--resample`. Beside them:
`substituents`, which replaces the side that is cut off by one of a training molecule, chosen at
random among those of the same number of atoms, in the direction of the bond (parts alone); and
`data`, the molecules themselves.

Measures, each over samples, but recovery and uniqueness over molecules, with 95 % intervals of
bootstraps over molecules: `valid`, RDKit sanitises all in one fragment; `complete`, also without
missing hydrogens; `unique`, distinct ones among the valid; `recovered`, molecules of which a sample
has the SMILES; `novel`, valid ones that are no training molecule; QED, SA and rings of the valid
(DiffLinker's measures: Igashov et al., Nat. Mach. Intell. 6, 417, 2024); and the largest distance
of a fixed atom from its place. Samples stay in --work, and are not drawn again.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem.QED import qed
from rdkit.Chem.Scaffolds.MurckoScaffold import GetScaffoldForMol
from rich.console import Console
from rich.table import Table

from molgen_energy.api.sample import sample_to
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import to_rdkit
from molgen_energy.chemistry.descriptors import synthetic_accessibility
from molgen_energy.chemistry.identity import identify
from molgen_energy.cli.console import exit_on_error, say
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.output import atomic_write

Bool = NDArray[np.bool_]
KINDS = ("part", "linker", "groups")
