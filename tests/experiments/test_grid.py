"""From TOML files to runs: grids, overrides, names and errors."""

import pytest

from experiments.grid import expand, parse_override, plan
from training.errors import ConfigError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_without_lists_is_one_configuration(tmp_path):
    path = write(tmp_path / "one.toml", "[lora]\nrank = 4\ntarget_modules = ['query', 'value']\n")
    (name,) = configs = expand(path, {})
    assert name == "one" and configs[name].lora.rank == 4
    assert configs[name].lora.target_modules == ("query", "value")


def test_lists_give_all_combinations(tmp_path):
    path = write(
        tmp_path / "grid.toml",
        "[model]\ncheckpoint = ['minilm', 'a/b']\n"
        "[lora]\nrank = [4, 8]\ntarget_modules = [['query'], ['key', 'value']]\n"
        "[data.cleaning]\nlemmatize = [false, true]\n",
    )
    configs = expand(path, {})
    assert len(configs) == 16
    chosen = {
        (c.model.checkpoint, c.lora.rank, c.lora.target_modules, c.data.cleaning.lemmatize) for c in configs.values()
    }
    assert len(chosen) == 16
    assert "grid+checkpoint=a-b+rank=8+target_modules=key-value+lemmatize=yes" in configs


def test_no_file_at_all_is_an_error():
    with pytest.raises(ConfigError, match="name at least one TOML file or folder"):
        plan([], {}, seeds=1)


def test_overrides_reach_every_file_and_can_be_grids(tmp_path):
    write(tmp_path / "a.toml", "[lora]\nrank = 4\n")
    write(tmp_path / "b.toml", "[train]\nepochs = 7\n")
    runs = plan([tmp_path], {"train.epochs": 2, "lora.alpha": [8, 16]}, seeds=2)
    assert [run.folder for run in runs] == [
        f"{name}+alpha={alpha}-s{seed}" for name in "ab" for alpha in (8, 16) for seed in (0, 1)
    ]
    assert {run.config.train.epochs for run in runs} == {2}


def test_seeds_are_consecutive_from_the_configurations_own(tmp_path):
    path = write(tmp_path / "a.toml", "[train]\nseed = 100\n")
    assert [run.config.train.seed for run in plan([path], {}, seeds=3)] == [100, 101, 102]


def test_files_in_subfolders_are_left_out(tmp_path):
    write(tmp_path / "a.toml", "")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "b.toml", "")
    assert [run.name for run in plan([tmp_path], {}, 1)] == ["a"]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("train.epochs=2", ("train.epochs", 2)),
        ("lora.rank=[4, 8]", ("lora.rank", [4, 8])),
        ("data.directory=../news", ("data.directory", "../news")),
        ("data.cleaning.html=true", ("data.cleaning.html", True)),
        ("output=a=b", ("output", "a=b")),
    ],
)
def test_overrides_are_toml_or_text(text, pair):
    assert parse_override(text) == pair


@pytest.mark.parametrize("text", ["train.epochs", "=2", ""])
def test_an_override_without_field_or_value(text):
    with pytest.raises(ConfigError, match="field=value"):
        parse_override(text)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[lora]\nrank = []\n", r"lora\.rank is an empty list"),
        ("[lora]\ntarget_modules = [[]]\n", "target_modules is empty"),
        ("[lora]\nrank = [4, 8, 4]\n", r"lora\.rank has the value 4 twice"),
        ("output = ['a', 'b']\n", "output can't be a grid"),
        ("[data]\nsource = ['a/b', 'a-b']\n", r"two values give the name bad\+source=a-b"),
        ("[lora]\nrank = [4, 0]\n", "rank is 0"),
        ("[lora]\nrank = [4, 'x']\n", r"lora\.rank: .*not 'x'"),
        ("[lora]\nranks = [4, 8]\n", r"unknown field lora\.ranks"),
        ("[train]\nseed = [0, 1]\n", "seed is a grid and --seeds is 2"),
        (
            "[lora]\ntarget_modules = '.*query'\nlayers_to_transform = [[0], [1]]\n",
            "layers_to_transform can't be combined with",
        ),
        ("lora = 3\n", "lora"),
        ("rank = = 3\n", "not valid TOML"),
    ],
)
def test_errors_in_a_grid_are_one_line(tmp_path, content, says):
    path = write(tmp_path / "bad.toml", content)
    with pytest.raises(ConfigError, match=says) as error:
        plan([path], {}, seeds=2)
    assert "bad.toml" in str(error.value) and "\n" not in str(error.value)


def test_an_override_inside_a_value_is_refused(tmp_path):
    path = write(tmp_path / "a.toml", "output = 'x'\n")
    with pytest.raises(ConfigError, match="output is a value"):
        expand(path, {"output.name": 3})


def test_two_files_of_one_name_and_an_empty_folder(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "a" / "x.toml", ""), write(tmp_path / "b" / "x.toml", "")
    with pytest.raises(ConfigError, match="a second configuration named x"):
        plan([tmp_path / "a", tmp_path / "b"], {}, 1)
    with pytest.raises(ConfigError, match=r"c: contains no \*\.toml"):
        plan([tmp_path / "c"], {}, 1)
    with pytest.raises(ConfigError, match="no such file"):
        plan([tmp_path / "none.toml"], {}, 1)
