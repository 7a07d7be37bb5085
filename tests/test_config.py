from __future__ import annotations

import pytest
import yaml

from molgen_energy.config import config_names, parse_assignments
from molgen_energy.errors import InputError
from molgen_energy.systems.registry import load_config
from molgen_energy.training.loop import total_steps


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_config_is_whole(name):
    config = load_config(name)
    assert config.name == name
    assert total_steps(config.training, 10) > 0
    assert load_config(name) == config


def test_the_four_are_shipped():
    assert set(config_names()) >= {"quick", "qm9_gdm", "qm9_gdm_aug", "qm9_gdm_cpu"}


def test_there_and_back(tmp_path):
    config = load_config("quick").replaced({"model.layers": 6, "data.elements": ["H", "N"]})
    (tmp_path / "a.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "a.yaml") == config


def test_assignments():
    texts = ["model.layers=6", "training.lr=1e-4", "data.elements=[H, N]", "data.path=null",
             "training.augment_rotations=true"]  # fmt: skip
    config = load_config("quick").replaced(parse_assignments(texts))
    assert (config.model.layers, config.training.lr) == (6, 1e-4)
    assert config.data.elements == ["H", "N"]
    assert config.training.augment_rotations is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.layer=6", r"unknown config key 'model\.layer'; did you mean 'model\.layers'\?"),
        ("modle.layers=6", r"unknown config key 'modle\.layers'.*valid: name, system"),
        ("model.layers.deep=6", r"unknown config key 'model\.layers\.deep'"),
        ("model.layers=0", r"model\.layers: .*greater than 0"),
        ("model.layers=six", r"model\.layers: .*valid integer"),
        ("model.name=egnn9", r"unknown model 'egnn9'.*valid: gdm"),
        ("loss.name=enrgy", r"unknown loss 'enrgy'; did you mean 'energy'\?"),
        ("loss.springs.family=stiff", r"unknown spring family 'stiff'.*inverse_square"),
        ("loss.name=local_field", r"'local_field' is a loss on spins"),
        ("loss.edges.kind=sparce", r"unknown edges 'sparce'; did you mean 'sparse'\?"),
        ("loss.edges.pool=0", r"loss\.edges\.pool: .*greater than 0"),
        ("loss.edges.tolerance=-1", r"loss\.edges\.tolerance: .*greater than 0"),
        ("loss.springs.distance=feature", r"loss\.springs\.distance: .*'positions' or 'features'"),
        ("loss.springs.scale=big", r"loss\.springs\.scale: .*above 0 or auto, gdm, edm, jodo"),
        ("loss.springs.scale=-1", r"loss\.springs\.scale: .*greater than 0"),
        ("loss.position_weight=big", r"loss\.position_weight: .*above 0 or auto"),
        ("loss.edges.pool=100000000", r"loss\.edges\.pool: .*10000"),
        ("loss.edges=sparse", r"loss\.edges: holds kind, pool, tolerance"),
        ("diffusion.process=flow", r"unknown process 'flow'.*flow_matching"),
        ("training.lr=fast", r"training\.lr: "),
        ("training.lr=-1", r"training\.lr: .*greater than 0"),
        ("training.lr=.nan", r"training\.lr: "),
        ("data.window=0", r"data\.window: .*greater than 0"),
        ("data.in_memory=sometimes", r"data\.in_memory: "),
        ("data.elements=[Xx]", r"data\.elements: .*no chemical element"),
        ("system=planets", r"other keys are those of molecules"),
        ("system=spins", r"system: the other keys are those of molecules.*--config of spins"),
    ],
)
def test_bad_values_are_named(text, message):
    with pytest.raises(InputError, match=message):
        load_config("quick").replaced(parse_assignments([text]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("spins_margin", "model.kernel=4", r"model\.kernel: .*odd number"),
        ("spins_margin", "loss.gauge=free", r"loss\.gauge: .*'fixed' or 'either'"),
        ("spins_margin", "loss.temperature=0", r"loss\.temperature: .*greater than 0"),
        ("spins_margin", "loss.springs.family=inverse", r"unknown config key 'loss\.springs"),
        ("spins_margin", "training.augment_rotations=true", r"unknown config key 'training\.aug"),
        ("spins_margin", "model.name=gdm", r"unknown model 'gdm' \(valid: resnet\)"),
        ("shapes_energy", "model.name=gdm", r"unknown model 'gdm' \(valid: mlp\)"),
        ("shapes_energy", "loss.position_weight=1", r"unknown config key 'loss\.position_weight'"),
    ],
)
def test_bad_values_of_other_systems_are_named(name, text, message):
    with pytest.raises(InputError, match=message):
        load_config(name).replaced(parse_assignments([text]))


@pytest.mark.parametrize("text", ["model.layers", "=3", "a=[", ""])
def test_bad_assignments(text):
    with pytest.raises(InputError, match="--set"):
        parse_assignments([text])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {layer: 3}", r"unknown config key 'model\.layer'"),
        ("modle: {layers: 3}", r"unknown config key 'modle'; did you mean 'model'"),
        ("[1, 2]", "does not hold keys"),
        ("a: b: c", "is no YAML"),
        ("model: 3", "model: "),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_config(path)


def test_missing_configs(tmp_path):
    with pytest.raises(InputError, match=r"unknown config 'quik'; did you mean 'quick'"):
        load_config("quik")
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path / "mine.yaml")


def test_configs_are_complete():
    """A shipped file leaves no setting of model, loss or length to a default."""
    for name in config_names():
        values = yaml.safe_load(load_config(name).to_yaml())
        assert values["training"]["steps"] or values["training"]["epochs"]
