"""The options of a run: one definition serves the command line and YAML run files.

Every option has the name and meaning of a field of the Python API (Engine.from_pretrained,
Engine.generate_dataset, Guidance, NegativePrompts, SamplingParams); defaults come from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from . import methods
from .convergence import Convergence
from .errors import nearest_hint
from .guidance import Guidance
from .machine import EngineConfig
from .methods import METHODS, PARAMETERS, Method
from .negatives import AS_MANY_AS_FIT, NegativePrompts
from .sampling import SamplingParams
from .sweep import AXES
from .sweep_results import DIVERSITY, LIKENESS

_steer, _cfg, _top_k, _search = map(
    methods.defaults, ("steer", "cfg", "top_k", "contrastive_search")
)
_machine = EngineConfig()
_sampling = SamplingParams()
_negatives = NegativePrompts()


class UsageError(ValueError):
    """The options do not make a run; the message names the option."""


@dataclass(frozen=True)
class Option:
    """One option.

    kind: str, int, float, bool, or list (of str).
    default: None where it is resolved later.
    shown_default: what help says if default is None.
    """

    name: str
    kind: type
    default: Any
    help: str
    shown_default: str | None = None


OPTIONS = (
    Option("base", str, None, "Directory of the base model's checkpoint.", "required"),
    Option(
        "domain",
        str,
        None,
        "Directory of the domain model: a LoRA adapter of the base, or a full fine-tune.",
    ),
    Option(
        "real",
        str,
        None,
        "File of real examples for the negative prompts: .jsonl, .csv, .parquet or .txt.",
    ),
    Option(
        "recipe",
        str,
        None,
        "Take what is not given from a known task: one of `prepare --help`.",
    ),
    Option("prompt", str, None, "The instruction that every example answers."),
    Option(
        "prompts",
        str,
        None,
        "YAML or JSON file of {label: instruction}, taken in turn, in place of --prompt.",
    ),
    Option("num_examples", int, None, "How many examples to write.", "required"),
    Option("output", str, None, "Directory to write the run to.", "required"),
    Option("resume", bool, True, "Go on with an unfinished run that the directory holds."),
    Option("seed", int, 0, "Seed of every random choice."),
    Option(
        "method",
        str,
        None,
        f"How to decode: {', '.join(METHODS)}.",
        "steer with --domain, else none",
    ),
    Option(
        "gamma",
        float,
        None,
        "How strongly to steer away from the base model.",
        f"{_steer['gamma']}",
    ),
    Option(
        "eta",
        float,
        None,
        "How strongly to steer away from the negative examples.",
        f"{_steer['eta']}",
    ),
    Option(
        "form",
        str,
        None,
        "Formula of steer and negative: paper, or the authors' released code.",
        f"{_steer['form']}",
    ),
    Option(
        "scale", float, None, "Scale of classifier-free guidance (method cfg).", f"{_cfg['scale']}"
    ),
    Option(
        "alpha",
        float,
        None,
        "Leave out tokens less likely than this share of the likeliest one's probability.",
        "off",
    ),
    Option(
        "normalize",
        bool,
        None,
        "Divide the guidance weights by their sum, so that they change no temperature.",
        "off",
    ),
    Option(
        "in_context",
        bool,
        None,
        "Without guidance: show the model real examples in front of the prompt.",
        "off",
    ),
    Option(
        "num_negatives",
        str,
        str(_negatives.num_examples),
        "Negative examples in each negative prompt; max: as many as fit.",
    ),
    Option(
        "template",
        str,
        _negatives.template,
        "Layout of the negative prompt, with {examples} and {prompt}.",
    ),
    Option("separator", str, _negatives.separator, "Text between two negative examples."),
    Option(
        "lag",
        int,
        None,
        "An example becomes a negative for those more than so many after it.",
        "max-num-seqs",
    ),
    Option(
        "share",
        int,
        _negatives.share,
        "So many consecutive examples share their negatives, which is faster.",
    ),
    Option(
        "negative_max_tokens",
        int,
        None,
        "Longest negative prompt in tokens.",
        "what the context leaves",
    ),
    Option(
        "temperature",
        float,
        None,
        "Higher is more random; 0 always takes the likeliest token.",
        "1",
    ),
    Option(
        "top_p",
        float,
        None,
        "Draw from the likeliest tokens that together have this probability.",
        f"{_steer['top_p']} where it applies",
    ),
    Option(
        "top_k",
        int,
        None,
        "Draw from so many of the likeliest tokens; with contrastive-search its candidates.",
        f"{_top_k['top_k']} with top-k, {_search['top_k']} with contrastive-search, else off",
    ),
    Option(
        "penalty_alpha",
        float,
        None,
        "How strongly contrastive-search avoids repetition.",
        f"{_search['penalty_alpha']}",
    ),
    Option("max_tokens", int, _sampling.max_tokens, "Longest example in tokens."),
    Option("min_tokens", int, _sampling.min_tokens, "Shortest example in tokens."),
    Option("stop", list, None, "A string that ends an example; may be repeated.", "none"),
    Option("stop_token_ids", str, None, "Token ids that end an example, comma-separated.", "none"),
    Option(
        "ignore_eos", bool, _sampling.ignore_eos, "Let examples go on after the end-of-text token."
    ),
    Option("include_stop", bool, _sampling.include_stop, "Keep the stop string in the text."),
    Option(
        "max_attempts",
        int,
        10,
        "Draw an example at most so often if it is rejected or the sampler fails.",
    ),
    Option(
        "until", float, None, "Stop early once less than this share of the 3-grams is new.", "off"
    ),
    Option("until_window", int, Convergence(0.0).window, "Examples over which --until counts."),
    Option("max_num_seqs", int, _machine.max_num_seqs, "Examples that are decoded side by side."),
    Option(
        "max_model_len", int, None, "Longest prompt plus example in tokens.", "the model's context"
    ),
    Option(
        "kv_cache_gib", float, None, "Size of the KV cache in GiB.", "as needed, within free memory"
    ),
    Option("device", str, _machine.device, "Where to run: auto, cpu, cuda or cuda:N."),
    Option("dtype", str, _machine.dtype, "Precision: auto, float32 or bfloat16."),
    Option(
        "weight_dtype",
        str,
        _machine.weight_dtype,
        "How weights are stored: auto (as dtype, without loss) or int8.",
    ),
    Option(
        "backend", str, _machine.backend, "Kernels to use: auto, reference, cpu, triton or cuda."
    ),
    Option("progress", bool, True, "Show a progress bar."),
)
SWEEP_OPTIONS = (
    *(
        replace(o, kind=str, help=f"{o.help} Several values, with commas, make an axis.")
        if o.name in AXES
        else o
        for o in OPTIONS
    ),
    Option(
        "evaluate",
        bool,
        True,
        "Compare the cells once they are written; needs --real or --held-out.",
    ),
    Option(
        "held_out",
        str,
        None,
        "File of real examples to compare with, not used for training.",
        "those of --real",
    ),
    Option("sample_size", int, None, "How many texts of each cell are compared.", "all"),
    Option(
        "embedder",
        str,
        None,
        "Directory of a sentence-transformers model.",
        "the installed all-MiniLM-L6-v2",
    ),
    Option("diversity", str, DIVERSITY, "Metric for diversity in table and figures."),
    Option("likeness", str, LIKENESS, "Metric for likeness to real texts in table and figures."),
)


def read_run_file(path: Path, options: Sequence[Option] = OPTIONS) -> dict[str, Any]:
    """Options from a YAML run file.

    Raises: UsageError for unknown names (with the nearest known one) and wrong types.
    """
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold a mapping of options")
    values, by_name = {}, {option.name: option for option in options}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in by_name:
            raise UsageError(f"{path}: unknown option {key!r}{nearest_hint(name, by_name)}")
        values[name] = _checked(by_name[name], value, path)
    return values


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def _checked(option: Option, value: Any, path: Path) -> Any:
    if value is None:
        return None
    if option.name == "prompts" and isinstance(value, dict):
        return value
    if option.name in (*AXES, "stop_token_ids") and option.kind is str:
        value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if option.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if option.kind is list:
        value = [value] if isinstance(value, str) else value
    is_bool_for_number = isinstance(value, bool) and option.kind is not bool
    if not isinstance(value, option.kind) or is_bool_for_number:
        raise UsageError(
            f"{path}: {option.name} must be of type {option.kind.__name__}, got {value!r}"
        )
    return value


def complete(
    given: dict[str, Any], *fallbacks: dict[str, Any], options: Sequence[Option] = OPTIONS
) -> dict[str, Any]:
    """Every option's value: the command line's, else the first fallback's, else the default.

    given: None, or an empty list, where the command line does not say.
    fallbacks: a run file's values, then a recipe's.
    """
    sources = [{name: value for name, value in given.items() if value != []}, *fallbacks]
    values = {}
    for option in options:
        found = (source[option.name] for source in sources if source.get(option.name) is not None)
        values[option.name] = next(found, option.default)
    return values


def required(values: dict[str, Any], *names: str) -> None:
    """UsageError for the first of the options that is missing, or empty like an unset $NAME."""
    for name in names:
        if values[name] in (None, ""):
            raise UsageError(f"{flag(name)} is required")


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return "--" + name.replace("_", "-")


def build_prompts(values: dict[str, Any]) -> str | dict[str, str]:
    """The prompt, or {label: prompt}; UsageError unless one of --prompt and --prompts is given."""
    if (values["prompt"] is None) == (values["prompts"] is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE, or a --recipe")
    if values["prompt"] is not None:
        return values["prompt"]
    prompts = values["prompts"]
    if isinstance(prompts, str):
        prompts = _read_yaml(Path(prompts))
    is_mapping = isinstance(prompts, dict) and prompts
    if not is_mapping or not all(isinstance(text, str) for text in prompts.values()):
        raise UsageError("--prompts must hold a mapping {label: instruction}")
    return {str(label): text for label, text in prompts.items()}


def build_method(values: dict[str, Any]) -> Method:
    """The decoding method of the options; UsageError where they do not go together."""
    has_domain = values["domain"] is not None
    try:
        name = methods.canonical(values["method"] or ("steer" if has_domain else "none"))
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    given = {p: values[p] for p in PARAMETERS if values[p] is not None and values[p] is not False}
    for parameter in methods.unused_parameters(name, given):
        default_for = "with" if has_domain else "without"
        reason = "" if values["method"] else f", which is the default {default_for} --domain"
        raise UsageError(f"{flag(parameter)} has no meaning with method {name}{reason}")
    if methods.needs_domain(name) and not has_domain:
        raise UsageError(f"method {name} needs --domain beside --base")
    return Method.of(name, **given)


def build_guidance(values: dict[str, Any]) -> Guidance:
    """Guidance of the options."""
    return build_method(values).guidance


def build_negatives(values: dict[str, Any]) -> NegativePrompts:
    """NegativePrompts of the options."""
    num_negatives = values["num_negatives"]
    if num_negatives != AS_MANY_AS_FIT:
        try:
            num_negatives = int(num_negatives)
        except ValueError:
            raise UsageError(
                f"--num-negatives must be an int or max, got {num_negatives!r}"
            ) from None
    return NegativePrompts(
        num_examples=num_negatives,
        template=values["template"],
        separator=values["separator"],
        lag=values["lag"],
        share=values["share"],
        max_tokens=values["negative_max_tokens"],
    )


def build_sampling(values: dict[str, Any]) -> SamplingParams:
    """SamplingParams of the options."""
    ids = values["stop_token_ids"] or ""
    try:
        stop_token_ids = tuple(int(i) for i in ids.split(",") if i.strip())
    except ValueError:
        raise UsageError(f"--stop-token-ids must be ints with commas, got {ids!r}") from None
    names = ("max_tokens", "min_tokens", "ignore_eos", "include_stop")
    return SamplingParams(
        **build_method(values).shape,
        **{name: values[name] for name in names},
        stop=tuple(values["stop"] or ()),
        stop_token_ids=stop_token_ids,
    )


def build_until(values: dict[str, Any]) -> Convergence | None:
    """The convergence rule, or None."""
    if values["until"] is None:
        return None
    return Convergence(values["until"], values["until_window"])


def build_axes(values: dict[str, Any]) -> dict[str, list]:
    """The values of a sweep's axes, as sweep.grid takes them; [] for one that is not swept."""
    axes = {name: [v.strip() for v in (values[name] or "").split(",")] for name in AXES}
    for name in ("gamma", "eta"):
        try:
            axes[name] = [float(v) for v in axes[name] if v]
        except ValueError:
            raise UsageError(
                f"{flag(name)} must be numbers with commas, got {values[name]!r}"
            ) from None
    counts = [v for v in axes["num_negatives"] if v]
    return axes | {"num_negatives": [int(v) if v.isdecimal() else v for v in counts]}
