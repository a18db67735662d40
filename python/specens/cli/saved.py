# SPDX-License-Identifier: Apache-2.0
"""What `specens tune --output` has written, as `specens generate --config` reads it: every value is
of the type and size that `tune` writes, or the file is refused with the first that is not.

The file has more, for people. To read one more value, add a field to `Saved` and its check.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from specens.cli.checks import SCOPES, AskedLaw
from specens.cli.options import MAX_THREADS
from specens.loop.profile import Candidate
from specens.schedules import read_schedule
from specens_kernels import ENSEMBLES, Acceptance, Refusal

_MOST_MODELS = 64


@dataclass(frozen=True)
class Saved:
    """The values that decide how is decoded.

    models, drafts: names. law: options of the decoder. threads: None is torch's choice.
    best: the candidate to decode with; its drafts are places in `drafts`.
    """

    models: list[str]
    drafts: list[str]
    law: dict[str, Any]
    threads: int | None
    best: Candidate

    @classmethod
    def read(cls, path: Path) -> "Saved":
        """Read and check a file.

        Raises:
            Refusal: it cannot be read, or is not what `tune` writes.
        """
        try:
            saved = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
            return cls._of(_object("all", saved))
        except OSError as error:
            why = error.strerror or type(error).__name__
        except RecursionError:
            why = "JSON that is too deep"
        except Refusal as refusal:
            why = f"{refusal.argument}: expected {refusal.expected}, got {refusal.got}"
        except ValueError as error:
            why = str(error)
        expected = "a file that `specens tune --output` wrote"
        raise Refusal("generate", "config", expected, f"{str(path)!r} ({why})")

    @classmethod
    def _of(cls, saved: Mapping[str, Any]) -> "Saved":
        models = _names("models", _value(saved, "models"), least=1)
        drafts = _names("drafts", _value(saved, "drafts"))
        threads = _value(saved, "threads")
        if threads is not None:
            threads = _count("threads", threads, 1, MAX_THREADS)
        law = _law(_object("law", _value(saved, "law")), models)
        best = _candidate(_object("best", _value(saved, "best")), len(drafts))
        return cls(models, drafts, law, threads, best)


def _law(law: Mapping[str, Any], models: list[str]) -> dict[str, Any]:
    checks: Mapping[str, Callable[[str, Any], Any]] = {
        "weights": _weights,
        "ensemble": lambda name, value: _one_of(name, value, ENSEMBLES),
        "scope": lambda name, value: _one_of(name, value, SCOPES),
        "plausibility": _number,
    }
    for name in law:
        _one_of("law", name, checks)
    read = {name: checks[name](f"law.{name}", value) for name, value in law.items()}
    AskedLaw(models, **read)
    return read


def _candidate(best: Mapping[str, Any], num_drafts: int) -> Candidate:
    checks: Mapping[str, Callable[[str, Any], Any]] = {
        "name": _text,
        "schedule": lambda name, value: read_schedule(_text(name, value)),
        "seconds": _number,
        "drafts": lambda name, value: _places(name, value, num_drafts),
        "acceptance": lambda name, value: str(_rule(_text(name, value))),
        "law": _text,
        "divergence": _number,
    }
    for name in best:
        _one_of("best", name, checks)
    for name in ("name", "schedule", "seconds"):
        _value(best, name, "best.")
    return Candidate(**{name: checks[name](f"best.{name}", each) for name, each in best.items()})


def _rule(text: str) -> str:
    Acceptance.parse(text)
    return text


def _value(saved: Mapping[str, Any], name: str, prefix: str = "") -> Any:
    if name not in saved:
        raise Refusal("config", f"{prefix}{name}", "a value", "none")
    return saved[name]


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        _refuse(name, "an object", value)
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _refuse(name, "text", value)
    return value


def _one_of(name: str, value: Any, known: Any) -> str:
    if not isinstance(value, str) or value not in known:
        _refuse(name, f"one of {', '.join(known)}", value)
    return value


def _names(name: str, value: Any, least: int = 0) -> list[str]:
    texts = isinstance(value, list) and all(isinstance(each, str) and each for each in value)
    if not texts or not least <= len(value) <= _MOST_MODELS:
        _refuse(name, f"a list of {least} to {_MOST_MODELS} names", value)
    return list(value)


def _count(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        _refuse(name, f"a count in [{least}, {most}]", value)
    return value


def _real(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer may be beyond every float.
    if not number or not abs(value) < 2**53:
        _refuse(name, "a finite number", value)
    return float(value)


def _number(name: str, value: Any) -> float:
    if _real(name, value) < 0:
        _refuse(name, "a number >= 0", value)
    return float(value)


def _weights(name: str, value: Any) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        _refuse(name, "a list of numbers", value)
    return [_real(name, each) for each in value]


def _places(name: str, value: Any, count: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        _refuse(name, "a list of places", value)
    places = tuple(_count(name, each, 0, count - 1) for each in value)
    if len({*places}) != len(places):
        _refuse(name, "each place once", value)
    return places


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _refuse(name: str, expected: str, got: Any) -> NoReturn:
    text = repr(got)
    raise Refusal("config", name, expected, text if len(text) <= 60 else f"{text[:57]}...")
