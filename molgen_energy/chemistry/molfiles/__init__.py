"""Files of molecules (SDF, XYZ), read and written one record at a time.

Reading keeps one record in memory, takes single files, folders and patterns, packed or not, and
names the file, the record and the line of what it cannot read. Writing keeps everything that a
molecule has.
"""

from molgen_energy.chemistry.fields import FieldSelection
from molgen_energy.chemistry.molfiles.files import FileSet, base_name, molecule_files
from molgen_energy.chemistry.molfiles.reader import BadRecord, MoleculeReader
from molgen_energy.chemistry.molfiles.writer import BondForm, MoleculeTextWriter, count_records

__all__ = [
    "BadRecord",
    "BondForm",
    "FieldSelection",
    "FileSet",
    "MoleculeReader",
    "MoleculeTextWriter",
    "base_name",
    "count_records",
    "molecule_files",
]
