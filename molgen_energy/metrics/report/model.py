"""The model of a report: metrics in rows and columns, for all physical systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molgen_energy.metrics.statistics import Estimate, Mean, Rate
from molgen_energy.output import printable

if TYPE_CHECKING:
    from molgen_energy.metrics.molecule_table import MoleculeTable

MetricValue = Rate | Mean | Estimate
"""A number with its 95 % interval or standard error."""


@dataclass(frozen=True)
class ReportRow:
    """Label of one metric."""

    key: str
    """Of the metric in `ReportColumn.metrics`, and in JSON."""
    label: str
    meaning: str
    unit: str = ""
    hint: str = ""
    """How to get the metric if it was not computed."""
    note: str = ""
    """A restriction of the metric in all files."""
    show_count: bool = False
    """Whether to show the number of samples that the metric rests on."""

    @property
    def heading(self) -> str:
        """The label with its unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


@dataclass(frozen=True)
class ReportSection:
    """Rows under a common title."""

    title: str
    rows: Sequence[ReportRow]


@dataclass
class ReportColumn:
    """The metrics of a file, or of one of several variants of its samples."""

    metrics: dict[str, MetricValue | None]
    """By key; None where not applicable. JSON contains all, the table those with a row."""
    label: str = ""
    """Name of the variant; empty for a file with a single column."""


@dataclass
class EvaluatedFile:
    """Results for one file."""

    name: str
    count: int
    """Number of samples."""
    columns: list[ReportColumn]
    skipped: int = 0
    """Number of bad records that were skipped."""
    notes: list[str] = field(default_factory=list)
    """Restrictions of the metrics."""
    failures: list[str] = field(default_factory=list)
    """The most frequent failures, one line each."""
    provenance: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """Further values for JSON."""
    path: Path | None = None
    """The file, for its checksum; None for samples in memory."""

    @property
    def metrics(self) -> dict[str, MetricValue | None]:
        """The metrics of the first column."""
        return self.columns[0].metrics


@dataclass(frozen=True)
class Setting:
    """An option or version that the results depend on."""

    key: str
    """In JSON."""
    label: str
    """On the page."""
    value: Any
    text: str | None = None
    """The value on the page, if not its own text."""


@dataclass(frozen=True)
class BlockContent:
    """HTML of a block, and pictures to write beside the page, by file name."""

    html: str
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportBlock:
    """Extra content of the page below the table, such as plots or a gallery of molecules."""

    title: str
    content: Callable[[], BlockContent]
    """Draws the content; called when the page is written."""


@dataclass(repr=False)
class Report:
    """Metrics of one or more files, beside those of reference data if there are any.

    `print(report)` shows the table, the most frequent failures and the notes; so does a notebook.
    """

    system: str
    """Physical system, e.g. `molecules`."""
    samples: str
    """Plural name of the samples, e.g. `polygons`."""
    files: list[EvaluatedFile]
    sections: list[ReportSection]
    reference: EvaluatedFile | None = None
    settings: list[Setting] = field(default_factory=list)
    summary: str = ""
    """The most important settings in one line."""
    notes: list[str] = field(default_factory=list)
    """Restrictions of all metrics."""
    blocks: list[ReportBlock] = field(default_factory=list)
    molecules: MoleculeTable | None = None
    """Results of each molecule of the files; None where they were not kept, or of other samples."""

    @classmethod
    def of_files(
        cls,
        system: str,
        samples: str,
        rows: Sequence[ReportRow],
        picture: str,
        files: Sequence[Path],
        evaluate: Callable[[Path, str], tuple[EvaluatedFile, ReportBlock]],
    ) -> Report:
        """The report of a system with one table and one picture for each file.

        Parameters
        ----------
        system, samples
            As for `Report`.
        rows
            Rows of the table.
        picture
            Name of the pictures, numbered if there are several files.
        files
            The files to evaluate.
        evaluate
            Called with a file and the name of its picture.
        """
        evaluated, blocks = [], []
        for number, path in enumerate(files, start=1):
            file, block = evaluate(path, f"{number}_{picture}" if len(files) > 1 else picture)
            evaluated.append(file)
            blocks.append(block)
        return cls(system, samples, evaluated, [ReportSection("", rows)], blocks=blocks)

    @property
    def entries(self) -> list[EvaluatedFile]:
        """All files and, last, the reference."""
        return [*self.files] if self.reference is None else [*self.files, self.reference]

    def warnings(self) -> list[str]:
        """All notes, those of a file with its name."""
        return self.notes + [
            f"{entry.name}: {note}" for entry in self.entries for note in entry.notes
        ]

    def table(self, width: int = 120) -> str:
        """The metrics as a table in plain text.

        Parameters
        ----------
        width
            Maximum number of characters in a line. Files that do not fit side by side come in
            several tables.
        """
        from molgen_energy.metrics.report.table import plain_tables

        return plain_tables(self, width)

    def __repr__(self) -> str:
        files = ", ".join(f"{file.name} ({file.count:,})" for file in self.files)
        return f"Report of {files}; print it for the table"

    def __str__(self) -> str:
        lines = [self.summary]
        lines += [f"{file.name}: {line}" for file in self.files for line in file.failures]
        lines += [f"warning: {text}" for text in self.warnings()]
        return "\n".join([self.table(), *filter(None, map(printable, lines))])

    def to_dict(self) -> dict[str, Any]:
        """All metrics and details as dictionaries and lists, for JSON."""
        from molgen_energy.metrics.report.json import to_dict

        return to_dict(self)

    def to_pandas(self) -> Any:
        """All metrics as a pandas `DataFrame`, one row for each metric of each file.

        Columns: `file` (`data: …` for the reference), `variant` (of files with several),
        `metric`, `label`, `unit`; `value` with its 95 % interval `low`, `high`, or
        `standard_error`; `samples` that it rests on; for distances the median `real` of as many
        real samples, their range `real_low`, `real_high`, and the value's `place` in it. Rates are
        shares from 0 to 1. What is unknown is NaN.

        >>> report.to_pandas().pivot(index="metric", columns="file", values="value")

        Raises
        ------
        InputError
            pandas is not installed.
        """
        from molgen_energy.metrics.report.frame import to_pandas

        return to_pandas(self)

    def _repr_html_(self) -> str:
        from molgen_energy.metrics.report.html import notebook_html

        return notebook_html(self)

    def save(self, folder: str | Path) -> Path:
        """Write `report.html`, `report.json` and the pictures.

        Parameters
        ----------
        folder
            Created if it does not exist; its parent must exist. Other files in it are kept.

        Returns
        -------
        The path of the page.
        """
        from molgen_energy.metrics.report.html import write_report

        return write_report(self, Path(folder))
