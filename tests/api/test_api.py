"""The public functions, called as a notebook calls them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem

import molgen_energy
from molgen_energy.errors import InputError

TINY = {"model.layers": 1, "model.width": 16, "process.steps": 20, "training.validate_every": 3}


def test_importing_the_package_imports_nothing_slow():
    code = (
        "import sys, molgen_energy\n"
        "assert not {'torch', 'rdkit', 'h5py', 'numpy'} & sys.modules.keys()\n"
        "assert callable(molgen_energy.load_checkpoint)\n"
        "print(molgen_energy.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'sampel'") as raised:
        molgen_energy.sampel  # noqa: B018
    # Python's traceback suggests a name from these.
    assert (raised.value.name, raised.value.obj) == ("sampel", molgen_energy)


@pytest.mark.parametrize(
    "name",
    ["preprocess", "train", "tune", "sample", "evaluate", "show", "load_checkpoint", "load_run"],
)
def test_every_parameter_is_described(name):
    """In the order of the signature; the site shows the type of the first one of a line."""
    function = getattr(molgen_energy, name)
    text = inspect.getdoc(function) + "\n\n"
    section = text.split("Parameters\n----------\n")[1].split("\n\n")[0]
    lines = [line.split(", ") for line in re.findall(r"^\w.*", section, re.MULTILINE)]
    parameters = inspect.signature(function).parameters
    assert [parameter for line in lines for parameter in line] == list(parameters)
    for line in lines:
        assert len({parameters[parameter].annotation for parameter in line}) == 1, line


def test_sample_returns_rdkit_molecules():
    """With conformers, and the bonds that a file of the same molecules has."""
    options = {"checkpoint": "qm9_energy", "steps": 4, "n_atoms": (5, 9), "seed": 2}
    drawn = molgen_energy.sample(3, **options)
    assert [type(molecule) for molecule in drawn] == [Chem.Mol] * 3
    for molecule in drawn:
        assert 5 <= molecule.GetNumAtoms() <= 9
        assert np.isfinite(molecule.GetConformer().GetPositions()).all()
        assert molecule.GetProp("bonds") == "perceived"
        assert molecule.GetProp("trained_on") == "QM9 (qm9pack)"  # chooses the reference
    again = molgen_energy.sample(3, **options)
    for one, other in zip(drawn, again, strict=True):
        assert np.array_equal(
            one.GetConformer().GetPositions(), other.GetConformer().GetPositions()
        )


def test_options_of_temperature():
    options = {"checkpoint": "qm9_energy", "steps": 4, "n_atoms": 6}
    plain = molgen_energy.sample(1, **options)
    same = molgen_energy.sample(1, temperature=1, temperature_of="score", **options)
    cold = molgen_energy.sample(
        1, temperature=0.5, temperature_of="noise", temperature_range=(None, 3), final_noise=0,
        **options,
    )  # fmt: skip
    positions = [one[0].GetConformer().GetPositions() for one in (plain, same, cold)]
    assert np.array_equal(positions[0], positions[1])
    assert not np.array_equal(positions[0], positions[2])


def test_from_molecules_in_memory_to_a_report(tmp_path, monkeypatch):
    """preprocess, train, load_checkpoint, sample and evaluate, without a file of one's own."""
    monkeypatch.chdir(tmp_path)
    molecules = molgen_energy.sample(12, checkpoint="qm9_mse", steps=4, n_atoms=6)
    prepared = molgen_energy.preprocess(molecules, "mine.h5")
    assert (prepared.path, prepared.count) == (Path("mine.h5"), 12)
    steps: list[int] = []
    starts: list[str] = []
    summary = molgen_energy.train(
        data=prepared.path, loss="mse", steps=3, batch_size=4, changes=TINY, output="run",
        callback=lambda step, *_: steps.append(step),
        on_start=lambda run: starts.append(run.system.name),
    )  # fmt: skip
    assert steps == [1, 2, 3] and starts == ["molecules"]
    assert (summary.folder, summary.steps, summary.skipped) == (Path("run"), 3, 0)
    assert summary.config.loss.name == "mse"
    checkpoint = molgen_energy.load_checkpoint("run")
    assert checkpoint.origin == "run, step 3"
    done = molgen_energy.train(resume="run")
    assert done.already_complete and done.steps == 3
    longer = molgen_energy.train(resume="run", steps=5)
    assert longer.steps == 5 and not longer.already_complete
    result = molgen_energy.sample(4, "drawn.xyz", checkpoint="run")
    assert (result.path, result.written) == (Path("drawn.xyz"), 4)
    report = molgen_energy.evaluate("drawn.xyz", metrics="rates", workers=0)
    assert report.files[0].count == 4


def test_samples_of_another_system_are_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    molgen_energy.preprocess("shapes", "shapes.h5", vertices=5, count=40)
    molgen_energy.train("shapes_energy", data="shapes.h5", steps=2, output="run")
    arrays = molgen_energy.sample(7, checkpoint="run")
    assert arrays["positions"].shape == (7, 5, 2)
    assert arrays["radius"].shape == (7,)


def test_bad_options_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"did you mean 'qm9_energy'\?"):
        molgen_energy.load_checkpoint("qm9_energi")
    with pytest.raises(
        InputError, match="--springs goes with --loss energy or score_energy, not mse"
    ):
        molgen_energy.train(loss="mse", springs="inverse")
    with pytest.raises(InputError, match="--data is not an option for molecules"):
        molgen_energy.sample(1, data="couplings.npz", checkpoint="qm9_energy")
    with pytest.raises(InputError, match="was trained without properties; leave out --where"):
        molgen_energy.sample(1, "a.sdf", checkpoint="qm9_energy", where={"gap": 0.2})
    with pytest.raises(InputError, match=r"--temperature-range 0\.3:0\.2: expected two"):
        reversed_range = {"temperature": 0.9, "temperature_range": (0.3, 0.2)}
        molgen_energy.sample(1, "a.sdf", checkpoint="qm9_energy", **reversed_range)
    assert list(tmp_path.iterdir()) == []
