"""Small Chemical Component Dictionaries."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem
from rdkit.Chem import AllChem

SMILES = {
    "BNZ": "c1ccccc1",
    "TOL": "Cc1ccccc1",
    "GLY": "[NH3+]CC(=O)[O-]",
    "LAC": "C[C@H](O)C(=O)O",
    "DLA": "C[C@@H](O)C(=O)O",
    "OLD": "CCO",
    "GAP": "CCN",
    "SEL": "C[Se]C",
    "SAL": "CC(=O)[O-].[Na+]",
    "ION": "[Cl-]",
    "RAD": "C[CH]C",
    "LNG": "CCCF",
}
_ORDERS = {1.0: "SING", 2.0: "DOUB", 3.0: "TRIP"}


def dictionary(folder: Path, smiles: dict[str, str]) -> Path:
    """A dictionary of these molecules, in the true layout; needs biotite.

    OLD is obsolete, the last atom of GAP has no coordinates, and the fluorine of LNG is far off.
    """
    from biotite.structure.io import pdbx

    about: dict[str, list[Any]] = {"id": list(smiles), "pdbx_release_status": []}
    atoms: dict[str, list[Any]] = {
        name: []
        for name in ("comp_id", "atom_id", "type_symbol", "charge", "x", "y", "z", "missing")
    }
    bonds: dict[str, list[Any]] = {
        name: [] for name in ("comp_id", "atom_id_1", "atom_id_2", "value_order")
    }
    for name, text in smiles.items():
        about["pdbx_release_status"].append("OBS" if name == "OLD" else "REL")
        molecule = Chem.AddHs(Chem.MolFromSmiles(text))
        AllChem.EmbedMolecule(molecule, randomSeed=1)
        Chem.Kekulize(molecule, clearAromaticFlags=True)
        places = molecule.GetConformer().GetPositions()
        if name == "LNG":
            places[3] += 3 * (places[3] - places[2])
        for atom in molecule.GetAtoms():
            k = atom.GetIdx()
            last = name == "GAP" and k == molecule.GetNumAtoms() - 1
            values = (name, f"A{k}", atom.GetSymbol().upper(), atom.GetFormalCharge(), *places[k])
            for column, value in zip(atoms, (*values, last), strict=True):
                atoms[column].append(value)
        for bond in molecule.GetBonds():
            ends = (f"A{bond.GetBeginAtomIdx()}", f"A{bond.GetEndAtomIdx()}")
            for column, value in zip(
                bonds, (name, *ends, _ORDERS[bond.GetBondTypeAsDouble()]), strict=True
            ):
                bonds[column].append(value)
    mask = np.where(atoms.pop("missing"), pdbx.MaskValue.MISSING, pdbx.MaskValue.PRESENT)
    places_of = {axis: np.array(atoms.pop(axis)) for axis in "xyz"}
    columns: dict[str, Any] = {name: np.array(values) for name, values in atoms.items()}
    for axis, values in places_of.items():
        columns[f"pdbx_model_Cartn_{axis}_ideal"] = pdbx.BinaryCIFColumn(
            values, mask.astype(np.uint8)
        )
        columns[f"model_Cartn_{axis}"] = values + 1
    block = pdbx.BinaryCIFBlock(
        {
            "chem_comp": pdbx.BinaryCIFCategory(
                {name: np.array(values) for name, values in about.items()}
            ),
            "chem_comp_atom": pdbx.BinaryCIFCategory(columns),
            "chem_comp_bond": pdbx.BinaryCIFCategory(
                {name: np.array(values) for name, values in bonds.items()}
            ),
        }
    )
    path = folder / "components.bcif"
    file = pdbx.BinaryCIFFile({"components": block})
    stream = io.BytesIO()
    file.write(stream)
    path.write_bytes(stream.getvalue())
    return path
