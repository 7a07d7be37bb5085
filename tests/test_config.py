from __future__ import annotations

import pickle
from typing import Annotated

import pytest
import yaml

from molgen_energy.config import (
    Config,
    OneOf,
    PositiveInt,
    RawConfig,
    Section,
    config_names,
    parse_assignments,
)
from molgen_energy.data.batches import EpochStarts
from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.registry import load_config
from molgen_energy.training.loop import total_steps
from molgen_energy.training.plan import planned_values


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_config_is_whole(name):
    config = load_config(name)
    assert config.name == name
    planned = config.replaced(planned_values(config.training, 100))
    assert total_steps(planned.training, EpochStarts(10)) > 0
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
        (
            "loss.springs.scale=big",
            r"loss\.springs\.scale: .*above 0 or auto, sample, gdm, edm, jodo",
        ),
        ("loss.springs.scale=-1", r"loss\.springs\.scale: .*greater than 0"),
        ("training.weight_decay=.inf", r"training\.weight_decay: .*finite"),
        ("objective.position_weight=big", r"objective\.position_weight: .*above 0 or auto"),
        (
            "objective.field_weights={elements: -1}",
            r"objective\.field_weights\.elements: .*equal to 0",
        ),
        (
            "objective.terms.torsion.rest=value",
            r"set the whole entry, such as objective\.terms\.torsion=\{rest: value\}",
        ),
        ("objective.weighting=noisy", r"objective\.weighting: .*'auto', 'noise' or 'clean'"),
        ("scales.elements=0", r"scales\.elements: .*greater than 0"),
        ("loss.edges.pool=100000000", r"loss\.edges\.pool: .*10000"),
        ("loss.edges=sparse", r"loss\.edges: holds kind, pool, tolerance"),
        ("process.name=flow", r"process\.name: unknown process 'flow'.*flow_matching"),
        ("process.steps=1", r"process\.steps: .*greater than or equal to 2"),
        ("process.prediction=score", r"process\.prediction: .*'noise', 'velocity' or 'clean'"),
        ("condition.name=property", r"unknown condition 'property'; did you mean 'properties'\?"),
        (
            "condition.dropout=0.1",
            r"unknown config key 'condition\.dropout' \(valid: condition\.name",
        ),
        ("training.steps=1e19", r"training\.steps: .*less than 9223372036854776000"),
        ("training.batch_size=null", r"exactly one of batch_size and pairs_per_batch"),
        ("training.pairs_per_batch=0", r"training\.pairs_per_batch: .*greater than 0"),
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


def test_pairs_or_molecules_set_the_size_of_batches():
    config = load_config("quick")
    by_pairs = config.replaced({"training.pairs_per_batch": 9000})
    assert (by_pairs.training.batch_size, by_pairs.training.pairs_per_batch) == (None, 9000)
    assert by_pairs.replaced({"training.batch_size": 64}) == config
    assert config.replaced({"training.pairs_per_batch": None}) == config
    alone = MoleculeConfig.of(RawConfig("a", {"name": "a", "training": {"pairs_per_batch": 9}}))
    assert alone.training.batch_size is None
    with pytest.raises(InputError, match=r"training: .*exactly one of batch_size and pairs_per"):
        config.replaced({"training.pairs_per_batch": 9, "training.batch_size": 9})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("spins_margin", "model.kernel=4", r"model\.kernel: .*odd number"),
        ("spins_margin", "loss.gauge=free", r"loss\.gauge: .*'fixed' or 'either'"),
        ("spins_local_field", "loss.temperature=0", r"loss\.temperature: .*greater than 0"),
        (
            "spins_margin",
            "loss.temperature=1",
            r"unknown config key 'loss\.temperature' \(valid: "
            r"loss\.name, loss\.gauge, loss\.margin\)",
        ),
        ("spins_true_energy", "loss.gauge=fixed", r"unknown config key 'loss\.gauge'"),
        ("spins_margin", "loss.name=mse", r"loss\.name: 'mse' is a loss on positions"),
        ("spins_margin", "loss.name=margins", r"loss\.name: unknown loss 'margins'; did you mean"),
        ("spins_margin", "loss=margin", r"loss: expected the keys of a loss, such as name"),
        ("spins_margin", "loss.springs.family=inverse", r"unknown config key 'loss\.springs"),
        ("spins_margin", "training.augment_rotations=true", r"unknown config key 'training\.aug"),
        ("spins_margin", "model.name=gdm", r"unknown model 'gdm' \(valid: resnet\)"),
        ("shapes_energy", "model.name=gdm", r"unknown model 'gdm' \(valid: mlp\)"),
        ("shapes_energy", "loss.position_weight=1", r"unknown config key 'loss\.position_weight'"),
        ("shapes_energy", "loss.name=local_field", r"loss\.name: 'local_field' is a loss on spins"),
        (
            "shapes_energy",
            "loss.springs.family=stiff",
            r"unknown spring family 'stiff'.*inverse_sq",
        ),
        (
            "shapes_energy",
            "loss.springs.scale=big",
            r"loss\.springs\.scale: .*above 0 or auto, sample, gdm",
        ),
        ("shapes_energy", "loss.edges=sparse", r"loss\.edges: holds kind, pool, tolerance"),
        (
            "shapes_energy",
            "loss.edges.kind=sparce",
            r"unknown edges 'sparce'; did you mean 'sparse'",
        ),
        ("shapes_energy", "model.kernel=3", r"'model\.kernel'.*valid: model\.name, model\.layers"),
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
        ("a: b: c", "is not YAML"),
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


# -- unions of sections -------------------------------------------------------------------------


class Oak:
    class Config(Section):
        name: str = "oak"
        height: PositiveInt = 20
        acorns: int = 1000
        age: int = 100


class Fir:
    class Config(Section):
        name: str = "fir"
        height: PositiveInt = 40
        cones: int = 50
        age: str = "old"


TREES = {"oak": Oak, "fir": Fir}


class Forest(Config):
    system: str = "forests"
    tree: Annotated[Section, OneOf("tree", TREES, {"reefs": {"coral"}})] = Oak.Config()


def forest(**values) -> Forest:
    return Forest.of(RawConfig("forest.yaml", {"name": "f", **values}))


def test_the_name_chooses_the_section():
    assert type(forest().tree) is Oak.Config
    assert type(forest(tree={"name": "fir", "cones": 3}).tree) is Fir.Config
    assert forest(tree={"height": 3}).tree == Oak.Config(height=3)  # the default's name


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "elm"}, r"forest\.yaml: tree\.name: unknown tree 'elm' \(valid: oak, fir\)"),
        ({"name": "firr"}, r"tree\.name: unknown tree 'firr'; did you mean 'fir'\?"),
        ({"name": 3}, r"tree\.name: unknown tree '3'"),
        ({"name": "coral"}, r"tree\.name: 'coral' is a tree on reefs \(valid here: oak, fir\)"),
        (
            {"name": "fir", "acorns": 1},
            r"forest\.yaml: unknown config key 'tree\.acorns'.*valid: tree\.name, tree\.height, "
            r"tree\.cones, tree\.age\)",
        ),
        ({"cones": 1}, r"unknown config key 'tree\.cones'.*tree\.acorns"),
        ({"name": "fir", "height": 0}, r"forest\.yaml: tree\.height: .*greater than 0 \(it is 0\)"),
        ("fir", r"forest\.yaml: tree: expected the keys of a tree, such as name"),
        (None, r"forest\.yaml: tree: expected the keys of a tree"),
    ],
)
def test_bad_sections_are_named(tree, message):
    with pytest.raises(InputError, match=message):
        forest(tree=tree)
    with pytest.raises(InputError, match=message.replace("forest\\.yaml", "the given options")):
        forest().replaced({"tree": tree})


def test_a_change_of_name_keeps_common_keys_that_were_set():
    found = forest(tree={"height": 5, "acorns": 7, "age": 3}).replaced({"tree.name": "fir"})
    assert found.tree == Fir.Config(height=5)  # age has another type
    assert forest().replaced({"tree.name": "fir"}).tree == Fir.Config()  # not oak's default height
    back = found.replaced({"tree.name": "oak"})
    assert back.tree == Oak.Config(height=5)
    assert found.replaced({"tree.name": "fir"}) == found


@pytest.mark.parametrize("order", [1, -1])
def test_changes_of_other_keys_come_after_the_name(order):
    changes = [("tree.name", "fir"), ("tree.cones", 9), ("training.seed", 4)][::order]
    found = forest(tree={"acorns": 7}).replaced(dict(changes))
    assert found.tree == Fir.Config(cones=9)
    assert found.training.seed == 4
    with pytest.raises(InputError, match=r"unknown config key 'tree\.acorns'"):
        found.replaced({"tree.acorns": 1})
    with pytest.raises(InputError, match=r"unknown config key 'tree\.acorns'"):
        forest().replaced({"tree.acorns": 1, "tree.name": "fir"})
    with pytest.raises(InputError, match=r"unknown config key 'tree\.name\.first'"):
        forest().replaced({"tree.name.first": 1})


def test_the_default_of_a_section_that_is_not_in_the_file_is_kept():
    class Grove(Config):
        system: str = "groves"
        tree: Annotated[Section, OneOf("tree", TREES)] = Fir.Config(cones=1)

    grove = Grove.of(RawConfig("grove.yaml", {"name": "g"}))
    assert grove.replaced({"tree.height": 2}).tree == Fir.Config(cones=1, height=2)


def test_a_resolved_config_survives_yaml_and_pickle(tmp_path):
    config = forest(tree={"name": "fir", "height": 6})
    values = yaml.safe_load(config.to_yaml())
    assert values["tree"] == {"name": "fir", "height": 6, "cones": 50, "age": "old"}
    assert Forest.of(RawConfig("again", values)) == config
    assert pickle.loads(pickle.dumps(config)) == config
    for name in ("shapes_energy", "spins_margin"):
        shipped = load_config(name)
        assert pickle.loads(pickle.dumps(shipped)) == shipped


def test_a_row_may_be_added_at_run_time(monkeypatch):
    class Palm:
        class Config(Section):
            name: str = "palm"
            dates: int = 5

    monkeypatch.setitem(TREES, "palm", Palm)
    config = forest().replaced({"tree.name": "palm", "tree.dates": 8})
    assert config.tree == Palm.Config(dates=8)


def test_processes_are_changed_by_name():
    """A key of another process is refused by name."""
    config = load_config("quick").replaced({"process.name": "flow_matching", "process.steps": 50})
    assert (config.process.steps, config.process.prediction) == (50, "velocity")
    with pytest.raises(InputError, match=r"unknown config key 'process\.precision'"):
        config.replaced({"process.precision": 1e-4})
    back = config.replaced({"process.name": "diffusion", "process.prediction": "clean"})
    assert (back.process.steps, back.process.prediction) == (50, "clean")


def test_conditions_are_changed_by_name():
    config = load_config("quick")
    assert config.condition.model_dump() == {"name": "none"}
    changes = parse_assignments(["condition.name=properties", "condition.properties=[gap, mu]"])
    found = config.replaced(changes).condition
    assert (found.properties, found.dropout) == (("gap", "mu"), 0.1)
    with pytest.raises(InputError, match=r"condition\.properties: .*at least 1"):
        config.replaced(parse_assignments(["condition.name=properties", "condition.properties=[]"]))


def test_losses_are_changed_by_name():
    config = load_config("shapes_energy").replaced({"loss.name": "mse"})
    assert config.loss.model_dump() == {"name": "mse"}
    again = config.replaced({"loss.name": "energy", "loss.springs.family": "inverse"})
    assert again.loss.springs.family == "inverse"
    assert again.loss.edges.kind == "complete"
    spins = load_config("spins_local_field").replaced(
        {"loss.gauge": "fixed", "loss.name": "margin"}
    )
    assert spins.loss.model_dump() == {"name": "margin", "gauge": "fixed", "margin": 1.0}
