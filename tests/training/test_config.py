"""Settings from TOML and the command line; an invalid one is a one-line error that names the field."""

import pytest

from lora.config import METHODS
from training.command_line import option_names
from training.config import RunConfig, parse_command_line, read_config, write_config
from training.errors import ConfigError


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_file_sets_fields_and_leaves_the_rest(toml):
    config = read_config(toml('[lora]\nrank = 6\nalpha = 14\ntarget_modules = ["query", "value"]\n'))
    assert config.lora.rank == 6
    assert config.lora.alpha == 14.0
    assert config.lora.target_modules == ("query", "value")
    assert config.train == RunConfig().train


def test_command_line_overrides_the_file(toml):
    path = toml("[lora]\nrank = 6\n[train]\nepochs = 2\n")
    config = parse_command_line([str(path), "--lora.rank", "8", "--lora.target-modules", "query", "output.dense"])
    assert (config.lora.rank, config.train.epochs) == (8, 2)
    assert config.lora.target_modules == ("query", "output.dense")


def test_written_settings_are_equal_when_read_again(toml, tmp_path):
    config = read_config(
        toml(
            'output = "runs/x"\n[model]\nhidden_dropout = 0\n[lora]\nlayers_to_transform = [1, 2]\n'
            "rank_pattern = { '0.*query' = 3 }\n[train]\nmax_trainable = 10\nseed = 3\n"
        )
    )
    write_config(config, tmp_path / "again.toml")
    assert read_config(tmp_path / "again.toml") == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[lora]\nrnak = 6", "unknown field lora.rnak"),
        ("[lroa]\nrank = 6", "unknown field lroa"),
        ('[lora]\nrank = "6"', "lora.rank"),
        ("[lora]\nrank = 6.5", "lora.rank"),
        ("[train]\nepochs = true", "train.epochs"),
        ("[lora]\nrank = 0", "rank is 0"),
        ("[lora]\nalpha = 0", "alpha is 0"),
        ("[lora]\ndropout = 1.0", "dropout is 1.0"),
        ("[lora]\ndropout = -0.1", "dropout is -0.1"),
        ('[lora]\nbias = "some"', "lora.bias"),
        ("[lora]\ntarget_modules = []", "target_modules is empty"),
        ("[model]\nhidden_dropout = 1.5", "hidden_dropout is 1.5"),
        ("[train]\nlearning_rate = 0", "learning_rate is 0"),
        ("[train]\nlearning_rate = nan", "train.learning_rate"),
        ("[train]\nbatch_size = -1", "batch_size is -1"),
        ("[train]\nwarmup_fraction = 2", "warmup_fraction is 2"),
        ("[train]\nr_drop = -1", "train.r_drop is -1.0; it must be 0 or more"),
        ("[train]\ntmix = -0.1", "train.tmix is -0.1; it must be 0 or more"),
        ("[train]\ntmix = nan", "train.tmix"),
        ("[train]\ntmix = 0.4\nr_drop = 1", "train.tmix and train.r_drop exclude each other; choose one"),
        ('[train]\ntmix = 0.4\ncompile = "on"', "train.tmix and train.compile exclude each other; choose one"),
        ("[data]\nwindows = 2\n[unlabelled]\n", "data.windows and [unlabelled] exclude each other"),
        ('[train]\ncompile = "on"\n[unlabelled]\n', "train.compile and [unlabelled] exclude each other; remove one"),
        ("[train]\ntmix = 0.4\n[unlabelled]\n", "train.tmix and [unlabelled] exclude each other; remove one"),
        ("[unlabelled]\nratio = 0", "unlabelled.ratio is 0; it must be above 0"),
        ("[unlabelled]\nthreshold = 1.5", "unlabelled.threshold is 1.5; it must be in [0, 1]"),
        ('[unlabelled]\nmethod = "mixmatch"', "unlabelled.method: Input should be 'pseudo_label', 'fixmatch', "),
        ('[unlabelled]\nmethod = "softmatch"\nthreshold = 0.5', "unlabelled.threshold has no effect with softmatch"),
        ('[unlabelled]\nmethod = "pseudo_label"\nalpha = 0.2', "unlabelled.alpha has no effect with pseudo_label"),
        ("[train]\nlora_plus_ratio = 0", "train.lora_plus_ratio is 0.0; it must be above 0"),
        ("[ia3]\n[train]\nlora_plus_ratio = 16", "train.lora_plus_ratio is 16, but there is no [lora]; add it"),
        ("[train]\nseed = 5000000000", "train.seed is 5000000000; it must be below 4294967296"),
        (f"[train]\naccumulation_steps = {'9' * 20}", "train.accumulation_steps is 99999999999999999999; it must be"),
        (f"[lora]\nrank = {'9' * 20}", "lora: rank is 99999999999999999999; a rank is"),
        ('[train]\nprecision = "int8"', "train.precision"),
        ("[train\nepochs = 1", "not valid TOML"),
    ],
)
def test_bad_file_is_one_line_naming_file_and_field(toml, text, says):
    path = toml(text)
    with pytest.raises(ConfigError) as error:
        read_config(path)
    message = str(error.value)
    assert says in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lora.rnak", "8"], "command line: unknown --lora.rnak 8; did you mean --lora.rank?;"),
        (["--lora.rank", "many"], "command line: --lora.rank: not an integer: 'many';"),
        (["--train.learning-rate", "much"], "command line: --train.learning-rate: not a number: 'much';"),
        (["--train.seed"], "Missing value for argument '--train.seed'"),
        (["--overwite"], "did you mean --overwrite?;"),
        (["--train.lerning-rate=2", "--lora.rnak", "3"], "did you mean --train.learning-rate or --lora.rank?"),
        (["--data.cleaning.no-htlm"], "did you mean --data.cleaning.html?"),
        (["--train.precision", "int8"], "invalid choice 'int8' for argument '--train.precision'"),
        (["--lora.rank", "0"], "command line: lora: rank is 0;"),
        (["--train.epochs", "0"], "command line: train.epochs is 0;"),
        (["no_such.toml"], "no_such.toml"),
        (["--lora.layers-to-transform", "0,1"], "layers-to-transform: '0,1' is one word; write the values with blanks"),
        (["--lora.layers-to-transform=0,1"], "with blanks between them: --lora.layers-to-transform 0 1;"),
        (["--lora.target-modules", "query", "--lora.target_modules=value"], "--lora.target-modules is given 2 times;"),
        (["--lora.rank-pattern", "0", "2", "--lora.rank-pattern", "1", "3"], "--lora.rank-pattern is given 2 times;"),
    ],
)
def test_bad_command_line_is_one_line(options, says):
    with pytest.raises(ValueError) as error:
        parse_command_line(options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    # Shown for a file that has them.
    tables = ["unlabelled", *(table.replace("_", "-") for table in METHODS if table != "lora")]
    others = tuple(f"--{table}." for table in tables)
    assert all(option in out for option in option_names(RunConfig) if not option.startswith(others))
    assert {"--output", "--lora.rank", "--data.cleaning.html"} <= set(option_names(RunConfig))


def test_a_scalar_option_given_twice_has_its_last_value():
    assert parse_command_line(["--lora.rank", "2", "--lora.rank", "3"]).lora.rank == 3


def test_a_byte_order_mark_is_not_content(toml):
    assert read_config(toml("\ufeff[lora]\nrank = 6\n")).lora.rank == 6


def test_not_utf8_file_is_named(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"output = '\xff'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_config(path)
