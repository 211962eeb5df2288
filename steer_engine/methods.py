"""The decoding methods by name: each fills in the guidance and the shape of the distribution.

    method              guidance (domain, base, negative)        tokens
    greedy              (1, 0, 0)                                the most likely one
    temperature         (1, 0, 0)                                drawn at `temperature`
    top_k               (1, 0, 0)                                drawn from the `top_k` likeliest
    nucleus             (1, 0, 0)                                drawn from mass `top_p`
    contrastive_search  (1, 0, 0)                                searched for, nothing is drawn
    contrastive         (1, -gamma, 0)                           as nucleus
    negative            (1, 0, -eta) or (eta, 0, 1 - eta)        as nucleus
    cfg                 (scale, 0, 1 - scale)                    as nucleus
    steer               Guidance.steer(gamma, eta, form)         as nucleus
    none                (1, 0, 0)                                as temperature, top_k, top_p say

`contrastive` is contrastive expert guidance, the paper's first equation alone, and `negative` is
negative prompting, its second alone, in the form that steer has too: as released, and as printed,
where it is cfg(eta), which moves away from the negative prompt only for eta > 1.

Sources: STEER, O'Neill et al. 2023 (arXiv:2308.07645); top-k, Fan et al. 2018 (arXiv:1805.04833);
    nucleus, Holtzman et al. 2020 (arXiv:1904.09751).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import check_number, nearest_hint
from .guidance import Guidance, PassKind
from .negatives import NegativePrompts
from .sampling import ContrastiveSearch, SamplingParams

# What a method says about SamplingParams; its other fields are about length and endings.
SHAPE = ("temperature", "top_p", "top_k")
# The model sees the text of the negative prompt and nothing else.
IN_CONTEXT = Guidance(domain=0.0, base=0.0, negative=1.0)
_OFF = {name: getattr(SamplingParams(), name) for name in SHAPE}


def negative_prompting(eta: float, form: str = "released") -> Guidance:
    """Negative prompting without expert guidance.

    form="released": (1, 0, -eta), the authors' code at gamma = 0.
    form="paper": (eta, 0, 1 - eta), the second equation as printed.
    """
    if form == "paper":
        check_number("eta", eta)
        return Guidance.cfg(eta)
    return Guidance.steer(0.0, eta, form=form)


@dataclass(frozen=True)
class _Rule:
    """What a method's name stands for.

    parameters: what may be given, with the defaults.
    guide: Guidance of the parameters that it takes.
    fixed: fields of SamplingParams that are not for the caller to choose.
    needs_domain: whether it compares a domain model with its base.
    searches: whether its parameters are those of ContrastiveSearch.
    """

    parameters: dict[str, Any]
    guide: Callable[..., Guidance] = Guidance.none
    fixed: dict[str, Any] = field(default_factory=dict)
    needs_domain: bool = False
    searches: bool = False


_ONE_PASS = {"in_context": False}
_SAMPLED = {"temperature": 1.0, "top_p": 0.9, "top_k": 0}
_GUIDED = {"alpha": 0.0, "normalize": False, **_SAMPLED}
_RULES = {
    "greedy": _Rule(_ONE_PASS, fixed={"temperature": 0.0}),
    "temperature": _Rule({"temperature": 1.0, **_ONE_PASS}),
    "top_k": _Rule({"top_k": 50, "temperature": 1.0, **_ONE_PASS}),
    "nucleus": _Rule({"top_p": 0.9, "temperature": 1.0, **_ONE_PASS}),
    "contrastive_search": _Rule({**asdict(ContrastiveSearch()), **_ONE_PASS}, searches=True),
    "contrastive": _Rule({"gamma": 0.2, **_GUIDED}, Guidance.contrastive, needs_domain=True),
    "negative": _Rule({"eta": 0.2, "form": "released", **_GUIDED}, negative_prompting),
    "cfg": _Rule({"scale": 1.5, **_GUIDED}, Guidance.cfg),
    "steer": _Rule(
        {"gamma": 0.2, "eta": 0.2, "form": "released", **_GUIDED},
        Guidance.steer,
        needs_domain=True,
    ),
    "none": _Rule({**_GUIDED, **_ONE_PASS}),
}
METHODS = tuple(_RULES)
PARAMETERS = tuple(dict.fromkeys(name for rule in _RULES.values() for name in rule.parameters))


@dataclass(frozen=True)
class Method:
    """A decoding method with its parameters; made by `Method.of`.

    Attributes:
        name: one of METHODS.
        guidance: how the passes are combined.
        temperature, top_p, top_k: as in SamplingParams.
        search: of method contrastive_search, whose tokens are not drawn.
    """

    name: str
    guidance: Guidance
    temperature: float
    top_p: float
    top_k: int
    search: ContrastiveSearch | None = None

    @classmethod
    def of(cls, name: str, **parameters) -> Method:
        """A method by name; hyphens and underscores are the same.

        parameters: of gamma, eta, form, scale, alpha, normalize, temperature, top_p, top_k,
            penalty_alpha those that the method takes (see `defaults`); and in_context, for methods
            of one pass: the model continues the text of the negative prompt, examples and prompt,
            in place of the prompt alone.
        Raises: ValueError for an unknown method (with the nearest one), a parameter that has no
            meaning with it, and a value out of range.
        """
        name = canonical(name)
        for parameter in unused_parameters(name, parameters):
            raise ValueError(f"{parameter} has no meaning with method {name}")
        rule = _RULES[name]
        values = rule.parameters | parameters | rule.fixed
        if name == "top_k":
            check_number("top_k", values["top_k"], low=1, is_int=True)
        search = None
        if rule.searches:
            search = ContrastiveSearch(values.pop("top_k"), values.pop("penalty_alpha"))
        shape = _OFF | {key: values[key] for key in SHAPE if key in values}
        SamplingParams(**shape)  # refuses what is out of range
        return cls(name, _guidance(rule, values), **shape, search=search)

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of SamplingParams that the method decides."""
        return {name: getattr(self, name) for name in SHAPE}

    def describe(self) -> str:
        """One line for people: the guidance, and the search if there is one."""
        shown = self.guidance.describe()
        if self.search is None:
            return shown
        return (
            f"{shown}; contrastive search, top_k {self.search.top_k}, "
            f"penalty_alpha {self.search.penalty_alpha:g}"
        )

    @property
    def is_deterministic(self) -> bool:
        """Whether the same prompts give the same text, whatever the seed."""
        return self.search is not None or self.temperature == 0 or self.top_k == 1

    def check_passes(self, *, has_negative_prompts: bool) -> None:
        """Raise ValueError if negative prompts are given and no pass reads them."""
        if has_negative_prompts and PassKind.NEGATIVE not in self.guidance.passes:
            raise ValueError(f"negative_prompts has no meaning with method {self.name}")

    def check_data_set(
        self,
        num_examples: int,
        prompts: dict[str, str],
        real: str | Path | Sequence[str] | None,
        negatives: NegativePrompts,
    ) -> None:
        """Raise ValueError if a data set would hold one text many times; see generate_dataset."""
        num_prompts = len(prompts)
        if not self.is_deterministic or num_examples <= num_prompts:
            return
        if PassKind.NEGATIVE not in self.guidance.passes:
            raise ValueError(
                f"method {self.name} writes one text per prompt, so {num_examples} examples of "
                f"{num_prompts} prompt{'s' * (num_prompts != 1)} would repeat: give each its own "
                "prompt, or put real examples in front of it (in_context)"
            )
        if real is None or negatives.num_examples == 0 or negatives.share > 1:
            raise ValueError(
                f"method {self.name} writes one text for each set of examples in front of the "
                "prompt, so it needs real examples, at least one of them in front, and share 1"
            )


def canonical(name: str) -> str:
    """The method's name with underscores. Raises: ValueError if there is none, with the nearest."""
    known = str(name).replace("-", "_")
    if known not in _RULES:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {name!r}"
            f"{nearest_hint(known, METHODS)}"
        )
    return known


def defaults(name: str) -> dict[str, Any]:
    """The parameters that a method takes, with their defaults."""
    return dict(_RULES[canonical(name)].parameters)


def unused_parameters(name: str, given: dict[str, Any]) -> list[str]:
    """Those of the given parameters that have no meaning with a method."""
    rule = _RULES[canonical(name)]
    return [
        parameter
        for parameter, value in given.items()
        if parameter not in rule.parameters
        # Greedy decoding at temperature 0 says the same thing twice.
        and not (parameter in rule.fixed and rule.fixed[parameter] == value)
    ]


def needs_domain(name: str) -> bool:
    """Whether a method compares a domain model with its base."""
    return _RULES[canonical(name)].needs_domain


def resolve(
    method: str | Method, guidance: Guidance | None, sampling: SamplingParams | None
) -> tuple[Method, SamplingParams]:
    """The method and the sampling that a call asks for.

    With a name, what `sampling` changes of temperature, top_p and top_k are the method's
    parameters; what it leaves at the defaults of SamplingParams, the method fills in.
    Raises: ValueError if guidance is given too, or sampling and the method disagree.
    """
    if guidance is not None:
        raise ValueError(
            "give method or guidance, not both: a method sets the guidance "
            "(Method.of('steer', gamma=0.4) sets its parameters)"
        )
    sampling = sampling or SamplingParams()
    given = {
        name: getattr(sampling, name) for name in SHAPE if getattr(sampling, name) != _OFF[name]
    }
    if isinstance(method, Method):
        own = method.shape | ({"top_k": method.search.top_k} if method.search else {})
        for name, value in given.items():
            if value != own[name]:
                raise ValueError(
                    f"sampling has {name} {value:g}, method {method.name} {own[name]:g}"
                )
    else:
        method = Method.of(method, **given)
    return method, replace(sampling, **method.shape)


def _guidance(rule: _Rule, values: dict[str, Any]) -> Guidance:
    if values.get("in_context"):
        if values.get("alpha"):
            raise ValueError("alpha compares with the prompt alone; leave out in_context or alpha")
        return IN_CONTEXT
    taken = ("gamma", "eta", "form", "scale")
    named = {name: values[name] for name in taken if name in values}
    guidance = replace(rule.guide(**named), alpha=values.get("alpha", 0.0))
    return guidance.normalized() if values.get("normalize") else guidance
