"""Labelled text from files: what is read, how splits are held out, and how bad rows are named."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data.cleaning import CleaningConfig
from data.errors import DataError
from data.sources import AG_NEWS_LABELS, DataConfig, LabelledText, Split, load_source, read_unlabelled


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def csv_file(tmp_path, rows=40, name="train.csv"):
    lines = [f"{'good' if i % 2 else 'bad'},text {i}" for i in range(rows)]
    return write(tmp_path / name, "\n".join(["label,text", *lines]) + "\n")


def load(source, **fields):
    return load_source(DataConfig(source=str(source), **fields), seed=0)


def test_csv_with_names_as_labels(tmp_path):
    text = load(csv_file(tmp_path), test_file=csv_file(tmp_path, 6, "test.csv"))
    assert text.label_names == ("bad", "good")
    assert (len(text.train.texts), len(text.validation.texts), len(text.test.texts)) == (36, 4, 6)
    assert text.test.texts[:2] == ["text 0", "text 1"] and text.test.labels[:2] == [0, 1]


def test_same_rows_in_every_format(tmp_path):
    rows = [{"label": i % 3, "title": f"title {i}", "body": f'body, "{i}"\nline'} for i in range(30)]
    quoted = [f'{r["label"]},{r["title"]},"{r["body"].replace(chr(34), chr(34) * 2)}"' for r in rows]
    csv = write(tmp_path / "a.csv", "\n".join(["label,title,body", *quoted]))
    tsv = write(tmp_path / "a.tsv", "\n".join(["label\ttitle\tbody", *(q.replace(",", "\t", 2) for q in quoted)]))
    jsonl = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    lines = write(tmp_path / "lines.json", "\n".join(map(json.dumps, rows)))
    array = write(tmp_path / "array.json", json.dumps(rows, indent=2))
    parquet, saved, packed = (str(tmp_path / name) for name in ("a.parquet", "saved", "a.csv.gz"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    datasets.Dataset.from_list(rows).save_to_disk(saved)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    semicolons = [q.replace(",", ";", 2) for q in quoted]
    excel = write(tmp_path / "excel.csv", "\ufeff" + "\r\n".join([" label ;title ; body", *semicolons]))
    unicode_text = tmp_path / "unicode.txt"
    unicode_text.write_bytes((tmp_path / "a.tsv").read_bytes().decode().replace("line", "lin\u00e9").encode("utf-16"))
    paths = (csv, tsv, jsonl, lines, array, parquet, saved, packed, excel)
    loaded = [load(path, text_columns=("title", "body")) for path in paths]
    accents = load(unicode_text, text_columns=("title", "body"))
    assert accents.train.texts == [text.replace("line", "lin\u00e9") for text in loaded[0].train.texts]
    unicode_text.write_bytes('text\tlabel\n"a, b"\tx\n'.encode("utf-16"))
    assert read_unlabelled(unicode_text)[1] == ["a, b"]  # Excel encloses what has a comma
    assert "separated by semicolons" in loaded[-1].notes[0] and "spans lines: 30, the first is 2" in loaded[0].notes[0]
    assert loaded[0].label_names == ("0", "1", "2")
    assert all('body, "' in text and text.startswith("title ") for text in loaded[0].train.texts)
    for other in loaded[1:]:
        assert (other.train, other.validation, other.test) == (loaded[0].train, loaded[0].validation, loaded[0].test)


def test_number_labels_are_ordered_as_numbers(tmp_path):
    lines = "\n".join(f"{i % 11},text {i}" for i in range(110))
    assert load(write(tmp_path / "a.csv", f"label,text\n{lines}")).label_names == tuple(map(str, range(11)))


def test_a_byte_order_mark_and_windows_line_ends_are_not_content(tmp_path):
    path = tmp_path / "a.csv"
    rows = "".join(f"{i % 2},text {i}\r\n" for i in range(30))
    path.write_bytes(b"\xef\xbb\xbf" + f"label,text\r\n{rows}".encode())
    text = load(path)
    assert sorted(text.label_names) == ["0", "1"] and all(not t.endswith("\r") for t in text.train.texts)


@pytest.mark.parametrize("header", ["", "Class Index,Title,Description\n"], ids=["original", "Kaggle"])
def test_ag_news_folder(tmp_path, header):
    rows = header + "".join(f'"{i % 4 + 1}","Title {i}","Said ""{i}"" \\$5"\n' for i in range(40))
    write(tmp_path / "train.csv", rows), write(tmp_path / "test.csv", rows)
    text = load("ag_news", directory=str(tmp_path))
    assert text.label_names == AG_NEWS_LABELS
    assert text.test.texts[2] == 'Title 2 Said "2" \\$5' and text.test.labels[:5] == [0, 1, 2, 3, 0]


def test_real_ag_news_rows(shared):
    text = load("ag_news", directory=str(shared / "ag_news_csv"))
    assert len(text.train.texts) + len(text.validation.texts) == 9956 and len(text.test.texts) == 1000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('"1","a","b"\n"1","a"\n', r"train\.csv, row 2: 2 fields, not 3"),
        ('"1","a","b"\n"5","a","b"\n', r"train\.csv, row 2: class '5' is not 1, 2, 3 or 4"),
        ('"1","a","b"\n"2"," "," "\n', r"train\.csv, row 2: the text is empty"),
        ('"1","a","b"\n"2","a,"b"\n', r"train\.csv, row 2: .* fix the row's quotes"),
        ("", r"train\.csv: no rows"),
    ],
)
def test_bad_ag_news_rows_are_named(tmp_path, content, says):
    write(tmp_path / "train.csv", content), write(tmp_path / "test.csv", '"1","a","b"\n')
    with pytest.raises(DataError, match=says):
        load("ag_news", directory=str(tmp_path))


GOOD = "label,text\n" + "".join(f"{i % 2},text {i}\n" for i in range(20))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "klass,text\n1,x\n", r"a\.csv, header: no column 'label'; there are klass, text"),
        ("a.csv", GOOD + "1,too,many\n", r"a\.csv, row 22: 3 fields, but the header has 2"),
        ("a.csv", GOOD + "1\n", r"a\.csv, row 22: 1 fields"),
        ("a.csv", GOOD + "1,  \n", r"a\.csv, row 22: the text is empty"),
        ("a.csv", GOOD + ",text\n", r"a\.csv, row 22: the label is empty"),
        ("a.csv", GOOD + "label,text\n", r"a\.csv, row 22: is the header again"),
        ("a.csv", GOOD + '1, "text"\n', r"a\.csv, row 22: a blank before a quote"),
        ("a.csv", GOOD + "['a'],text\n", r"a\.csv, row 22: 'label' is \['a'\], a list written as text"),
        ("a.csv", GOOD + "[1 0],text\n", r"a\.csv, row 22: 'label' is \[1 0\], a list written as text"),
        ("a.jsonl", '{"label": 1, "label": 2, "text": "x"}\n', r"a\.jsonl, row 1: .*'label' has two values"),
        ("a.csv", "label,text\n", r"a\.csv: no rows"),
        ("a.csv", "", r"a\.csv, header: no column"),
        ("a.csv", "label,text,text\n1,a,b\n", r"a\.csv, header: 2 columns 'text'"),
        ("a.jsonl", '{"label": 1, "text": ["x"]}\n', r"a\.jsonl, row 1: 'text' is not text, but a list"),
        ("a.jsonl", '{"label": {"a": 1}, "text": "x"}\n', r"a\.jsonl, row 1: 'label' is {'a': 1}, neither a name nor"),
        ("a.jsonl", '{"label": 1.5, "text": "x"}\n', r"a\.jsonl, row 1: 'label' is 1.5, neither a name nor"),
        ("a.csv", GOOD + "0.37,x\n", r"a\.csv, row 22: 'label' is 0.37, neither a name nor"),
        ("a.csv", "a^b\n1^x\n", r"a\.csv, header: no column 'text'; there are a\^b"),
        ("a.csv", "klass;title\n1;x\n", r"a\.csv, header: no column 'text'; there are klass, title"),
        ("a.tsv", GOOD.replace(",", "\t") + '1\t"a\n0\t"b\tc"\n', r"a\.tsv, row 23: 3 fields"),
        ("a.json", '[{"label": 1, "text": "x"},\n', r"a\.json: not JSON"),
        ("a.json", '[{"label": 1, "text": "x"}, 1]', r"a\.json, row 2: not a JSON object"),
        (
            "a.jsonl",
            '{"label": "\\ud800", "text": "x"}\n',
            r"row 1: the label has a lone surrogate, '\\ud800'",
        ),
        (
            "a.jsonl",
            '{"label": 1, "text": "x \\udfff"}\n',
            r"row 1: the text has a lone surrogate, '\\udfff'",
        ),
        ("a.jsonl", '{"\\ud800": 1, "text": "x"}\n', r"no column 'label'; there are \\ud800, text"),
        ("a.csv", "label,text\n" + "".join(f"id{i},x\n" for i in range(40)), r"a\.csv.*40 classes; is .* an ID\?"),
        ("a.csv.gz", GOOD + "1\n", r"a\.csv\.gz, row 22: 1 fields"),
        ("a.xlsx", GOOD, r"choose ag_news, .*\.csv, \.tsv, .* \(each also as \.gz\), \.parquet, or a folder"),
        ("a.jsonl", '{"label": NaN, "text": "x"}\n', r"a\.jsonl, row 1: the label is empty"),
        ("a.jsonl", '{"label": 1, "text": NaN}\n', r"a\.jsonl, row 1: the text is empty"),
        ("a.jsonl", '{"label": ' + "1" * 5000 + ', "text": "x"}\n', r"a\.jsonl, row 1: not JSON"),
        ("a.csv", "label,text\n" + "1,x\n" * 20, "the labels of all rows are 1;"),
        ("a.csv", 'label,text\n1,"open\n', r"a\.csv, row 2: .* fix the row's quotes"),
        ("a.jsonl", '{"label": 1, "text": "x"}\n{broken\n', r"a\.jsonl, row 2: not JSON"),
        ("a.jsonl", '{"label": 1, "text": "x"}\n[1]\n', r"a\.jsonl, row 2: not a JSON object"),
        ("a.jsonl", '{"label": 1, "text": "x"}\n{"label": 1}\n', r"a\.jsonl, row 2: no column 'text'"),
        (
            "a.jsonl",
            '{"label": 1, "text": "x"}\n{"label": null, "text": "y"}\n',
            r"a\.jsonl, row 2: the label is empty",
        ),
        ("a.jsonl", '{"label": 1, "text": "x"}\n{"label": 1, "text": null}\n', r"a\.jsonl, row 2: the text is empty"),
        ("a.parquet", "not parquet", r"a\.parquet: not a Parquet file"),
    ],
)
def test_bad_files_are_one_line_naming_the_row(tmp_path, name, content, says):
    with pytest.raises(DataError, match=says) as error:
        load(write(tmp_path / name, content))
    str(error.value).encode()  # can be printed
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf8_names_row_and_byte_and_is_read_by_the_setting(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"label,text\n1,fine\n0,caf\xe9\n" + b"1,x\n0,y\n" * 10)
    with pytest.raises(DataError, match=r"a\.csv, row 3: not UTF-8 \(byte 23\); .* data\.encoding .*\"cp1252\""):
        load(path)
    text = load(path, encoding="cp1252")
    assert "caf\u00e9" in text.train.texts + text.validation.texts + text.test.texts
    assert read_unlabelled(path, encoding="cp1252")[1][1] == "caf\u00e9"
    path.write_text("label,text\n1,fine\n0,caf\u00e9\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv: is UTF-8, not cp1252; remove the encoding"):
        load(path, encoding="cp1252")
    path.write_bytes(b"label,text\n1,fine\n0,\x81\n")
    for encoding, says in (("cp1252", r"row 3: not CP1252 \(byte 20\)"), ("cp12", "knows no encoding 'cp12'")):
        with pytest.raises(DataError, match=says):
            load(path, encoding=encoding)
    path.write_bytes("label,text\n".encode("utf-16") + b"\x00\xd8\n\0")
    with pytest.raises(DataError, match="not UTF-16; save"):
        load(path)


def test_a_byte_order_mark_is_counted_where_a_byte_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbflabel,text\n1,fine\n0,caf\xe9\n")
    with pytest.raises(DataError, match=r"a\.csv, row 3: not UTF-8 \(byte 26\)"):
        load(path)


def test_integers_are_the_same_class_however_they_are_stored(tmp_path):
    rows = "".join(f'{{"label": {label}, "text": "text {i}"}}\n' for i, label in enumerate([1, 1.0, '"1"', 2] * 5))
    text = load(write(tmp_path / "a.jsonl", rows))
    assert text.label_names == ("1", "2") and text.train.labels.count(0) > text.train.labels.count(1)


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        (["1", "01", "+1", "001"], ["+1"], ("+1", "001", "01", "1")),  # not in the order of a set
        (["1.0", "2.0"], ["1", "2"], ("1", "2")),
        ([f"{i}.0" for i in range(12)], ["11"], tuple(map(str, range(12)))),
        (["nan", "b"], ["nan"], ("b", "nan")),
    ],
)
def test_numbers_are_compared_and_ordered_by_value(tmp_path, train, test, names):
    train = "".join(f"{label},{label} {i}\n" for i in range(20) for label in train)
    test = "".join(f"{label},{label}\n" for label in test)
    paths = [write(tmp_path / f"{i}.csv", "label,text\n" + rows) for i, rows in enumerate((train, test))]
    text = load(paths[0], test_file=paths[1])
    assert text.label_names == names


@pytest.mark.parametrize("gap", ['"id": null', '"id": ""', '"id": NaN', '"other": 1'])
def test_an_id_that_is_missing_is_named(tmp_path, gap):
    path = tmp_path / "a.jsonl"
    write(path, '{"id": 7, "text": "one"}\n{"text": "two", ' + gap + "}\n")
    with pytest.raises(DataError, match=r"a.jsonl, row 2: the ID in 'id' is empty; fill it in"):
        read_unlabelled(path)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"id": 7, "text": "two"}\n')
    assert read_unlabelled(tmp_path / "b.jsonl") == (["0", "1"], ["one", "two"], [])


@pytest.mark.parametrize(
    ("source", "field"),
    [
        ("ag_news", {"test_file": "t.csv"}),
        ("reuters-r8", {"directory": "news"}),
        ("20newsgroups", {"label_column": "klass"}),
        ("reuters-r8", {"encoding": "cp1252"}),
        ("a.csv", {"directory": "news"}),
        ("a.parquet", {"encoding": "cp1252"}),
    ],
)
def test_a_setting_that_the_source_would_ignore_is_refused(source, field):
    (name,) = field
    with pytest.raises(DataError, match=f"data.{name} has no effect for the source '{source}'; remove it"):
        load(source, **field)


def test_a_label_that_only_the_test_split_has_is_named(tmp_path):
    test = write(tmp_path / "test.csv", "label,text\nbad,a\nugly,b\n")
    with pytest.raises(DataError, match=r"test\.csv, row 3: unknown label 'ugly'; there are bad, good"):
        load(csv_file(tmp_path), test_file=test)


@pytest.mark.parametrize("missing", ["none.csv", "none.jsonl", "none.parquet"])
def test_a_missing_file_is_named(tmp_path, missing):
    with pytest.raises(DataError, match=rf"{missing}: no such file"):
        load(tmp_path / missing)


def test_validation_is_stratified_seeded_and_complete(tmp_path):
    lines = "\n".join(f"{'rare' if i % 10 == 0 else 'common'},text {i}" for i in range(400))
    path = write(tmp_path / "a.csv", f"label,text\n{lines}\n")
    test = write(tmp_path / "t.csv", "label,text\nrare,x\ncommon,y\n")
    config = DataConfig(source=path, test_file=test, validation_fraction=0.2)
    one, again, other = (load_source(config, seed) for seed in (1, 1, 2))
    assert one == again and one.validation != other.validation
    assert len(one.validation.texts) == 80 and one.validation.labels.count(one.label_names.index("rare")) == 8
    assert sorted(one.train.texts + one.validation.texts) == sorted(f"text {i}" for i in range(400))


def test_a_class_with_a_single_row_stays_in_training(tmp_path):
    lines = "\n".join(f"{'ab'[i % 2]},text {i}" for i in range(60))
    path = write(tmp_path / "a.csv", f"label,text\n{lines}\nonly,once\n")
    for seed in range(5):
        text = load_source(DataConfig(source=path), seed)
        assert "once" in text.train.texts


def test_without_a_test_file_a_tenth_is_held_out_and_said_so(tmp_path):
    text = load(csv_file(tmp_path, 100))
    assert (len(text.train.texts), len(text.validation.texts), len(text.test.texts)) == (81, 9, 10)
    assert "held out" in text.origin


@pytest.mark.parametrize(
    ("rows", "texts", "says"),
    [
        (['x "a', 'b" y'], ['x "a', 'b" y'], None),  # characters
        (['"a', 'b"'], ['"a', 'b"'], None),  # not a field of two lines
        (['"a"', "b"], ['"a"', "b"], None),
        (['"said ""no"" again"', "b"], ['said "no" again', "b"], "as in CSV"),  # by a CSV writer
        (['"a\nb"', "c"], ["a\nb", "c"], "spans lines: 1, the first is 22"),
        (['"a\tb"', "c"], ["a\tb", "c"], "as in CSV"),
    ],
)
def test_quotes_in_tsv_are_characters_unless_only_quoted_fields_fit(tmp_path, rows, texts, says):
    path = write(tmp_path / "a.tsv", GOOD.replace(",", "\t") + "".join(f"1\t{row}\n" for row in rows))
    _, read, notes = read_unlabelled(tmp_path / "a.tsv")
    assert len(read) == 22 and read[20:] == texts
    assert (says or "") in " ".join(notes) and bool(notes) == bool(says)
    assert load(path).notes == tuple(notes)


CLASSES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["world", "art"])})


def class_label_data(rows, start=0):
    columns = {"text": [f"text {i}" for i in range(start, start + rows)], "label": [i % 2 for i in range(rows)]}
    return datasets.Dataset.from_dict(columns, features=CLASSES)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_names_of_classes_that_datasets_stored_are_used(tmp_path, kind):
    data = class_label_data(40)
    data.to_parquet(tmp_path / "a.parquet") if kind == "parquet" else data.save_to_disk(tmp_path / "a.saved")
    test = write(tmp_path / "t.csv", "label,text\nart,x\nworld,y\n")  # by name, in another format
    text = load(tmp_path / f"a.{kind}", test_file=test)
    assert text.label_names == ("world", "art") and text.test.labels == [1, 0]  # not sorted by name
    unlabelled = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=CLASSES)
    unlabelled.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet, row 1: 'label' is -1, not the number of a class, 0 to 1"):
        load(tmp_path / f"a.{kind}", test_file=str(tmp_path / "b.parquet"))


def test_the_splits_of_a_saved_dataset_dict(tmp_path):
    splits = {"train": (30, 0), "test": (4, 100), "unsupervised": (20, 200)}
    folder = tmp_path / "saved"
    datasets.DatasetDict({name: class_label_data(*at) for name, at in splits.items()}).save_to_disk(folder)
    text = load(folder)
    assert text.test.texts == [f"text {100 + i}" for i in range(4)] and len(text.train.texts) == 27
    assert text.notes == (f"{folder}: the split 'unsupervised' is not used",)
    assert load(folder / "unsupervised", test_file=str(folder / "test")).test == text.test
    for source, field, says in (
        (folder, {"test_file": "t.csv"}, "data.test_file has no effect: .* has a split 'test'"),
        (folder, {"label_column": "topic"}, "no column 'topic'; there are text, label"),
        (folder / "train", {"test_file": str(folder)}, r"splits train, test, unsupervised; name .*/train"),
        (tmp_path, {}, "not a folder that `datasets` saved"),
    ):
        with pytest.raises(DataError, match=says) as error:
            load(source, **field)
        assert "\n" not in str(error.value)


def test_texts_in_several_splits_are_counted(tmp_path):
    path = csv_file(tmp_path)
    assert load(path, test_file=path).notes == ("40 of the 40 test texts are also training or validation texts",)
    other = write(tmp_path / "v.csv", "label,text\ngood,text 1\nbad,new\n")
    text = load(path, validation_file=other, test_file=csv_file(tmp_path, 2, "t.csv"))
    assert text.notes[0] == "1 of the 2 validation texts are also training texts"
    assert text.cleaned(CleaningConfig()).notes == text.notes


def test_training_texts_per_class_are_listed_largest_first(tmp_path):
    assert load(csv_file(tmp_path)).class_counts() == "bad: 16, good: 16"
    rows = "".join(f"c{i},{i} {j}\n" for i in range(20) for j in range(2 * i + 3))
    many = load(write(tmp_path / "a.csv", f"label,text\n{rows}")).class_counts()
    assert many.startswith("c19: 3") and ", 11 more, c0: " in many


def test_one_row_per_class_suffices_where_nothing_is_held_out(tmp_path):
    path = write(tmp_path / "a.csv", "label,text\na,x\nb,y\n")
    other = write(tmp_path / "t.csv", "label,text\na,z\n")
    assert load(path, validation_file=other, test_file=other).train.labels == [0, 1]


def test_too_few_rows_to_hold_any_out(tmp_path):
    with pytest.raises(DataError, match="too few"):
        load(write(tmp_path / "a.csv", "label,text\n0,a\n1,b\n"))


@pytest.mark.real_cache
@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [("reuters-r8", 5485, 2189, 8), ("reuters-r52", 6532, 2568, 52), ("20newsgroups", 11293, 7528, 20)],
)
def test_named_sets_have_their_published_sizes(name, train, test, classes):
    try:
        text = load(name)
    except DataError as error:
        pytest.skip(f"not cached and can't be fetched: {error}")
    assert len(text.train.texts) + len(text.validation.texts) == train
    assert len(text.test.texts) == test and len(text.label_names) == classes


def test_classes_in_another_order():
    """Labels move with their names: class numbers, and one 0 or 1 per class."""
    for labels, expected in (([0, 2, 1], [1, 0, 2]), ([(1, 0, 0), (0, 1, 1)], [(0, 1, 0), (1, 0, 1)])):
        split = Split(["x", "y", "z"][: len(labels)], labels)
        text = LabelledText(split, split, split, ("a", "b", "c"), "here").relabelled(("c", "a", "b"))
        assert (text.label_names, text.train.labels, text.test.labels) == (("c", "a", "b"), expected, expected)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"max_length": 2}, "max_length"),
        ({"text_columns": ()}, "text_columns"),
    ],
)
def test_settings_out_of_range(fields, says):
    with pytest.raises(DataError, match=says):
        DataConfig(**fields)


def test_several_labels_per_text_in_every_format(tmp_path):
    wanted = {f"text {i}": (i % 2, i // 2 % 2) for i in range(40)}  # whether it has a, b
    lists = [
        {"text": text, "label": [n for n, on in zip("ab", row, strict=True) if on]} for text, row in wanted.items()
    ]
    flags = [{"text": text, "a": bool(row[0]), "b": float(row[1])} for text, row in wanted.items()]
    numbers = [{"text": row["text"], "label": ["ab".index(name) for name in row["label"]]} for row in lists]
    named = datasets.Features(text=datasets.Value("string"), label=datasets.List(datasets.ClassLabel(names=["a", "b"])))
    datasets.Dataset.from_list(numbers, named).save_to_disk(tmp_path / "saved")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lists), tmp_path / "a.parquet")
    loaded = [
        load(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lists)))),
        load(tmp_path / "a.parquet"),
        load(tmp_path / "saved"),
        load(write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, flags))), label_columns=("a", "b")),
        load(
            write(tmp_path / "a.csv", "text,a,b\n" + "\n".join(f"{t},{a},{b}" for t, (a, b) in wanted.items())),
            label_columns=("a", "b"),
        ),
    ]
    for text in loaded:
        parts = (text.train, text.validation, text.test)
        found = [pair for part in parts for pair in zip(part.texts, part.labels, strict=True)]
        assert text.multi_label and text.label_names == ("a", "b") and len(found) == 40 and dict(found) == wanted
        assert (text.validation, text.test) == (loaded[0].validation, loaded[0].test)
    train = loaded[0].train
    swapped = loaded[0].relabelled(("b", "a"))
    assert swapped.train.labels == [row[::-1] for row in train.labels] and train.labels != swapped.train.labels
    a, b = map(sum, zip(*train.labels, strict=True))
    assert loaded[0].class_counts() in (f"a: {a}, b: {b}", f"b: {b}, a: {a}")


def test_names_that_look_alike_are_shown(tmp_path):
    names = ["cafe\u0301", "[bar]", "caf\xe9", "[Bar ]"] * 10
    csv = write(tmp_path / "a.csv", "label,text\n" + "".join(f"{name},text {i}\n" for i, name in enumerate(names)))
    notes = load(csv).notes
    assert {*notes} >= {
        rf"two classes that look alike: {pair}" for pair in ("'[Bar ]' and '[bar]'", r"'cafe\u0301' and 'caf\xe9'")
    }
    test = write(tmp_path / "b.csv", "label,text\n\u200b[bar],x\n")
    with pytest.raises(DataError, match=r"unknown label '\\u200b\[bar\]'; .*; '\[bar\]' looks like it"):
        load(csv, test_file=test)


def test_rows_with_unique_combinations_of_labels_can_be_held_out(tmp_path):
    rows = [{"text": f"{i}", "label": [c for bit, c in enumerate("abcde") if i >> bit & 1]} for i in range(32)]
    text = load(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert (len(text.train.texts), len(text.validation.texts), len(text.test.texts)) == (26, 3, 3)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"label": ["a", "b"]}, {"label": "a"}], r"row 2: of this label and that of .*row 1 only one is a list"),
        ([{"label": ["a", "b"]}, {"label": ["a", None]}], r"row 2: the label is empty"),
        ([{"label": ["a", "b"]}, {"label": [0.5]}], r"row 2: 'label' is 0.5, neither a name nor an integer"),
        ([{"label": [1, 0, 0]}], r"row 1: 'label' lists a label twice: 1, 0, 0; .* 0 and 1 by label_columns"),
        ([{"label": [1.0, 0.0]}, {"label": [0.0, 1.0]}], r"all texts have the same labels, 1, 0; .* label_columns"),
        ([{"label": ["a"]}, {"label": []}], r"the labels of all rows are a; classification needs two or more"),
        ([{"a": 1, "b": 0}, {"a": 1, "b": 2}], r"row 2: 'b' is 2, not 0 or 1"),
        ([{"a": 1, "b": 0}, {"a": None, "b": 0}], r"row 2: 'a' is None, not 0 or 1"),
    ],
)
def test_labels_that_are_not_lists_or_zeros_and_ones_are_named(tmp_path, rows, says):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": "x", **row}) for row in rows))
    with pytest.raises(DataError, match=says):
        load(path, label_columns=("a", "b") if "a" in rows[0] else ())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"label_columns": ("a", "b"), "label_column": "c"}, "exclude each other"),
        ({"label_columns": ("a",)}, "name two or more columns"),
        ({"label_columns": ("a", "a")}, "each once"),
    ],
)
def test_unusable_columns_of_labels_are_refused(fields, says):
    with pytest.raises(DataError, match=says):
        DataConfig(**fields)
