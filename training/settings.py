"""From a task's dict and the command line to one frozen, checked configuration.

Precedence: flag, then --set, then the task's dict, then the default in the dataclass.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from models.config import ModelConfig, checked_fields
from sparsity import CRITERIA, PATTERNS, Criterion
from sparsity.patterns import too_few
from sparsity.phases import Phase, plan
from training.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainingConfig:
    """How one task is trained.

    Raises:
        UserError: one sentence naming the field and what is allowed.
    """

    batch_size: int  # examples an optimizer step sees, whatever micro-batches and devices
    learning_rate: float
    warmup: int  # steps
    eval_frequency: int  # steps
    num_train_steps: int  # horizon of the learning-rate schedule
    num_eval_steps: int  # times the dict's own batch_size: how many dev examples are evaluated
    lr_decay: str = "linear"
    weight_decay: float = 0.0
    attn_loss_scale: float = 0.01
    skewness: float = 1.7
    distance: float = 1.3  # percent
    statistics_groups: int = (
        4  # parts of the batch whose mean attentions are stacked for the criterion
    )
    save_seconds: float = 300.0  # a resumable checkpoint at least this often
    num_init_steps: int = 0  # kept for compatibility, never used
    num_dense_train_steps: int = 0  # kept for compatibility, never used
    patience: int = 0  # kept for compatibility, never used

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_frequency", "num_train_steps", "num_eval_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "save_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"training.{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "attn_loss_scale"):
            if getattr(self, name) < 0:
                raise UserError(f"training.{name} must be at least 0, not {getattr(self, name)}")
        if self.warmup >= self.num_train_steps:
            raise UserError(
                f"training.warmup ({self.warmup} steps) must be below training.num_train_steps "
                f"({self.num_train_steps})"
            )
        if self.lr_decay != "linear":
            raise UserError(f"training.lr_decay must be linear, not {self.lr_decay!r}")
        if not 1 <= self.statistics_groups <= self.batch_size:
            raise UserError(
                f"training.statistics_groups must lie between 1 and training.batch_size "
                f"({self.batch_size}), "
                f"not {self.statistics_groups}: the batch is split into that many parts for the "
                f"criterion"
            )


@dataclass(frozen=True)
class SparsityConfig:
    """When a run turns sparse, and which blocks it keeps.

    Raises:
        UserError: one sentence naming the option and what is allowed.
    """

    pattern: str = "learned"
    masks: str | None = None  # file of the blocks of pattern given
    transition_when: str = "settled"
    max_dense_steps: int | None = None  # the transition comes at this step at the latest
    lift: float = 3.0  # times the start's concentration, for concentrated
    agreement: float = 0.9  # intersection over union, for agreeing
    densities: tuple | None = None  # falling, of as many sparse phases; the last is model.density
    phase_steps: int | None = None  # of each sparse phase but the last
    reselect_every: int | None = None  # sparse steps between two choices of blocks
    probe_every: int | None = None  # sparse steps between two probes, besides those of evaluations

    def __post_init__(self) -> None:
        for option, name, known in (
            ("pattern", self.pattern, PATTERNS),
            ("transition_when", self.transition_when, CRITERIA),
        ):
            if name not in known:
                raise UserError(f"--{option} must be one of {', '.join(known)}, not {name!r}")
        pattern, criterion = PATTERNS[self.pattern], CRITERIA[self.transition_when]
        looking = [name for name, other in PATTERNS.items() if other.needs == "attention"]
        if self.max_dense_steps is not None and self.max_dense_steps < 0:
            raise UserError(f"--max_dense_steps must be at least 0, not {self.max_dense_steps}")
        if self.max_dense_steps == 0 and pattern.needs is not None:
            others = ", ".join(name for name, other in PATTERNS.items() if other.needs is None)
            raise UserError(
                f"--max_dense_steps 0 leaves nothing to choose blocks of --pattern "
                f"{self.pattern} from, which needs a dense phase; these need none: {others}"
            )
        if criterion.is_budget and self.max_dense_steps is None:
            raise UserError(
                f"--transition_when {self.transition_when} needs --max_dense_steps N, the number "
                f"of dense steps"
            )
        if criterion.needs_moving_choice and pattern.needs != "attention":
            raise UserError(
                f"--transition_when {self.transition_when} waits for the choice of blocks to "
                f"settle, which that of --pattern {self.pattern} has from the start: it does not "
                f"look at the attention; use one that does ({', '.join(looking)})"
            )
        densities = self.densities
        if densities is not None:
            if any(type(value) is not float for value in densities) or not all(
                1 >= one > other > 0 for one, other in pairwise(densities)
            ):
                raise UserError(
                    f"--densities must be falling numbers in (0, 1], such as 0.3,0.1,0.05, not "
                    f"{','.join(map(str, densities))}"
                )
            if pattern.own_count:
                raise UserError(f"--densities changes nothing for --pattern {self.pattern}")
        if (densities is not None and len(densities) > 1) != (self.phase_steps is not None):
            raise UserError("--densities D1,D2,... and --phase_steps N go together")
        for name in ("reselect_every", "probe_every", "phase_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")
        if self.reselect_every is not None and pattern.needs != "attention":
            raise UserError(
                f"--reselect_every chooses blocks anew from the attention, at which --pattern "
                f"{self.pattern} does not look; use one that does ({', '.join(looking)})"
            )
        if not self.lift >= 1:
            raise UserError(f"--lift must be at least 1, not {self.lift:g}")
        if not 0 < self.agreement <= 1:
            raise UserError(f"--agreement must lie in (0, 1], not {self.agreement:g}")
        if (self.pattern == "given") != (self.masks is not None):
            raise UserError("--pattern given and --masks FILE go together")


@dataclass(frozen=True)
class RunConfig:
    """What else decides a run's numbers.

    Raises:
        UserError: one sentence naming the option and what is allowed.
    """

    seed: int = 0
    precision: str = "auto"  # until the device is known
    patience: int | None = None  # evaluations without a better one after which training ends

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--random must lie in [0, 2^63), not {self.seed}")
        if self.precision not in PRECISIONS:
            raise UserError(
                f"--precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}"
            )
        if self.patience is not None and self.patience < 1:
            raise UserError(f"--patience must be at least 1, not {self.patience}")


@dataclass(frozen=True)
class TaskConfig:
    """Everything that defines a run's mathematics: one object, checked, stored in checkpoints and
    run.json, and compared with it on resume."""

    task: str
    model: ModelConfig
    training: TrainingConfig
    num_eval_examples: (
        int  # num_eval_steps * the dict's own batch_size; --batch_size never changes it
    )
    sparsity: SparsityConfig = SparsityConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        densities = self.sparsity.densities
        if densities is not None and densities[-1] != self.model.density:
            raise UserError(
                f"the last of --densities ({densities[-1]:g}) must be model.density "
                f"({self.model.density:g})"
            )
        name, num_blocks = self.sparsity.pattern, self.model.num_blocks
        for density in densities or (self.model.density,):
            count = int(num_blocks**2 * density)
            if count < 1:
                raise UserError(f"--densities: {density:g} keeps no block")
            if count < PATTERNS[name].least(num_blocks):
                raise UserError(f"--pattern {name}: {too_few(name, num_blocks, density)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict, as saved in checkpoints and run.json."""
        return {
            "task": self.task,
            "num_eval_examples": self.num_eval_examples,
            **{name: self.section(name) for name in SECTIONS},
        }

    def section(self, name: str) -> dict[str, Any]:
        """The settings of a section, as --set names them."""
        values = getattr(self, name)
        return {f.name: getattr(values, f.name) for f in dataclasses.fields(values) if f.init}

    def phases(self) -> list[Phase]:
        """The parts of a run, in order."""
        sparsity = self.sparsity
        return plan(
            criterion=sparsity.transition_when,
            max_dense_steps=sparsity.max_dense_steps,
            pattern=sparsity.pattern,
            densities=sparsity.densities or (self.model.density,),
            phase_steps=sparsity.phase_steps,
            reselect_every=sparsity.reselect_every,
        )

    def new_criterion(self) -> Criterion:
        """The criterion that ends the dense phase, with its thresholds."""
        cls = CRITERIA[self.sparsity.transition_when]
        settings = self.section("training") | self.section("sparsity")
        return cls(**{name: settings[name] for name in cls.options})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskConfig:
        """Inverse of `as_dict`."""
        # checkpoints of before a section was there have its defaults
        sections = {name: _section(name, values.get(name, {})) for name in SECTIONS}
        return cls(values["task"], num_eval_examples=values["num_eval_examples"], **sections)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "training": TrainingConfig,
    "sparsity": SparsityConfig,
    "run": RunConfig,
}


def _section(name: str, values: Mapping[str, Any]) -> Any:
    """A section's checked object."""
    try:
        return SECTIONS[name](**checked_fields(SECTIONS[name], name, values))
    except ValueError as error:  # the model's checks raise it; here a user can mend it
        raise UserError(str(error)) from None


# Fields that the reference carries and never acts on, and what serves their purpose here.
UNUSED_FIELDS = {
    "training.num_dense_train_steps": "use --max_dense_steps to bound the dense phase",
    "training.patience": "use --patience to stop early",
    "training.num_init_steps": "nothing reads it; --max_dense_steps bounds the dense phase",
    "model.attention_dropout": "attention has no dropout; use model.dropout_prob",
    "model.batch_size": "use --batch_size or training.batch_size",
}


# The original decides key padding and the number of inputs by a task's name: True where padded.
_BY_NAME = dict.fromkeys(("lra-listops", "lra-text", "lra-retrieval"), True)
_BY_NAME |= dict.fromkeys(("lra-news1", "lra-yelp1"), True)
_BY_NAME |= dict.fromkeys(("lra-image", "lra-nature", "lra-pathfinder"), False)


def of_the_original(
    task: str, model: dict[str, Any], training: dict[str, Any], given: Mapping[str, Any]
) -> list[str]:
    """Completes a dict that was copied from the original, in place, and says how.

    given: fields of the model that --set will add.

    Raises:
        UserError: the dict does not say what the task is, and neither does its name.
    """
    notices = []
    if "distnace" in training:  # its spelling in lra-nature
        training.setdefault("distance", training.pop("distnace"))
        notices.append("training.distnace is read as training.distance")
    missing = [field for field in ("key_padding", "num_inputs") if field not in {*model, *given}]
    name = next((name for name in _BY_NAME if task.startswith(name)), None)
    if missing and name is None:
        raise UserError(
            f"the dict of {task} lacks model.{missing[0]}: say whether attention ignores keys "
            f"with id 0 (model.key_padding) and how many documents an example has "
            f"(model.num_inputs)"
        )
    if missing and name is not None:
        values = {"key_padding": _BY_NAME[name], "num_inputs": 1 + (name == "lra-retrieval")}
        model.update({field: values[field] for field in missing})
        said = ", ".join(f"model.{field} = {values[field]}" for field in missing)
        notices.append(f"{said}: not in the task's dict, so by its name, as in the original")
    return notices


def resolve_task(name: str, tasks: Mapping[str, Any], aliases: Mapping[str, str]) -> str:
    """The task's full name.

    Raises:
        UserError: unknown task; lists those there are.
    """
    name = aliases.get(name, name)
    if name not in tasks:
        close = difflib.get_close_matches(name, [*tasks, *aliases], n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown task {name!r}; {hint}known: {', '.join([*tasks, *aliases])}")
    return name


def parse_settings(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`--set section.field=value` texts as {"model": {...}, "training": {...}, ...}.

    Values are Python literals; what is none is taken as a string, and true and false are taken in
    any case.

    Raises:
        UserError: malformed text, unknown section, or a field that nothing reads.
    """
    parsed: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for text in settings:
        path, equals, literal = text.partition("=")
        section, dot, field = path.strip().partition(".")
        if not equals or not dot or not field or not literal.strip():
            raise UserError(
                f"--set {text}: write it as section.field=value, for example model.num_layers=4"
            )
        if section not in parsed:
            raise UserError(
                f"--set {text}: the section must be one of {', '.join(SECTIONS)}, not {section!r}"
            )
        if path.strip() in UNUSED_FIELDS:
            raise UserError(
                f"--set {text}: {path.strip()} is kept for compatibility and changes nothing; "
                f"{UNUSED_FIELDS[path.strip()]}"
            )
        literal = literal.strip()
        value: Any
        if literal.lower() in ("true", "false"):
            value = literal.lower() == "true"
        else:
            try:
                value = ast.literal_eval(literal)
            except (ValueError, SyntaxError):
                value = literal
        parsed[section][field] = value
    return parsed


def seed_of(flag: int | None, settings: Sequence[str]) -> int:
    """The run's seed, which is part of its file names: --random, else --set run.seed, else 0."""
    return _section("run", parse_settings(settings)["run"]).seed if flag is None else flag


def build_config(
    task: str,
    task_dict: Mapping[str, Any],
    *,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> tuple[TaskConfig, list[str]]:
    """The checked configuration of one run, and sentences on what was adapted.

    Args:
        task: full name; task_dict: its entry in config.Config.
        settings: texts of --set; flags: section.field -> value, None where not given.

    Raises:
        UserError: one sentence naming the field and what is allowed.
    """
    changes = parse_settings(settings)
    for section in ("model", "training"):
        if not isinstance(task_dict.get(section), Mapping):
            raise UserError(f"the dict of {task} has no part {section!r}")
    merged = {name: dict(task_dict.get(name, {})) for name in changes}
    notices = of_the_original(task, merged["model"], merged["training"], changes["model"])
    for name, values in changes.items():
        merged[name] |= values
    for path, value in (flags or {}).items():
        if value is not None:
            section, field = path.split(".")
            merged[section][field] = value
    training = merged["training"]
    steps, warmup = training.get("num_train_steps"), training.get("warmup")
    # a run shortened by --train_steps (or --set) keeps a warmup that fits it
    if (
        isinstance(steps, int)
        and isinstance(warmup, int)
        and 1 <= steps <= warmup
        and "warmup" not in changes["training"]
    ):
        training["warmup"] = steps // 10
        notices.append(
            f"warmup shortened from {warmup} to {steps // 10} steps: it has to fit into {steps} "
            f"training steps"
        )
    sections = {name: _section(name, values) for name, values in merged.items()}
    own = task_dict["training"].get("batch_size", sections["training"].batch_size)
    count = sections["training"].num_eval_steps * own
    config = TaskConfig(task, num_eval_examples=count, **sections)
    return config, notices


def unused_fields(task_dict: Mapping[str, Any]) -> list[str]:
    """Those fields of the task's dict that nothing reads, as section.field."""
    return [path for path in UNUSED_FIELDS if path.split(".")[1] in task_dict[path.split(".")[0]]]
