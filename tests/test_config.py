"""The command line: every way of writing an option, and one clear line for every mistake."""

from dataclasses import dataclass, fields, replace

import pytest

from recipes.cnn import CNNConfig
from scaletrain import Config, InputError, parse


@pytest.mark.parametrize(
    "args", [["--batch-size", "96"], ["--batch_size", "96"], ["--batch-size=96"], ["--batch_size=96"]], ids=" ".join
)
def test_an_option_may_be_written_in_four_ways(args):
    assert parse(CNNConfig, args).batch_size == 96


def test_values_get_their_types():
    cfg = parse(Config, ["--lr", "3e-4", "--max-steps", "7", "--compile", "--precision", "bf16", "--out", "x"])
    assert (cfg.lr, cfg.max_steps, cfg.compile, cfg.precision, cfg.out) == (3e-4, 7, True, "bf16", "x")


def test_a_recipe_changes_defaults_and_keeps_the_rest():
    cfg = parse(CNNConfig, [])
    assert (cfg.lr, cfg.batch_size, cfg.epochs) == (3e-3, 128, 20)
    assert {f.name for f in fields(Config)} <= {f.name for f in fields(CNNConfig)}


def test_help_lists_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(CNNConfig, ["--help"], description="A small CNN.")
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "A small CNN." in said
    for option in fields(CNNConfig):
        assert f"--{option.name.replace('_', '-')}" in said
    assert "Examples per optimizer step over all devices" in said


MISTAKES = {
    "--learning-rate 3": "unknown option --learning-rate; see --help",
    "--batchsize 3": "unknown option --batchsize; did you mean --batch-size?",
    "--micro 3": "unknown option --micro; did you mean --micro-batch-size?",
    "--weigth-decay 0.1": "unknown option --weigth-decay; did you mean --weight-decay?",
    "--lr fast": "--lr fast: expected a number",
    "--batch-size 1.5": "--batch-size 1.5: expected a whole number",
    "--batch-size": "--batch-size (nothing): expected a whole number",
    "--batch-size=": "--batch-size (nothing): expected a whole number",
    "--max-steps ten": "--max-steps ten: expected a whole number or None",
    "--precision fp8": "--precision fp8: expected one of auto, fp32, tf32, bf16, fp16",
    "--track mlflow": "--track mlflow: expected one of none, wandb",
    "--compile yes": "--compile yes: expected no value; say --compile or --no-compile",
    "cnn": "'cnn' is not an option; options look like",
    "--epochs 3 cnn": "--epochs 3 cnn: expected a number",
    "--lr 0": "--lr is 0.0; it must be a finite number above 0",
    "--lr -1": "--lr is -1.0; it must be a finite number above 0",
    "--lr nan": "--lr is nan; it must be a finite number above 0",
    "--lr inf": "--lr is inf; it must be a finite number above 0",
    "--epochs 0": "--epochs is 0.0; it must be a finite number above 0",
    "--max-steps 0": "--max-steps is 0; it must be at least 1",
    "--batch-size 0": "--batch-size is 0; it must be at least 1",
    "--micro-batch-size 0": "--micro-batch-size is 0; it must be at least 1",
    "--max-grad-norm -1": "--max-grad-norm is -1.0; it must be a finite number above 0",
    "--weight-decay -0.1": "--weight-decay is -0.1; it must be at least 0 and below 2**63",
    "--weight-decay nan": "--weight-decay is nan; it must be at least 0",
    "--seed -1": "--seed is -1; it must be at least 0",
    "--threads 0": "--threads is 0; it must be at least 1",
    "--patience 0": "--patience is 0; it must be at least 1",
    "--warmup 2": "--warmup is 2.0; it is a share of all steps, from 0 to 1",
    "--warmup nan": "--warmup is nan; it is a share of all steps, from 0 to 1",
    "--monitor max:": "--monitor is 'max:'; name a metric",
}


@pytest.mark.parametrize("args", MISTAKES)
def test_a_mistake_is_named_in_one_line_and_nothing_else_is_printed(args, capfd):
    with pytest.raises(InputError) as mistake:
        parse(CNNConfig, args.split())
    said = str(mistake.value)
    assert said.startswith(MISTAKES[args])
    assert "\n" not in said
    assert capfd.readouterr() == ("", "")


def test_a_config_built_in_python_is_checked_as_well():
    with pytest.raises(InputError, match="--lr is 0"):
        replace(Config(), lr=0).check()
    with pytest.raises(InputError, match="--track mlflow: expected one of none, wandb, tensorboard"):
        Config(track="mlflow").check()


def test_an_option_without_a_default_is_asked_for():
    @dataclass(frozen=True, kw_only=True)
    class Needy(Config):
        corpus: str
        """Where the text lies."""

    assert parse(Needy, ["--corpus", "x"]).corpus == "x"
    with pytest.raises(InputError, match="--corpus is missing; it has no default"):
        parse(Needy, ["--lr", "1"])
    with pytest.raises(InputError, match="--lr abc: expected a number"):
        parse(Needy, ["--epochs", "3", "--corpus", "x", "--lr", "abc"])
