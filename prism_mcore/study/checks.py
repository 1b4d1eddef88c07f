"""Does a study hang together? Pure: it reads no recipe and no folder."""

import difflib
import re
from collections.abc import Collection, Iterator

from prism_mcore.config import Findings
from prism_mcore.study.settings import MODEL, Arm, Claims, StudyProgram

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*(\.[A-Za-z0-9_+-]+)*")  # file, task and job names are made of them


def check(study: StudyProgram) -> list[str]:
    """Notes; raises SettingsError with all problems: names that nothing has, arms that start from each other."""
    found = Findings()
    for kind, names in (
        ("prepare", study.prepare),
        ("models", study.models),
        ("arms", study.arms),
        ("evaluate", study.evaluate),
        ("analyze", study.analyze),
    ):
        for name in names:
            if not NAME.fullmatch(name) or name == MODEL:
                found.problems.append(f"{kind}.{name}: no name; needed: letters, digits, . _ + -, and not `{MODEL}`")
    if not NAME.fullmatch(study.study.name):
        found.problems.append(f"study.name={study.study.name!r}: no name; needed: letters, digits, . _ + -")
    if not study.models or not study.arms:
        found.problems.append("models and arms are what a study is made of; give at least one of each")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds) or min(study.seeds) < 0:
        found.problems.append(f"seeds={study.seeds}: needed: at least one, none twice, none below 0")
    for name, arm in study.arms.items():
        found.problems += _arm_problems(name, arm, study)
    for kind, entries in (("evaluate", study.evaluate), ("analyze", study.analyze)):
        for name, entry in entries.items():
            for arm_name in entry.of:
                found.problems += _unknown(f"{kind}.{name}.of", arm_name, [MODEL, *study.arms])
    for key, name in named_arms(study.claims):
        found.problems += _unknown(f"claims.{key}", name, study.arms)
    for name in study.claims.changes.values() if study.claims else ():
        found.problems += _unknown("claims.changes", name, study.analyze)
    if not found.problems:
        found.problems += _circles(study) or list(_missing_starts(study))
    return found.conclude()


def named_arms(claims: Claims | None) -> Iterator[tuple[str, str]]:
    """(setting, arm) of all arms that claims name."""
    if claims is not None:
        for key in ("base", "general", "with_science", "without_science", "with_science_rl"):
            if value := getattr(claims, key):
                yield key, value
        yield from (("midtrained", name) for name in claims.midtrained)
        yield from (("rl", name) for pair in claims.rl.items() for name in pair)


def starts(arm: Arm) -> list[str]:
    """What an arm's weights come from."""
    return list(arm.merge) if arm.program == "merge" else [arm.start]


def models_of(arm: Arm, study: StudyProgram) -> list[str]:
    return arm.models or list(study.models)


def seeds_of(arm: Arm, study: StudyProgram) -> list[int]:
    return arm.seeds or study.seeds


def _arm_problems(name: str, arm: Arm, study: StudyProgram) -> Iterator[str]:
    place = f"arms.{name}"
    fitting = {"midtrain": "mixture", "rl": "rl_mix", "merge": "merge"}[arm.program]
    for key, entries in (("mixture", study.mixtures), ("rl_mix", study.rl_mixes)):
        if value := getattr(arm, key):
            yield from _unknown(f"{place}.{key}", value, entries)
    for key in ("mixture", "rl_mix", "merge"):
        if getattr(arm, key) and key != fitting:
            yield f"{place}.{key} is not read by program {arm.program}, which reads {fitting}; leave it out"
    if arm.program == "merge" and len(arm.merge) < 2:
        yield f"{place}.merge={arm.merge}: needed: two arms with a weight each, such as {{{MODEL}: 0.15, mc: 0.85}}"
    for start in starts(arm):
        yield from _unknown(f"{place}.{'merge' if arm.program == 'merge' else 'from'}", start, [MODEL, *study.arms])
    for model in arm.models:
        yield from _unknown(f"{place}.models", model, study.models)
    for seed in arm.seeds:
        if seed not in study.seeds:
            yield f"{place}.seeds: {seed} is not among seeds {study.seeds}"


def _unknown(place: str, value: str, known: Collection[str]) -> Iterator[str]:
    if value not in known:
        nearest = difflib.get_close_matches(value, list(known), n=1, cutoff=0.0)
        yield f"{place}={value}: there is none of that name" + (f"; nearest: {nearest[0]}" if nearest else "")


def _circles(study: StudyProgram) -> list[str]:
    """Arms that start from each other, however far around."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> list[str]:
        if name in path:
            return [f"arms start from each other: {' -> '.join([*path[path.index(name) :], name])}"]
        if name in done or name == MODEL:
            return []
        problems = [line for start in starts(study.arms[name]) for line in visit(start, (*path, name))]
        done.add(name)
        return problems

    return [line for name in study.arms for line in visit(name, ())]


def _missing_starts(study: StudyProgram) -> Iterator[str]:
    """Arms that are run of a model or with a seed that what they start from is not."""
    for name, arm in study.arms.items():
        for start in starts(arm):
            if start == MODEL:
                continue
            models = set(models_of(arm, study)) - set(models_of(study.arms[start], study))
            seeds = set(seeds_of(arm, study)) - set(seeds_of(study.arms[start], study))
            if models or seeds:
                missing = ", ".join([*sorted(models), *(f"seed {seed}" for seed in sorted(seeds))])
                yield f"arms.{name} starts from {start}, which is not run of {missing}; add it there"
