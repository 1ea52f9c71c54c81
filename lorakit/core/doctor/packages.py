"""Python and the packages that lorakit needs, by the requirements that it was installed with. No torch."""

import importlib.metadata
import platform
import re
import shlex
import shutil
import struct
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NamedTuple

import lorakit
from lorakit.core.doctor.finding import Finding, Need, fail, ok, pip_install, pip_uninstall, skip, together, warn
from lorakit.core.environment import patched_transformers


class Required(NamedTuple):
    """What lorakit asks for: `requirements` are packaging's Requirement objects."""

    python: str
    requirements: list[Any]


def required() -> Required:
    """lorakit's own requirements: of the installed distribution, or of the checkout that is run. Raises
    PackageNotFoundError where it is neither."""
    from packaging.requirements import Requirement

    checkout = Path(lorakit.__file__).parents[1] / "pyproject.toml"
    content = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"] if checkout.is_file() else {}
    if content.get("name") == "lorakit":
        python, lines = content["requires-python"], content["dependencies"]
    else:
        found = importlib.metadata.distribution("lorakit")
        python, lines = found.metadata["Requires-Python"], found.requires or []
    parsed = [Requirement(line) for line in lines]
    return Required(python, [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})])


def python(need: Need) -> Finding:
    """The interpreter and whether `pip` belongs to it."""
    here = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {sys.executable}"
    if struct.calcsize("P") < 8:
        return fail(f"found {here}, of 32 bits; need 64", "torch has no such wheels", "install a 64-bit Python")
    try:
        from packaging.specifiers import SpecifierSet

        wanted = required().python
        if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
            return fail(f"found {here}, need {wanted}", "lorakit is written for it", "install a newer Python")
    except (ImportError, PackageNotFoundError):
        pass  # `packages` says so
    pip, where = shutil.which("pip"), Path(sys.executable).parent
    if pip and Path(pip).parent.resolve() != where.resolve() and _interpreter_of(Path(pip)) not in (None, str(where)):
        return warn(
            f"found that `pip` is {pip}, of another Python than {sys.executable}; need the same",
            "what that pip installs isn't seen here",
            f"use `{shlex.quote(sys.executable)} -m pip` instead of `pip`",
        )
    return ok(here)


def _interpreter_of(script: Path) -> str | None:
    """The folder of the interpreter in a script's first line; None where it names none of its own."""
    try:
        with script.open("rb") as file:
            first = file.readline(4096).decode(errors="replace")
    except OSError:
        return None
    found = re.match(r"#!\s*(/\S*)/python[\d.]*\s*$", first)
    return found[1] if found else None


def packages(need: Need) -> Finding:
    """Each package that lorakit asks for: there, and in its range."""
    try:
        wanted = required().requirements
    except ImportError:
        return _missing(["packaging>=24"])
    except PackageNotFoundError:
        return skip("lorakit isn't installed as a package, so its requirements aren't known", pip_install("lorakit"))
    missing, outside, fine = [], [], []
    for one in wanted:
        version = version_of(one.name)
        if version is None:
            missing.append(str(one))
        elif not one.specifier.contains(version, prereleases=True):
            outside.append((version, one))
        else:
            fine.append(f"{one.name} {version}")
    found = [_missing(missing)] if missing else []
    if outside:
        listed = ", ".join(f"{one.name} {version}" for version, one in outside)
        asked = ", ".join(str(one) for _, one in outside)
        why = "other versions have other interfaces, or known holes"
        found.append(fail(f"found {listed}; need {asked}", why, pip_install(*(str(one) for _, one in outside))))
    return together(found) if found else ok(", ".join(fine))


def version_of(name: str) -> str | None:
    """The installed version of a package; None where there is none, or what is left of one that was removed."""
    try:
        return importlib.metadata.version(name) or None
    except (PackageNotFoundError, KeyError):
        return None


def _missing(names: list[str]) -> Finding:
    what = "package" if len(names) == 1 else "packages"
    return fail(f"found no {what} {', '.join(names)}; need it", "lorakit can't do without", pip_install(*names))


def conflicts(need: Need) -> Finding:
    """What the packages that lorakit needs ask of each other, and the dead package that lies over bitsandbytes."""
    if (dead := version_of("bitsandbytes-windows")) is not None:
        return fail(
            f"found bitsandbytes-windows {dead}, a dead package whose files lie over those of bitsandbytes; "
            "need bitsandbytes alone",
            "it is of 2023 and holds no kernel for today's torch",
            f"{pip_uninstall('bitsandbytes-windows', 'bitsandbytes')} && {pip_install('bitsandbytes>=0.49')}",
        )
    try:
        asked, found = list(_asked_of_each_other()), []
        for name, requirement in asked:
            version = version_of(requirement.name)
            fix = pip_install(str(requirement).partition(";")[0].strip())
            if version is None:
                found.append(fail(f"found no {requirement.name}; {name} needs it", f"{name} can't be imported", fix))
            elif not requirement.specifier.contains(version, prereleases=True):
                wants = f"found {requirement.name} {version}; {name} needs {requirement.name}{requirement.specifier}"
                found.append(warn(wants, f"{name} may fail with it", fix))
    except (ImportError, PackageNotFoundError):
        return skip("the requirements of lorakit aren't known; see packages")
    return together(found) if found else ok(f"{len(asked)} requirements of packages that lorakit needs are met")


def _asked_of_each_other() -> Iterator[tuple[str, Any]]:
    """What every package below lorakit asks for, breadth first: (who asks, its requirement)."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    waiting = [(one.name, tuple(one.extras)) for one in required().requirements]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        name, extras = waiting.pop(0)
        if (canonicalize_name(name), extras) in seen:
            continue
        seen.add((canonicalize_name(name), extras))
        try:
            lines = importlib.metadata.requires(name) or []
        except PackageNotFoundError:
            continue
        for line in lines:
            try:
                one = Requirement(line)
            except InvalidRequirement:
                continue
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                yield name, one
                waiting.append((one.name, tuple(sorted(one.extras))))


def transformers(need: Need) -> Finding:
    """Whether the Llama source of transformers is the one that was installed."""
    version = version_of("transformers")
    if version is None:
        return skip("transformers isn't installed; see packages")
    if patched := patched_transformers():
        detail, _, fix = patched.partition(". To undo it: ")
        return warn(f"found that {detail}", "models are trained by code that nobody tested", fix)
    return ok(f"{version}, its Llama as it was installed")
