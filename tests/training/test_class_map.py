"""Classes of another source, mapped to an adapter's by name."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.sources import AG_NEWS_LABELS, DataConfig, LabelledText, Split
from training.class_map import load_other, map_texts, read_map
from training.errors import ConfigError

MAPS = Path(__file__).resolve().parents[2] / "data" / "maps"


def labelled(names, labels):
    split = Split([f"text {i}" for i in range(len(labels))], labels)
    return LabelledText(split, split, split, names, "there")


@pytest.fixture
def write(tmp_path):
    def write(content):
        (tmp_path / "map.toml").write_text(content)
        return tmp_path / "map.toml"

    return write


def test_equal_names_are_mapped_and_the_rest_is_left_out(capsys):
    mapped = map_texts(labelled(("a", "c", "b"), [0, 1, 2, 2, 1, 0, 1]), ("b", "x", " a "), None)
    assert mapped.split == Split(["text 0", "text 2", "text 3", "text 5"], [2, 0, 0, 2])
    assert mapped.groups == {"b": [0], "x": [1], "a": [2]}
    out = capsys.readouterr().out
    assert "there, 7 test texts" in out and "a, b: as in the adapter" in out
    assert "left out    3 texts of classes that are not mapped: c 3" in out


def test_several_classes_of_the_source_are_one_of_the_adapter(write, capsys):
    path = write('"s.golf" = "Sports"\n"s.polo" = "Sports"\n')
    mapped = map_texts(labelled(("s.golf", "s.polo"), [0, 1, 0]), ("World", "Sports"), path)
    assert mapped.split.labels == [1, 1, 1] and mapped.groups == {"World": [0], "Sports": [1]}
    out = capsys.readouterr().out
    assert "s.golf, s.polo -> Sports" in out and "left out" not in out


def test_any_of_several_classes_of_the_adapter_is_right(write):
    path = write('Sports = ["s.polo", "s.golf"]\nRetail = "shop"\n')
    mapped = map_texts(labelled(("Retail", "Sports"), [1, 1, 1, 0]), ("s.golf", "shop", "s.polo", "rest"), path)
    assert mapped.groups == {"Sports": [0, 2], "shop": [1], "rest": [3]} and mapped.split.labels == [0, 0, 0, 1]
    logits = torch.tensor([[3.0, 1, 2, 0], [0, 1, 2, 0], [1, 0, 1, 1.5], [0, 0, 9, 8]])
    # The highest logit decides: not the sum of the group, which is highest in the third row.
    assert mapped.group_logits(logits).argmax(dim=1).tolist() == [0, 0, 2, 0]


def test_a_class_of_both_sides_is_not_two_groups_of_one_name(write):
    with pytest.raises(ConfigError, match="'a' is a class of both sides; map it to that of the adapter, too"):
        map_texts(labelled(("a", "b"), [0, 1]), ("x", "z", "a"), write('a = ["x", "z"]'))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "map.toml: is empty; write lines"),
        ('a = "y"', "'y' is not a class of the adapter, which has x, z"),
        ('a = ["x", "y"]', "'y' is not a class of the adapter"),
        ('d = "x"', "'d' is not a class of the source, which has a, b"),
        ('a.b = "x"', "'a' has no class or list of classes; write both sides in quotes"),
        ("a = []", "'a' has no class or list of classes"),
        ("a = 1", "'a' has no class or list of classes"),
        ("a = x", "map.toml: not valid TOML"),
        ('a = "x"\na = "z"', "map.toml: not valid TOML"),
        ('a = "x"\nb = ["x", "z"]', "'b' and 'a' share classes; give both the same"),
        ('a = ["x", "z"]', "map.toml: every class of the adapter counts as right; map to some of them"),
    ],
)
def test_unusable_maps_are_one_line(write, content, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        map_texts(labelled(("a", "b"), [0, 1]), ("x", "z"), write(content))
    assert "\n" not in str(error.value)


def test_what_can_not_be_mapped_is_one_line(tmp_path, write):
    for text, path, says in [
        (labelled(("a", "b"), [0, 1]), tmp_path / "none.toml", "none.toml: no such file"),
        (labelled(("a", "b"), [0, 1]), tmp_path, "can't be read"),
        (labelled(("a", "b"), [0, 1]), None, "there has a, b; the adapter has x, z: no name is equal; map them by"),
        (labelled(("a", "b"), [(0, 1), (1, 0)]), None, "has any number of labels per text"),
        (labelled(("a", "b"), [0, 0]), write('b = "x"'), "no test text has a class that is mapped"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(says)):
            map_texts(text, ("x", "z"), path)


def test_all_rows_of_a_file_are_test_texts_and_the_settings_of_a_toml_file_count(tiny_data, tmp_path):
    file = tiny_data / "test.csv"
    assert len(load_other(str(file), DataConfig()).test.texts) == 40
    (tmp_path / "other.toml").write_text(f'[data]\nsource = "{file}"\ntext_columns = ["label"]\n')
    texts = load_other(str(tmp_path / "other.toml"), DataConfig(max_length=17)).test.texts
    assert len(texts) == 40 and np.unique(texts).tolist() == ["business", "sports"]
    (tmp_path / "other.toml").write_text(f'[data]\nsource = "{tiny_data / "train.csv"}"\ntest_file = "{file}"\n')
    assert len(load_other(str(tmp_path / "other.toml"), DataConfig()).test.texts) == 40
    # Refused also where it names the default.
    (tmp_path / "other.toml").write_text(f'[data]\nsource = "{file}"\nmax_length = {DataConfig.max_length}\n')
    load_other(str(tmp_path / "other.toml"), DataConfig())
    with pytest.raises(ConfigError, match=r"other.toml: data.max_length has no effect with --on"):
        load_other(str(tmp_path / "other.toml"), DataConfig(max_length=17))
    (tmp_path / "other.toml").write_text(f'[data]\nsource = "{file}"\nwindows = 2\nwindow_overlap = 9\n')
    load_other(str(tmp_path / "other.toml"), DataConfig(windows=2, window_overlap=9))
    for applied, name in ((DataConfig(), "windows"), (DataConfig(windows=2), "window_overlap")):
        with pytest.raises(ConfigError, match=f"other.toml: data.{name} has no effect with --on"):
            load_other(str(tmp_path / "other.toml"), applied)
    with pytest.raises(DataError, match="choose ag_news"):
        load_other("no-such-source", DataConfig())


@pytest.mark.real_cache
def test_the_maps_here_have_names_of_both_sides_and_mention_every_class():
    try:
        groups = load_other("20newsgroups", DataConfig()).label_names
    except DataError as error:
        pytest.skip(f"not cached and can't be fetched: {error}")
    there, back = (MAPS / f"{name}.toml" for name in ("20newsgroups_to_ag_news", "ag_news_to_20newsgroups"))
    assert set(re.findall(r"[a-z]+(?:\.[a-z-]+)+", there.read_text())) >= {*groups}
    mapped = read_map(there, groups, AG_NEWS_LABELS)
    assert read_map(back, AG_NEWS_LABELS, groups) == {
        name: tuple(group for group in groups if mapped.get(group) == (name,))
        for name in ("Sports", "Sci/Tech", "World")
    }
