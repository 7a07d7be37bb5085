"""Records of SDF files: mol blocks (V2000 and V3000) and data fields.

RDKit reads a mol block. What it refuses, but other programs write, is put into the form of the
format first: symbols in other cases, numbers with exponents, empty lines before `M  END`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice

from rdkit import Chem, rdBase
from rdkit.Chem import rdChemReactions

from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.chemistry.fields import MOST_FIELDS, check_field_count, parse_number
from molgen_energy.chemistry.molfiles.columns import COUNTS, find_fault, has_numbers_in_columns
from molgen_energy.chemistry.molfiles.lines import DAMAGED, NUL, Lines, Record, TooLargeError
from molgen_energy.chemistry.molfiles.plain_blocks import read_plain_blocks
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.molecules import Molecule
from molgen_energy.elements import atomic_number, symbol

_END = "M  END\n"
_V30 = "M  V30 "
# RDKit reads the number before such an exponent and ignores the rest, in V3000 without an error.
_OTHER_EXPONENT = re.compile(r"\d\.?(?:[dD][+-]?\d|\*\^)")
_TOUCHING = re.compile(r"(?<=[0-9])-(?=[0-9.])")  # two numbers of which the second is wide
# A reaction with one reactant, whose mol block begins at the next line.
_REACTION = "$RXN\n\n\n\n  1  0\n$MOL\n"
# A header `>  <name>`, and the lines up to an empty one or to the next header.
_FIELD = re.compile(r"^>[^<\n]*<([^>\n]+)>.*\n((?:(?!>.*<).*\S.*\n?)*)", re.MULTILINE)
_VERSION = re.compile(r"V[23]000\s*$")
_LINES_AT_ONCE = 20_000


def read_records(lines: Lines) -> Iterator[Record]:
    """The molecule and the data fields of each record."""
    for part in _together(split_records(lines)):
        texts = ["".join(record) for _, record in part]
        plain = read_plain_blocks(texts)
        for (start, record), text, molecule in zip(part, texts, plain, strict=True):
            yield _record(start, record, text, molecule)


def _record(start: int, lines: list[str], text: str, plain: Molecule | None) -> Record:
    """A record of lines from a number on; `plain` is its molecule where that was easy to read."""
    if "\0" in text:
        return Record(start, NUL, {})
    if not text or text.isspace():
        return Record(start, "an empty record", {})
    if (second := _second_block(text, lines)) is not None:
        reason = f"a second mol block begins at line {start + second} without $$$$ before it"
        return Record(start, reason, {})
    try:
        fields = _data_fields(text)
    except ValueError as error:
        return Record(start, str(error), {})
    return Record(start, parse_mol_block(text, start) if plain is None else plain, fields)


def _together(
    records: Iterator[tuple[int, list[str]]],
) -> Iterator[list[tuple[int, list[str]]]]:
    """Records that are read together; those before what cannot be read come before its error."""
    part: list[tuple[int, list[str]]] = []
    count = 0
    try:
        for record in records:
            part.append(record)
            count += len(record[1])
            if count > _LINES_AT_ONCE:
                yield part
                part, count = [], 0
    except (*DAMAGED, TooLargeError):
        yield part
        raise
    yield part


def split_records(lines: Lines) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line of each record, and its lines up to `$$$$`.

    What follows the last `$$$$` is a record unless it is empty.
    """
    while True:
        lines.begin_record()
        start = lines.number + 1
        record, ended = lines.until("$$$$")
        if ended or any(text.strip() for text in record):
            yield start, record
        if not ended:
            return


def _second_block(text: str, record: list[str]) -> int | None:
    """The line, from 0, of a second mol block that is no value of a data field."""
    if text.count("V2000") + text.count("V3000") < 2:
        return None
    blocks, ended, in_field = [], False, False
    for k, line in enumerate(record):
        ended = ended or line.startswith("M  END")
        in_field = (in_field and bool(line.strip())) or (ended and line.startswith(">"))
        if not in_field and _VERSION.search(line):
            blocks.append(k - COUNTS)
    return max(blocks[1], 1) if len(blocks) > 1 else None


def _data_fields(record: str) -> dict[str, str]:
    """The data fields of a record, after its mol block; `ValueError` where there are too many."""
    found = _FIELD.finditer(record, max(0, record.find(_END)))
    fields = list(islice(found, MOST_FIELDS + 1))
    check_field_count(len(fields))
    return {match[1]: match[2].rstrip("\n") for match in fields}


def parse_mol_block(block: str, start: int = 1) -> Molecule | str:
    """The molecule of a mol block that begins at a line of the file, or why it cannot be read."""
    parsed, fault = None, find_fault(block)
    if fault is None and not ("V3000" in block and _OTHER_EXPONENT.search(block)):
        parsed = _read(block)
    if parsed is None and (fault is None or fault.by_words):
        block = _repaired(block)
        fault = find_fault(block)
        parsed = _read(block) if fault is None else None
    if fault is not None:
        return f"no readable mol block: line {start + fault.line}: {fault.reason}"
    if parsed is None:
        return f"no readable mol block: {_reason(block, start)}"
    try:
        return molecule_from_rdkit(parsed)
    except ValueError as error:
        return str(error)


def _read(block: str) -> Chem.Mol | None:
    with rdBase.BlockLogs():
        try:
            return Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)
        except (RuntimeError, IndexError):  # such as a bond to an atom that is not there
            return None


def _reason(block: str, start: int) -> str:
    """Why RDKit cannot read a mol block, with the line in the file.

    `MolFromMolBlock` writes the reason into RDKit's log alone. The reader of reactions calls the
    same parser and raises it, so that no log has to be redirected.
    """
    with rdBase.BlockLogs():
        try:
            rdChemReactions.ReactionFromRxnBlock(_REACTION + block)
        except IndexError:  # the parser cuts columns out of a line that ends before them
            text = ""
        except (ValueError, RuntimeError) as error:
            text = str(error)
        else:
            text = ""
    if "AtomIdx" in text and text.startswith("Range Error"):
        return "a bond names an atom that is not there"
    lines = text.rpartition("The error was:")[2].strip().splitlines()
    if text.startswith("Pre-condition Violation"):
        return lines[1].strip()
    if not lines or "Null reactant" in lines[0]:
        return "it is cut off, or its counts do not fit"
    reason, shift = lines[0], start - 1 - _REACTION.count("\n")
    if found := re.match("Element '(.*)' not found", reason):
        for k, line in enumerate(block.splitlines()):
            if k > COUNTS and found[1].lower() in line.lower().split():
                return f"{reason} on line {start + k}"
    return re.sub(r"\bline ?(\d+)", lambda match: f"line {int(match[1]) + shift}", reason)


def _repaired(block: str) -> str:
    """The block with atoms in the form of the format, and no empty lines before `M  END`."""
    lines = block.split("\n")
    end = next((k for k, line in enumerate(lines) if line.startswith("M  END")), None)
    if end is None or end <= COUNTS:
        return block
    if "V3000" in lines[COUNTS]:
        body = [_repaired_v3000(line) for line in lines[COUNTS + 1 : end]]
        after_bonds = 0
    else:
        try:
            atoms, bonds = int(lines[COUNTS][:3]), int(lines[COUNTS][3:6])
        except ValueError:
            return block
        body = lines[COUNTS + 1 : end]
        body[:atoms] = map(_repaired_v2000, body[:atoms])
        after_bonds = atoms + bonds
    body[after_bonds:] = filter(str.strip, body[after_bonds:])
    return "\n".join([*lines[: COUNTS + 1], *body, *lines[end:]])


def _repaired_v2000(line: str) -> str:
    """The line of an atom: x, y, z in 10 columns each, a symbol, and numbers that are kept."""
    words = _TOUCHING.sub(" -", line).split()
    try:
        numbers = [parse_number(text) for text in words[:3]]
        name = _symbol(words[3])
    except (ValueError, IndexError):
        return line
    if line[30:34].strip() == words[3] and has_numbers_in_columns(line):
        rest = line[34:]
    else:
        rest = f"{words[4]:>2}" if len(words) > 4 else ""
        rest += "".join(f"{word:>3}" for word in words[5:])
    return f"{''.join(map(_ten_columns, numbers))} {name:<3}{rest}"


def _ten_columns(value: float) -> str:
    """A number in 10 columns, with as many decimals as fit; 4 are usual."""
    return f"{value:10.{max(0, min(7, 8 - len(str(int(abs(value))))))}f}"


def _repaired_v3000(line: str) -> str:
    """The line of an atom, `M  V30 index symbol x y z …`; others are kept."""
    words = line.split()
    try:
        numbers = [repr(parse_number(text)) for text in words[4:7]]
        name = _symbol(words[3])
    except (ValueError, IndexError):
        return line
    if len(numbers) < 3 or not line.startswith(_V30) or not words[2].isdecimal():
        return line
    return " ".join([_V30.rstrip(), words[2], name, *numbers, *words[7:]])


def _symbol(text: str) -> str:
    """An element's symbol in its usual case; `ValueError` where it is none, such as of a query."""
    if not text.isalpha():
        raise ValueError(text)
    number = atomic_number(text)
    return text.upper() if text.upper() in ("D", "T") else symbol(number)


def format_record(molecule: Molecule, name: str, fields: Mapping[str, str | float]) -> str:
    """A record of a molecule, with the bonds and charges that it has as they are."""
    with rdBase.BlockLogs():
        built = build(molecule, positions=True)
        built.UpdatePropertyCache(strict=False)
        built.SetProp("_Name", name)
        # Without this, RDKit marks every double bond as one whose stereo is unknown.
        Chem.FastFindRings(built)
        Chem.DetectBondStereoChemistry(built, built.GetConformer())
        block = Chem.MolToMolBlock(built, kekulize=False)
    # An empty line would end a field.
    texts = {_key(name): str(value).strip() for name, value in fields.items()}
    data = "".join(f">  <{key}>\n{text}\n\n" for key, text in texts.items() if text)
    return f"{block}{data}$$$$\n"


def _key(name: str) -> str:
    return re.sub(r"[<>\s]+", "_", name)
