"""The table of error codes is that of the source: what is raised is listed, and what is listed is raised."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.errors import COMMAND_LINE, FAILURES, REFUSALS, as_html
from api.problems import CODE_OF_STATUS

ROOT = Path(__file__).parents[2]

CODE_AT = {"NotFound": 0, "Conflict": 0, "Invalid": 0, "BadImages": 0, "Refused": 1, "problem": 2}
"""Which argument of what makes a refusal is its code."""

STATUS_OF = {"NotFound": 404, "Conflict": 409, "Invalid": 422, "BadImages": 422, "OverQuota": 403, "QueueFull": 429}
FAILURE_AT = {"JobError": 0, "TrainingError": 0}


class Module:
    """A file of the source, and what it makes of codes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text())

    def calls(self) -> Iterator[tuple[str, ast.Call, ast.AST]]:
        """Calls by name, each with the function or class that it is in."""
        yield from self._calls(self.tree, self.tree)

    def _calls(self, node: ast.AST, scope: ast.AST) -> Iterator[tuple[str, ast.Call, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name):
                yield child.func.id, child, scope
            is_scope = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from self._calls(child, child if is_scope else scope)

    def codes(self, node: ast.expr, scope: ast.AST) -> set[str]:
        """The codes that an expression may be; none where it hands on another error's."""
        match node:
            case ast.Constant(value=str(code)):
                return {code}
            case ast.IfExp(body=body, orelse=orelse):
                return self.codes(body, scope) | self.codes(orelse, scope)
            case ast.BoolOp(values=values):
                return set().union(*(self.codes(value, scope) for value in values))
            case ast.Attribute(attr="code"):
                return set()
            case ast.Call(func=ast.Attribute(value=ast.Name(id="CODE_OF_STATUS"), attr="get"), args=[_, default]):
                return set(CODE_OF_STATUS.values()) | self.codes(default, scope)
            case ast.Name(id=name):
                values = [
                    each.value
                    for each in ast.walk(scope)
                    if isinstance(each, ast.Assign)
                    and any(isinstance(t, ast.Name) and t.id == name for t in each.targets)
                ]
                assert values, f"{self.path}:{node.lineno}: where does {name} come from?"
                return set().union(*(self.codes(value, scope) for value in values))
        raise AssertionError(f"{self.path}:{node.lineno}: which codes can {ast.unparse(node)} be?")


def modules() -> Iterator[Module]:
    for room in ("api", "worker", "flowpp"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield Module(path)


def argument(call: ast.Call, index: int) -> ast.expr:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
    return named[0] if named else call.args[index]


def refusals() -> set[tuple[str, int | None]]:
    """Codes with their status, where the source says it there."""
    found: set[tuple[str, int | None]] = set()
    for module in modules():
        for name, call, scope in module.calls():
            if name not in CODE_AT:
                continue
            status: int | None = STATUS_OF.get(name)
            if name not in STATUS_OF:
                given = call.args[CODE_AT[name] - 1]
                status = given.value if isinstance(given, ast.Constant) else None
            found |= {(code, status) for code in module.codes(argument(call, CODE_AT[name]), scope)}
    for name, node in {
        node.name: node
        for node in ast.walk(Module(ROOT / "worker" / "refusals.py").tree)
        if isinstance(node, ast.ClassDef)
    }.items():  # those that have one code each
        for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
            if ast.unparse(call.func) == "super().__init__" and isinstance(call.args[0], ast.Constant):
                found.add((call.args[0].value, STATUS_OF[name]))
    return found


def failures() -> set[str]:
    found: set[str] = set()
    for module in modules():
        for name, call, scope in module.calls():
            if name in FAILURE_AT:
                found |= module.codes(argument(call, FAILURE_AT[name]), scope)
    for path in (ROOT / "worker" / "lua").glob("*.lua"):
        found |= set(re.findall(r"settle\(id, '\w+', '(\w+)'", path.read_text()))
    return found


def test_each_code_that_a_request_can_be_refused_with_is_listed_and_no_other() -> None:
    assert {code for code, _ in refusals()} == REFUSALS.keys() | COMMAND_LINE.keys()


def test_each_code_is_listed_with_the_status_that_it_comes_with() -> None:
    said = {(code, status) for code, status in refusals() if status is not None and code not in COMMAND_LINE}
    said |= {(code, status) for status, code in CODE_OF_STATUS.items()}
    said = (said - {("too_large", 422)}) | {("too_large", 413)}  # of images
    assert said == {(code, status) for code, error in REFUSALS.items() for status in error.statuses}


def test_each_code_that_a_job_can_fail_with_is_listed_and_no_other() -> None:
    assert failures() == set(FAILURES)


@pytest.mark.parametrize("table", [REFUSALS, FAILURES, COMMAND_LINE])
def test_each_code_is_explained_in_sentences(table: dict) -> None:
    for code, error in table.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code)
        assert all(re.fullmatch(r"[A-Z`].*[.]", sentence) for sentence in (error.meaning, error.remedy)), code


def test_the_type_of_a_problem_leads_to_what_is_said_of_its_code(http: httpx.Client) -> None:
    problem = http.get("/v1/jobs/job_nothing").json()
    assert problem["type"] == "/docs/errors#job_not_found"
    page = http.get(problem["type"])
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert 'id="job_not_found"' in page.text
    assert "(/docs/errors)" in http.get("/openapi.json").json()["info"]["description"]


def test_the_page_needs_nothing_from_elsewhere_and_each_place_in_it_has_its_own_name() -> None:
    page = as_html()
    assert not re.search(r"<script|https?://|<link|<img", page)
    names = re.findall(r'id="([^"]+)"', page)
    assert len(names) == len(set(names)) == len(REFUSALS) + len(FAILURES) + len(COMMAND_LINE)
