"""From plain options to the settings of methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from whence.cli.options import Values, error, given

TYPED = ("draws", "noise", "dim", "damping", "output", "parameters", "ensemble")  # settings with an option of their own


def settings_per_method(
    methods: Sequence[str], options: Values, pairs: Sequence[str], seed: int, lora: bool = False
) -> dict[str, Values]:
    """The settings of each method; one that no method has is an error.

    Args:
        methods: names of methods.
        options: values of options that are settings, by name; what is not given is left out.
        pairs: "name=value" of --set.
        seed: of the draws.
        lora: whether the model is a LoRA on a base.
    """
    from whence.methods import entry, settings_for

    settings = {name: value for name, value in options.items() if given(value)} | pairs_of(pairs)
    if settings.get("parameters") in ("trained", *(("lora",) * lora)) and all(entry(name).retrains for name in methods):
        del settings["parameters"]  # these ask about all that the training changes, which is what was said
    _check(settings, methods)
    return {name: settings_for(name, settings, seed) for name in methods}


def pairs_of(pairs: Sequence[str], typed: Sequence[str] = TYPED) -> dict[str, object]:
    """The values of --set name=value, as JSON reads them, texts where it does not.

    Args:
        pairs: as they were given.
        typed: settings with an option of their own.
    """
    found: dict[str, object] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise error(f"--set {pair!r}", accepted="name=value, like count=8")
        if name in typed:
            raise error(f"--set {pair!r}: {name} has an option of its own", accepted=f"--{name}")
        try:
            read = json.loads(value)
            found[name] = tuple(read) if isinstance(read, list) else read
        except json.JSONDecodeError:
            found[name] = value
    return found


def _check(settings: Mapping[str, object], methods: Sequence[str]) -> None:
    """Each setting is known to at least one method and is of the kind it takes."""
    from whence.methods import entry, takes, unfit

    for name, value in settings.items():
        having = [method for method in methods if name in takes(method)]
        if not having:
            taken = "; ".join(f"{method} takes {', '.join(takes(method)) or 'none'}" for method in methods)
            raise error(f"no setting {name!r}: {taken}")
        for method in having if name not in TYPED else ():
            if accepted := unfit(entry(method).make, name, value):
                raise error(f"--set {name}={value}", accepted=accepted)
