"""Functions and what they do, as rows in the formats that TRL's trainers take.

Source: the types and columns of https://huggingface.co/docs/trl/dataset_formats, by the names that
TRL's own tests give them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.testing.corpus import Function

Kind: TypeAlias = Literal[
    "standard_language_modeling",
    "standard_prompt_only",
    "standard_prompt_completion",
    "standard_preference",
    "standard_unpaired_preference",
    "conversational_language_modeling",
    "conversational_prompt_only",
    "conversational_prompt_completion",
    "conversational_preference",
    "conversational_unpaired_preference",
]

Row: TypeAlias = dict[str, Any]


def rows(kind: Kind, functions: Sequence[Function]) -> list[Row]:
    """One row for each function; what is rejected is what the next one does.

    Args:
        kind: the format and the type.
        functions: two at least, no two of which do the same.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"there is no data set {safe(repr(kind))}; there are {_listed()}")
    form, _, sort = kind.partition("_")
    others = [*functions[1:], functions[0]]
    made = []
    for number, (function, other) in enumerate(zip(functions, others, strict=True)):
        right, wrong = _completion(form, function), _completion(form, other)
        made.append(_row(sort, _prompt(form, function), right, wrong, fits=number % 2 == 0))
    return made


def _row(sort: str, prompt: Any, right: Any, wrong: Any, *, fits: bool) -> Row:
    match sort:
        case "language_modeling":
            return {"text" if isinstance(prompt, str) else "messages": prompt + right}
        case "prompt_only":
            return {"prompt": prompt}
        case "prompt_completion":
            return {"prompt": prompt, "completion": right}
        case "preference":
            return {"prompt": prompt, "chosen": right, "rejected": wrong}
        case _:
            return {"prompt": prompt, "completion": right if fits else wrong, "label": fits}


def _prompt(form: str, function: Function) -> str | list[Row]:
    if form == "standard":
        # Ends in a token of its own: prompt and completion are cut up alike apart and together.
        return f'def {function.signature}:\n    """'
    return [{"role": "user", "content": f"What does {function.name} do?"}]


def _completion(form: str, function: Function) -> str | list[Row]:
    if form == "standard":
        return f'{function.sentence}"""\n'
    return [{"role": "assistant", "content": function.sentence}]


def _listed() -> str:
    return ", ".join(get_args(Kind))
