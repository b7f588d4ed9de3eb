import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from windowlm.attention.config import LinearScaling, RotaryConfig
from windowlm.attention.rotary import RotaryEmbedding
from windowlm.config import (
    ConfigError,
    EvaluateConfig,
    TrainConfig,
    check_config,
    settings_of,
    unknown_key_error,
)
from windowlm.model.config import ModelConfig
from windowlm.model.cost import model_cost
from windowlm.training.schedule import WindowWarmup

CONF = Path(__file__).parents[1] / "conf"
GROUPS = [
    (folder.name, option.stem)
    for folder in sorted(CONF.iterdir())
    if folder.is_dir()
    for option in sorted(folder.glob("*.yaml"))
]
# What an option needs besides itself to be complete.
COMPANIONS = {
    ("data", "text"): ["data.path=README.md"],
    ("tokenizer", "file"): ["tokenizer.path=tokenizer.json"],
    ("tokenizer", "folder"): ["tokenizer.path=runs/one"],
    **{
        ("experiment", name): ["data.path=README.md"]
        for name in ("books_300s", "ablation", "ablation_plain", "length_study", "length_study_long")
    },
    **{
        ("switch", path.stem): ["experiment=books_300s", "data.path=README.md"]
        for path in CONF.glob("switch/*.yaml")
    },
    **{
        ("cell", path.stem): ["experiment=length_study", "data.path=README.md"]
        for path in CONF.glob("cell/*.yaml")
    },
}


@cache
def composed(*overrides: str) -> dict[str, object]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = OmegaConf.to_container(compose("train", ["run_dir=runs/test", *overrides]), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def error_of(**changes: object) -> ConfigError:
    values: dict[str, object] = {"run_dir": "runs/test"}
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            values.setdefault(group, {})[name] = value  # type: ignore[index]
        else:
            values[group] = value
    with pytest.raises(ConfigError) as raised:
        check_config(TrainConfig, values)
    return raised.value


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_option_of_every_group_composes_and_validates(group: str, option: str) -> None:
    config = check_config(TrainConfig, composed(f"{group}={option}", *COMPANIONS.get((group, option), [])))
    assert config.run_dir == "runs/test"


def keys_of(values: object, prefix: str) -> set[str]:
    if not isinstance(values, dict):
        return set()
    return {f"{prefix}{key}" for key in values}.union(
        *(keys_of(value, f"{prefix}{key}.") for key, value in values.items())
    )


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_a_yaml_holds_the_settings_of_its_dataclass_and_no_other(group: str, option: str) -> None:
    if group in ("experiment", "switch", "cell", "hydra"):
        return
    held = keys_of(composed(f"{group}={option}", *COMPANIONS.get((group, option), []))[group], f"{group}.")
    fields = {
        key: setting for key, setting in settings_of(TrainConfig).items() if key.startswith(f"{group}.")
    }
    assert held <= fields.keys()
    assert all(fields[key].under_nullable for key in fields.keys() - held)


def test_the_yaml_defaults_equal_the_dataclass_defaults() -> None:
    from_yaml = check_config(TrainConfig, composed())
    from_code = TrainConfig(run_dir="runs/test")
    assert json.dumps(asdict(from_yaml)) == json.dumps(asdict(from_code))


@pytest.mark.parametrize("value", [0, -1])
def test_a_window_below_one_names_the_allowed(value: int) -> None:
    error = error_of(model__window=value)
    assert error.key == "model.window"
    assert "at least 1" in str(error)
    assert error.correction == "model.window=256"


@pytest.mark.parametrize("value", [1.5, True, "wide"])
def test_a_window_of_another_type_names_the_allowed(value: object) -> None:
    error = error_of(model__window=value)
    assert error.key == "model.window"
    assert error.correction == "model.window=256"
    assert "a whole number" in str(error)
    assert "null" in str(error)


def test_an_entry_of_a_window_pattern_is_checked() -> None:
    assert error_of(model__window=[64, 0]).key == "model.window"
    assert error_of(model__window=[64, 2.5]).key == "model.window"
    assert error_of(model__window=[]).key == "model.window"


def test_key_value_heads_must_divide_the_heads() -> None:
    error = error_of(model__kv_heads=3)
    assert (error.key, error.correction) == ("model.kv_heads", "model.kv_heads=2")
    assert "1, 2, 4" in str(error)


@pytest.mark.parametrize(
    ("fraction", "head_dim", "good"), [(0.3, 32, "0.3125"), (0.01, 32, "0.0625"), (0.99, 48, "1.0")]
)
def test_an_even_number_of_dimensions_is_rotated(fraction: float, head_dim: int, good: str) -> None:
    error = error_of(model__rotary={"fraction": fraction}, model__head_dim=head_dim)
    assert (error.key, error.correction) == ("model.rotary.fraction", f"model.rotary.fraction={good}")
    shape = ModelConfig(head_dim=head_dim, rotary=RotaryConfig(fraction=float(good)))
    assert RotaryEmbedding(head_dim, shape.rotary).rotated % 2 == 0


def test_an_even_number_of_dimensions_is_rotated_in_each_entry_of_a_pattern() -> None:
    error = error_of(model__rotary=[None, {"fraction": 0.3}], model__head_dim=32)
    assert str(error).startswith("model.rotary[1].fraction=0.3: must rotate an even number")
    assert error.correction == "model.rotary=[null, {base: 10000.0, fraction: 0.3125, scaling: null}]"
    assert error_of(model__rotary=[None, {}], model__head_dim=15).correction == "model.head_dim=16"
    assert ModelConfig(head_dim=15, rotary=[None, None]).layer_rotaries() == [None] * 4


def test_a_rotary_pattern_repeats_over_the_layers() -> None:
    pattern = [{"base": 100}, {"scaling": {"kind": "linear", "factor": 2}}, None]
    config = check_config(TrainConfig, {"run_dir": "run", "model": {"layers": 5, "rotary": pattern}})
    scaled = RotaryConfig(scaling=LinearScaling(kind="linear", factor=2.0))
    first = RotaryConfig(base=100.0)
    assert config.model.layer_rotaries() == [first, scaled, None, first, scaled]


@pytest.mark.parametrize(
    ("pattern", "message", "correction"),
    [
        ([], "model.rotary=[]: a pattern holds at least one entry", "model.rotary=[{base: 10000},null]"),
        (
            [None, {"base": -1, "fraction": 0.5}],
            "model.rotary[1].base=-1.0: ",
            "[null,{fraction: 0.5, base: 10000}]",
        ),
        ([{"bsae": 5}, None], "nearest: model.rotary[0].base", "[{base: 5},null]"),
        ([{"layers": 5}, None], "there is no setting model.rotary[0].layers", None),
        ([{"base": "x"}, 7], "model.rotary[0].base=x: allowed is a number", "[{base: 10000.0},7]"),
        ([5, None], "model.rotary=[5,null]: allowed is a list, each entry a group of settings or null", None),
        ([{"scaling": {"kind": "yarm"}}], "model.rotary[0].scaling.kind=yarm", "[{scaling: {kind: yarn}}]"),
        ([{"scaling": {"kind": "ntk"}}], "model.rotary[0].scaling.factor: must be given", None),
        ([{"base": float("inf")}], "model.rotary[0].base=inf: a finite number above 1", "[{base: 10000}]"),
        ("flat", "model.rotary=flat: allowed is a group of settings or a list or null", None),
    ],
)
def test_an_entry_of_a_rotary_pattern_is_checked(
    pattern: object, message: str, correction: str | None
) -> None:
    error = error_of(model__rotary=pattern)
    assert message in str(error)
    assert error.key == "model.rotary"
    if correction is None:
        assert error.correction is None
    else:
        assert error.correction == "model.rotary=" + correction.removeprefix("model.rotary=")


@pytest.mark.parametrize("key", ["optimizer__weight_decay", "model__norm_epsilon"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(key: str, value: float) -> None:
    error = error_of(**{key: value})
    assert error.key == key.replace("__", ".")
    assert error.correction is not None


def test_numbers_of_groups_within_groups_are_finite() -> None:
    error = error_of(model__rotary={"base": float("inf")})
    assert str(error) == "model.rotary.base=inf: a finite number above 1 is allowed"
    assert error.correction == "model.rotary.base=10000"


def test_an_unknown_key_offers_the_nearest() -> None:
    error = error_of(model__windw=64)
    assert "there is no setting model.windw" in str(error)
    assert error.correction == "model.window=64"


def test_a_key_in_the_wrong_group_offers_the_right_one() -> None:
    assert unknown_key_error("window", "64", settings_of(TrainConfig)).correction == "model.window=64"
    error = unknown_key_error("model.attention_backend", "flex", settings_of(TrainConfig))
    assert error.correction == "model.backend=flex"
    assert unknown_key_error("revision", "x", settings_of(TrainConfig)).correction == "data.revision=x"
    assert unknown_key_error("model.lr", "1", settings_of(TrainConfig)).correction == "optimizer.lr=1"


def test_an_unknown_key_without_a_near_one_lists_the_settings_of_its_group() -> None:
    error = unknown_key_error("model.foo", "1", settings_of(TrainConfig))
    assert error.correction is None
    assert "model has layers, dim, heads" in str(error)


@pytest.mark.parametrize(
    ("key", "value", "allowed", "correction"),
    [
        ("precision", "fp4", "bf16-true", "precision=fp8"),
        ("precision", "bf16-mix", "bf16-true", "precision=bf16-mixed"),
        ("model__layers", None, "a whole number", "model.layers=4"),
        ("trainer__max_steps", 1000.0, "a whole number or null", "trainer.max_steps=1000"),
        ("trainer__max_steps", "many", "a whole number or null", None),
        ("optimizer__betas", [0.9], "a list of 2 numbers", "optimizer.betas=[0.9,0.95]"),
        ("optimizer__betas", [0.9, 0.9, 0.9], "a list of 2 numbers", "optimizer.betas=[0.9,0.95]"),
        ("model__window", [64, "x"], "a list, each entry a whole number or null", "model.window=256"),
        ("plan", "yes", "true or false", "plan=true"),
        ("plan", "maybe", "true or false", "plan=false"),
        ("logger__tags", "one", "a list or null", "logger.tags=[one]"),
        ("run_dir", "", "a folder of its own", "run_dir=null"),
        ("resume", " ", "auto", "resume=auto"),
        (
            "model__rotary",
            {"scaling": {"kind": "yarm"}},
            "linear or ntk or yarn",
            "model.rotary.scaling.kind=yarn",
        ),
        ("model__rotary", {"scaling": {"kind": "yarn"}}, "model.rotary.scaling.factor: must be given", None),
        ("model__rotary", {"scaling": {"fast": 3}}, "model.rotary.scaling.kind: must be given", None),
        (
            "model__rotary",
            {"scaling": {"kind": "linear", "factor": 2.0, "fast": 3}},
            "model.rotary.scaling.fast=3: model.rotary.scaling.kind=linear has no such setting",
            None,
        ),
        ("run_dir", "\udcff", "no UTF-8", None),
    ],
)
def test_an_error_says_what_is_allowed_and_how_to_mend_it(
    key: str, value: object, allowed: str, correction: str | None
) -> None:
    error = error_of(**{key: value})
    assert allowed in str(error)
    assert error.correction == correction


def test_two_budgets_are_one_too_many() -> None:
    error = error_of(trainer__max_steps=10, trainer__max_tokens=10)
    assert error.key == "trainer.max_tokens"
    assert error.correction == "trainer.max_tokens=null"


def test_a_precision_that_does_not_exist_lists_those_that_do() -> None:
    error = error_of(precision="int8")
    assert error.key == "precision"
    for name in ("32-true", "16-mixed", "bf16-mixed", "bf16-true"):
        assert name in str(error)


def test_float16_on_a_cpu_is_refused() -> None:
    error = error_of(precision="16-mixed", trainer__device="cpu")
    assert error.correction == "precision=bf16-mixed"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer__lr", 0),
        ("optimizer__lr", float("inf")),
        ("optimizer__lr", "fast"),
        ("optimizer__warmup_fraction", 1.5),
        ("optimizer__betas", [0.9, 1.0]),
        ("optimizer__betas", [0.9]),
        ("trainer__max_steps", 0),
        ("trainer__max_steps", 1.5),
        ("trainer__max_steps", True),
        ("trainer__max_seconds", -3),
        ("trainer__device", "tpu"),
        ("data__sequence_length", 0),
        ("data__batch_size", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("checkpoint__every_n_steps", 0),
        ("logger__kind", "tensorboard"),
        ("evaluation__context_lengths", [512, 256]),
        ("evaluation__context_lengths", [0]),
        ("model__attention_dropout", 1.0),
        ("model__rotary", {"base": -1.0}),
        ("model__attention_sinks", -1),
        ("model__attention_sinks", 1.5),
        ("model__learned_sinks", 1),
        ("model__output_gate", "sometimes"),
        ("model__logit_cap", 0.0),
        ("model__logit_cap", float("inf")),
        ("model__logit_cap", float("nan")),
        ("model__activation", "relu"),
        ("model__embedding_residual", 2),
        ("model__zero_output_init", "never"),
        ("model__short_convolution", 1),
        ("model__short_convolution", 2.5),
        ("model__final_logit_cap", 0.0),
        ("model__final_logit_cap", float("inf")),
        ("model__value_embeddings", -1),
        ("model__value_embeddings", 3),
        ("model__ngram_embeddings", 3),
        ("model__ngram_embeddings", {"orders": []}),
        ("model__ngram_embeddings", {"orders": [1, 2]}),
        ("model__ngram_embeddings", {"orders": [2, 2]}),
        ("model__ngram_embeddings", {"orders": [17]}),
        ("model__ngram_embeddings", {"buckets": 0}),
        ("model__ngram_embeddings", {"dim": 0}),
        ("model__layers", None),
        ("model", 3),
    ],
)
def test_a_bad_value_is_refused_by_its_key(key: str, value: object) -> None:
    error = error_of(**{key: value})
    assert str(error).startswith(key.replace("__", "."))


def test_the_evaluation_command_composes_and_validates() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = OmegaConf.to_container(
            compose("evaluate", ["checkpoint=run", "data.path=book.txt", "evaluation=full"]), resolve=True
        )
    assert isinstance(values, dict)
    config = check_config(EvaluateConfig, {str(key): value for key, value in values.items()})
    assert config.data.given() == {"path": "book.txt"}
    assert config.evaluation.max_targets is None


def test_the_recipe_for_books_keeps_the_limits_that_it_is_compared_under() -> None:
    config = check_config(TrainConfig, composed("experiment=books_300s", "data.path=README.md"))
    cost = model_cost(config.model, 256, config.data.sequence_length, 2)
    assert config.tokenizer.kind == "bytes"
    assert cost.parameters <= 42_000_000
    assert all(window is not None and window <= 1024 for window in config.model.layer_windows())
    assert config.data.sequence_length == 8192
    assert config.trainer.max_seconds == 300
    limits = WindowWarmup.of(config.trainer, config.model.layer_windows()).limits
    assert len(limits) <= 4


@pytest.mark.parametrize(("window", "better"), [(16, "8"), ("null", "null")])
def test_a_window_warm_up_that_would_grow_nothing_is_refused(window: int | str, better: str) -> None:
    values = composed("trainer.window_warmup=16", f"model.window={window}")
    with pytest.raises(ConfigError) as raised:
        check_config(TrainConfig, values)
    assert raised.value.correction == f"trainer.window_warmup={better}"


def test_cells_of_the_length_study_have_as_many_parameters_where_that_is_said() -> None:
    from windowlm.model.cost import model_cost

    def parameters(cell: str) -> int:
        words = (f"cell={cell}", *COMPANIONS["cell", cell])
        config = check_config(TrainConfig, composed(*words))
        vocabulary = 256 if config.tokenizer.kind == "bytes" else config.tokenizer.vocabulary_size
        return model_cost(config.model, vocabulary, 8192, 2).parameters

    plain = parameters("window_512")
    assert plain == parameters("full") == parameters("hybrid_128") == parameters("kv_heads_8") == 41_170_944
    assert parameters("kv_heads_1") == pytest.approx(plain, rel=0.002)
    assert parameters("full_bpe") == parameters("window_128_bpe") == parameters("window_512_bpe")
    assert parameters("full_bpe") == pytest.approx(plain, rel=0.002)
    page = (CONF.parent / "docs" / "length-study.md").read_text(encoding="utf-8")
    counts = [parameters(cell) for cell in ("window_512", "kv_heads_1", "kv_heads_8", "full_bpe")]
    assert all(f"{count:,}" in page for count in counts)
