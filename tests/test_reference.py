"""The reference in docs/reference/ has every public name, made from its docstring, and nothing public lacks one."""

import inspect
import re

import pytest
import yaml

import latentmem
from pages import PAGES, ROOT

IDENTIFIERS = {
    identifier: page
    for page in PAGES
    for identifier in re.findall(r"^::: (\S+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
}


def test_every_public_name_is_in_the_reference_and_no_other():
    assert sorted(identifier.rpartition(".")[2] for identifier in IDENTIFIERS) == sorted(latentmem.__all__)


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_the_reference_shows_the_name_and_not_the_module_of_that_name(identifier):
    assert IDENTIFIERS[identifier].startswith("docs/reference/")
    path = ROOT / "src" / identifier.replace(".", "/")
    assert not path.is_dir(), f"write {identifier}.{path.name}"
    assert not path.with_suffix(".py").exists(), f"write {identifier}.{path.name}"


@pytest.mark.parametrize("name", latentmem.__all__)
def test_every_public_name_and_its_public_methods_have_docstrings(name):
    value = getattr(latentmem, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return  # another name for a type; its text stands below it in the source, where the reference finds it
    assert value.__doc__, name
    if not inspect.isclass(value):
        return
    for attribute, member in inspect.getmembers_static(value):
        if attribute.startswith("_") or not _is_ours(value, attribute):
            continue
        member = getattr(member, "__func__", member)  # of a class or static method
        if inspect.isfunction(member) or isinstance(member, property):
            assert member.__doc__, f"{name}.{attribute}"


def _is_ours(owner, attribute):
    homes = [base.__module__ for base in owner.__mro__ if attribute in vars(base)]
    return homes[0].startswith("latentmem")


def test_every_page_is_in_the_nav():
    def files(entries):
        for entry in entries:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from files(value) if isinstance(value, list) else [value]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(files(nav)) == sorted(page.removeprefix("docs/") for page in PAGES if page.startswith("docs/"))
