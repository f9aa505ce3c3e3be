"""Rules by pattern: which groups a user binds to a form (``--rule 'lm_head: keep'``)."""

from __future__ import annotations

import fnmatch

from pydantic import BaseModel, ConfigDict

from slimwright.errors import InputError, did_you_mean
from slimwright.model.structure import Structure
from slimwright.plan import KEEP, cannot_hold
from slimwright.weights import parse_form


class Rule(BaseModel):
    """``PATTERN: CHOICE``: binds the groups that the pattern names to ``keep`` or to a form."""

    model_config = ConfigDict(frozen=True)
    pattern: str
    choice: str

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``'lm_head: keep'``, ``'*.down_proj: int8:g64'`` or ``'mlp: lowrank:r64'``.

        Raises:
            InputError: not of that form, or an unknown grid.
        """
        pattern, colon, choice = text.partition(":")
        pattern, choice = pattern.strip(), choice.strip().lower()
        if not colon or not pattern or not choice:
            raise InputError(f"The rule '{text}' is not of the form 'PATTERN: keep' or 'PATTERN: GRID'.")
        if choice != KEEP:
            parse_form(choice)
        return cls(pattern=pattern, choice=choice)

    def matches(self, name: str, role: str) -> bool:
        """Whether the pattern names a weight: its disk name, with or without ``.weight``, its role, or a dotted tail,
        head or middle of its name (``lm_head``, ``layers.3.mlp``); ``*`` and ``?`` are wildcards."""
        base = name.removesuffix(".weight")
        forms = (self.pattern, f"*.{self.pattern}", f"{self.pattern}.*", f"*.{self.pattern}.*")
        return (
            fnmatch.fnmatchcase(name, self.pattern)
            or role == self.pattern
            or any(fnmatch.fnmatchcase(base, form) for form in forms)
        )

    @property
    def specificity(self) -> tuple[int, int]:
        """Most letters that are not wildcards win; then fewest wildcards."""
        wild = sum(self.pattern.count(mark) for mark in "*?[")
        return len(self.pattern) - wild, -wild


def bind(rules: list[Rule], structure: Structure) -> dict[str, str]:
    """Choice of every group that a rule binds; the most specific wins, among equals the last.

    Raises:
        InputError: a rule names no weight; two sites of one group are bound to different choices (they cannot differ,
            because runtimes fuse them); a grid cannot hold a weight.
    """
    bound: dict[str, str] = {}
    used: set[int] = set()
    tied: dict[str, list[str]] = {}
    for alias, owner in structure.ties.items():
        tied.setdefault(owner, []).append(alias)
    for group, sites in structure.choice_groups().items():
        chosen: dict[str, str] = {}
        for site in sites:
            names = [(site.name, site.role), *((alias, "head") for alias in tied.get(site.name, []))]
            candidates = [
                (rule.specificity, index)
                for index, rule in enumerate(rules)
                if any(rule.matches(name, role) for name, role in names)
            ]
            used.update(index for _, index in candidates)
            if candidates:
                rule = rules[max(candidates)[1]]
                chosen[site.name] = rule.choice
                reason = None if rule.choice == KEEP else cannot_hold(parse_form(rule.choice), site)
                if reason:
                    raise InputError(
                        f"The rule '{rule.pattern}: {rule.choice}' cannot hold for '{site.name}': {reason}."
                    )
        if not chosen:
            continue
        choices = sorted(set(chosen.values()))
        if len(choices) > 1:
            raise InputError(
                f"The rules give {' and '.join(choices)} to weights of '{group}', which runtimes fuse: bind all alike."
            )
        other = next((site.name for site in sites if site.name not in chosen), None)
        if other is not None:
            raise InputError(
                f"A rule binds '{next(iter(chosen))}' but not '{other}', which runtimes fuse with it: bind both alike."
            )
        bound[group] = choices[0]
    for index, rule in enumerate(rules):
        if index not in used:
            every = [site.name for site in structure.sites.values()] + list(structure.ties)
            bases = sorted({name.removesuffix(".weight") for name in every})
            bases += [base.rsplit(".", 1)[-1] for base in bases]
            hint = did_you_mean(rule.pattern, bases, 0.4, otherwise="; `slimwright inspect` lists the names.")
            raise InputError(f"The rule '{rule.pattern}: {rule.choice}' names no weight of this model{hint}")
    return bound
