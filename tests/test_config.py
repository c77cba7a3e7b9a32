"""The task dicts, their checked form, and what users type wrong."""

import math

import pytest

from config import Aliases, Config
from training.commands.train import FLAGS
from training.errors import UserError
from training.options import add_training_arguments, build_parser
from training.settings import TaskConfig, build_config, resolve_task, unused_fields


def build(task="lra-image", **arguments):
    return build_config(task, Config[task], **arguments)[0]


@pytest.mark.parametrize("task", Config)
def test_every_task_is_valid_and_survives_a_round_trip(task):
    config = build(task)
    assert TaskConfig.from_dict(config.as_dict()) == config
    model = config.model
    assert model.padded_length == 2 ** math.ceil(math.log2(model.max_seq_len))
    assert model.num_blocks * model.block_size == model.padded_length
    assert model.num_active_blocks == math.floor(model.density * model.num_blocks**2)


def test_published_values():
    # a sample from each column of the reference's dicts
    assert Config["lra-listops"]["model"]["num_layers"] == 4
    assert Config["lra-retrieval"]["model"]["density"] == 0.021
    assert Config["lra-image"]["training"]["warmup"] == 175
    assert Config["lra-news1"]["training"]["num_train_steps"] == 30000
    assert Config["lra-yelp1"]["training"]["num_init_steps"] == 17000
    assert Config["lra-nature"]["model"]["num_classes"] == 14
    assert Config["lra-text"]["training"]["learning_rate"] == 0.0001
    assert build().model.num_active_blocks == 51  # floor(.05 * 32^2), as in the published masks
    padded = {task for task in Config if Config[task]["model"]["key_padding"]}
    assert padded == {"lra-listops", "lra-text", "lra-retrieval", "lra-news1", "lra-yelp1"}


def test_flag_beats_set_beats_dict_beats_default():
    assert build("lra-listops").training.skewness == 1.7  # no task value: the default
    assert build(settings=["training.skewness=2"]).training.skewness == 2.0
    config = build(
        settings=["training.skewness=2", "training.batch_size=8"], flags={"training.skewness": 3.0}
    )
    assert (config.training.skewness, config.training.batch_size) == (3.0, 8)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("learned", "settled")),
        (["--recipe", "sat"], ("learned", "settled")),
        (["--recipe", "attention"], ("mass_rows", "concentrated")),
        (["--recipe", "attention", "--pattern", "mass"], ("mass", "concentrated")),
        (["--set", "sparsity.pattern=mass", "--recipe", "attention"], ("mass", "concentrated")),
        (["--recipe", "attention", "--transition_when", "settled"], ("mass_rows", "settled")),
    ],
)
def test_a_recipe_is_what_nothing_else_says(words, expected):
    parser = build_parser("x", "", modes=["train"], default_mode="train")
    add_training_arguments(parser)
    args = parser.parse_args(words)
    flags = {path: getattr(args, flag) for flag, path in FLAGS.items()}
    found = build("lra-image", settings=args.set, flags=flags).sparsity
    assert (found.pattern, found.transition_when) == expected


def test_batch_size_never_changes_what_is_evaluated():
    assert (
        build(flags={"training.batch_size": 8}).num_eval_examples
        == build().num_eval_examples
        == 20 * 512
    )
    assert build(settings=["training.num_eval_steps=2"]).num_eval_examples == 2 * 512


def test_warmup_is_shortened_and_said():
    config, notices = build_config(
        "lra-image", Config["lra-image"], flags={"training.num_train_steps": 40}
    )
    assert config.training.warmup == 4
    assert len(notices) == 1 and "from 175 to 4" in notices[0]
    config, notices = build_config(
        "lra-image", Config["lra-image"], flags={"training.num_train_steps": 176}
    )
    assert config.training.warmup == 175 and not notices
    assert build(flags={"training.num_train_steps": 1}).training.warmup == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.num_layer=4"], "model.num_layer is not a field; did you mean model.num_layers?"),
        (["training.distnace=1.3"], "did you mean training.distance?"),
        (["model.num_layers=four"], "model.num_layers must be of type int, not 'four'"),
        (["model.num_layers=2.5"], "must be of type int"),
        (["model.num_layers=True"], "must be of type int"),
        (["model.tied_weights=1"], "must be of type bool"),
        (["model.num_layers=0"], "model.num_layers must be at least 1"),
        (["model.density=0"], r"model.density must lie in \(0, 1\]"),
        (["model.density=1.5"], r"model.density must lie in \(0, 1\]"),
        (["model.density=0.0005"], "keeps no block"),
        (["model.block_size=48"], "model.block_size 48 does not divide the padded length 1024"),
        (["model.dropout_prob=1.0"], r"model.dropout_prob must lie in \[0, 1\)"),
        (["model.pooling_mode=MAX"], "model.pooling_mode must be MEAN or CLS"),
        (["model.embedding_dim=32"], "must equal model.transformer_dim"),
        (["training.learning_rate=-1"], "training.learning_rate must be above 0"),
        (["training.learning_rate=1e999"], "must be a finite number"),
        (["training.lr_decay=cosine"], "training.lr_decay must be linear"),
        (["training.statistics_groups=0"], "training.statistics_groups must lie between 1 and"),
        (["training.statistics_groups=1024"], "training.statistics_groups must lie between"),
        (["training.warmup=20000"], "training.warmup"),
        (["training.patience=3"], "use --patience"),
        (["training.num_dense_train_steps=10"], "use --max_dense_steps"),
        (["training.num_init_steps=10"], "changes nothing"),
        (["model.attention_dropout=0.5"], "model.dropout_prob"),
        (["model.batch_size=5"], "--batch_size"),
        (["num_layers=4"], "write it as section.field=value"),
        (["model.num_layers"], "write it as section.field=value"),
        (["model.num_layers="], "write it as section.field=value"),
        (["dataset.train=5"], "the section must be one of model, training"),
    ],
)
def test_mistakes_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        build(settings=settings)


def test_task_names():
    assert resolve_task("lra-pathfinder", Config, Aliases).endswith("curv_contour_length_14")
    with pytest.raises(ValueError, match="unknown task 'lra-imgae'; did you mean lra-image"):
        resolve_task("lra-imgae", Config, Aliases)


def test_unused_fields_are_those_of_the_dict():
    assert "training.patience" not in unused_fields(Config["lra-image"])
    assert "training.patience" in unused_fields(Config["lra-listops"])
    assert "model.attention_dropout" in unused_fields(Config["lra-image"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["sparsity.pattern=bigbird"], "--pattern must be one of learned, random, band"),
        (["sparsity.transition_when=now"], "--transition_when must be one of settled, shifting"),
        (["sparsity.max_dense_steps=0"], "which needs a dense phase; these need none: random"),
        (["sparsity.max_dense_steps=0", "sparsity.pattern=mass"], "mass from, which needs"),
        (["sparsity.max_dense_steps=-1"], "at least 0"),
        (["sparsity.transition_when=after"], "needs --max_dense_steps N"),
        (["sparsity.transition_when=agreeing"], "use one that does .mass, mass_rows."),
        (["sparsity.transition_when=agreeing", "sparsity.pattern=band"], "does not look at the"),
        (["sparsity.lift=0.5"], "--lift must be at least 1, not 0.5"),
        (["sparsity.agreement=0"], "--agreement must lie in .0, 1., not 0"),
        (["sparsity.agreement=1.1"], "--agreement must lie in .0, 1., not 1.1"),
        (["sparsity.pattern=given"], "--pattern given and --masks FILE go together"),
        (["sparsity.masks=x.pickle"], "--pattern given and --masks FILE go together"),
        (["sparsity.reselect_every=5"], "--pattern learned does not look; use one that does"),
        (["sparsity.reselect_every=0", "sparsity.pattern=mass"], "--reselect_every must be at le"),
        (["sparsity.densities=0.1,0.3", "sparsity.phase_steps=5"], "must be falling numbers"),
        (["sparsity.densities=0.3,0.1", "sparsity.phase_steps=5"], "must be model.density .0.05"),
        (["sparsity.densities=0.3,0.05"], "--phase_steps N go together"),
        (["sparsity.phase_steps=3"], "--phase_steps N go together"),
        (["run.seed=-1"], r"--random must lie in \[0, 2\^63\), not -1"),
        (["run.precision=fp8"], "--precision must be one of auto, fp32"),
        (["run.patience=0"], "--patience must be at least 1"),
        (
            ["sparsity.pattern=band_global", "model.density=0.01"],
            "--pattern band_global: .* needs 94 of 32.2 blocks, a density of at least 0.0918",
        ),
        (["sparsity.pattern=3"], "sparsity.pattern must be of type str"),
    ],
)
def test_methods_that_cannot_work_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        build(settings=settings)
