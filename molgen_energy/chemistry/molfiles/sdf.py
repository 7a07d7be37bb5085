"""Records of SDF files: mol blocks (V2000 and V3000) and data fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from rdkit import Chem, rdBase

from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.chemistry.molfiles.lines import Lines, Record
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.molecules import Molecule

_END = "M  END\n"
# A header `>  <name>`, and the lines up to an empty one or to the next header.
_FIELD = re.compile(r"^>.*?<([^>\n]+)>.*\n((?:(?!>.*<).*\S.*\n?)*)", re.MULTILINE)


def read_records(lines: Lines) -> Iterator[Record]:
    """Each record up to its `$$$$`."""
    while True:
        start = lines.number + 1
        record: list[str] = []
        while (line := lines.next()) is not None and not line.startswith("$$$$"):
            record.append(line)
        if any(text.strip() for text in record):
            text = "".join(record)
            yield Record(start, parse_mol_block(text), _data_fields(text))
        elif line is not None:
            yield Record(start, "an empty record", {})
        if line is None:
            return


def _data_fields(record: str) -> dict[str, str]:
    """The data fields of a record, after its mol block."""
    fields = _FIELD.findall(record, max(0, record.find(_END)))
    return {name: value.rstrip("\n") for name, value in fields}


def parse_mol_block(block: str) -> Molecule | str:
    """The molecule of a record, or why it cannot be read."""
    with rdBase.BlockLogs():
        try:
            parsed = Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)
        except RuntimeError as error:
            return f"no readable mol block ({str(error).splitlines()[0]})"
    if parsed is None:
        return "no readable mol block (cut off, or counts that do not fit)"
    try:
        return molecule_from_rdkit(parsed)
    except ValueError as error:
        return str(error)


def format_record(molecule: Molecule, name: str, fields: Mapping[str, str | float]) -> str:
    """A record of a molecule, with the bonds and charges that it has as they are."""
    with rdBase.BlockLogs():
        built = build(molecule, positions=True)
        built.UpdatePropertyCache(strict=False)
        built.SetProp("_Name", name)
        block = Chem.MolToMolBlock(built, kekulize=False)
    # An empty line would end a field.
    texts = {_key(name): str(value).strip() for name, value in fields.items()}
    data = "".join(f">  <{key}>\n{text}\n\n" for key, text in texts.items() if text)
    return f"{block}{data}$$$$\n"


def _key(name: str) -> str:
    return re.sub(r"[<>\s]+", "_", name)
