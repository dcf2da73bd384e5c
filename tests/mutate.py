"""Do the tests notice a wrong program? Makes single random edits in a copy of one script and runs its tests on each.

    python tests/mutate.py focal.py -n 100 --seed 0       # 100 edits, then the survivors
    python tests/mutate.py focal.py -n 0 --lines 190-220  # every edit of these lines

A survivor is an edit that the tests let pass: it changes nothing that matters, or a test is missing. The working tree
is only read. What failed in the last run comes first. A run that takes more than 60 seconds plus three times the
unmodified run counts as killed. pytest does not collect this file."""

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OF_DATA_COLLECT = ["data_collect", "any_mdp", "dataset_file", "evaluation", "own_data", "runs"]
TESTS = {"data_collect": OF_DATA_COLLECT}  # tests/test_{..}.py; other scripts: of their name

# ---- edits ------------------------------------------------------------------

OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "%": "*", "**": "*", "@": "*", "&": "|", "|": "&"}
OPERATORS |= {"==": "!=", "!=": "==", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "in": "not in", "not in": "in"}
OPERATORS |= {"is": "is not", "is not": "is", "and": "or", "or": "and", "^": "|", "<<": ">>", ">>": "<<"}
OPERATOR = re.compile(r"\b(not in|is not|is|in|and|or)\b|==|!=|<<|>>|<=|>=|\*\*|//|[-+*/%@&|<>^]")
NAMES = {"min": "max", "amin": "amax", "argmin": "argmax", "minimum": "maximum", "zeros": "ones", "triu": "tril"}
NAMES |= {"zeros_like": "ones_like", "any": "all", "sum": "mean", "no_grad": "enable_grad"}
NAMES |= {new: old for old, new in NAMES.items()}  # functions and keywords
DROPPED = {"detach", "clone", "requires_grad_", "clamp", "clamp_", "clip", "abs", "sqrt", "exp", "tanh", "atanh"}
TEXTS = re.compile(r"(print|run\.log|warnings\.warn|parser\.\w+|SystemExit|\w*Error)\(")  # calls without edits


class Edit(NamedTuple):
    line: int
    start: int  # source[start:end] becomes `new`
    end: int
    new: str
    kind: str

    def apply(self, source):
        return source[: self.start] + self.new + source[self.end :]

    def show(self, source):
        first, last = source.rfind("\n", 0, self.start) + 1, source.find("\n", self.end)
        old, new = source[first:last], self.apply(source)[first : last - len(source)]
        lines = [f"  {sign} {line}" for sign, text in (("-", old), ("+", new)) for line in text.splitlines()]
        return f"line {self.line}: {self.kind}\n" + "\n".join(lines).encode("latin-1").decode()


def draw(source, count, seed, lines):
    """-> `count` random edits inside the functions, how many there are. `source` has one character per byte, as ast."""
    tree, starts = ast.parse(source.encode("latin-1")), [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in ast.walk(tree):
        if hasattr(node, "lineno"):
            node.a = starts[node.lineno - 1] + node.col_offset
            node.b = starts[node.end_lineno - 1] + node.end_col_offset
    texts = {below for node in ast.walk(tree) if is_text(node, source) for below in ast.walk(node)}
    nodes = [node for top in ast.walk(tree) if isinstance(top, ast.FunctionDef) for node in ast.walk(top)]
    edits = dict.fromkeys(edit for node in nodes if node not in texts for edit in edits_of(node, source))
    edits = [e for e in edits if e.new != source[e.start : e.end] and lines[0] <= e.line <= lines[-1]]
    random.Random(seed).shuffle(edits)
    return edits[: count or None], len(edits)


def is_text(node, source):
    call = isinstance(node, ast.Call) and TEXTS.match(source, node.a)
    return call or isinstance(node, (ast.JoinedStr, ast.Raise)) or getattr(node, "name", "") == "command_line"


def edits_of(node, source):
    def whole(new, kind):
        return Edit(node.lineno, node.a, node.b, new, kind)

    match node:
        case ast.BinOp(left=one, right=other) | ast.AugAssign(target=one, value=other):
            yield from operator_edits(node, source, one.b, other.a)
        case ast.Compare(left=one, comparators=[other, *_]) | ast.BoolOp(values=[one, other, *_]):
            yield from operator_edits(node, source, one.b, other.a)
        case ast.UnaryOp():
            yield whole(source[node.a : node.b].removeprefix("not").lstrip(" -~"), "dropped sign or not")
        case ast.Constant(bool(value)):
            yield whole(str(not value), "constant")
        case ast.Constant(int(value) | float(value)):
            larger = value + 1 if isinstance(value, int) else 2 * value or 1.0
            for new in (larger, value - 1) if value in (1, 2) else (larger,):
                yield whole(str(new), "constant")
        case ast.Name(name) | ast.Attribute(attr=name) if name in NAMES:
            yield Edit(node.lineno, node.b - len(name), node.b, NAMES[name], "function")
        case ast.keyword(name) if name in NAMES:
            yield whole(NAMES[name] + source[node.a + len(name) : node.b], "bound")
        case ast.Expr(ast.Call()):
            yield whole("pass", "dropped statement")
        case ast.If(test) | ast.IfExp(test) | ast.While(test):
            yield Edit(node.lineno, test.a, test.b, f"not ({source[test.a : test.b]})", "not")
        case ast.Call(ast.Attribute(ast.Name("torch" | "math" | "np"), name), [one, *_]) if name in DROPPED:
            yield whole(f"({source[one.a : one.b]})", f"dropped {name}()")
        case ast.Call(ast.Attribute(attr=name) as method) if name in DROPPED:
            yield whole(source[node.a : method.b - len(name)].rstrip(". "), f"dropped {name}()")
    items = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.List) else []
    for one, other in zip(items, items[1:]):
        swapped = source[other.a : other.b] + source[one.b : other.a] + source[one.a : one.b]
        yield Edit(node.lineno, one.a, other.b, swapped, "swapped arguments")


def operator_edits(node, source, first, last):
    """Another operator between two operands, or one operand alone, which keeps its parentheses."""
    sign = OPERATOR.search(source, first, last)
    yield Edit(node.lineno, *sign.span(), OPERATORS[sign[0]], "operator")
    if isinstance(node, ast.BinOp) and sign[0] in "+-*/&|":
        one, other = source[node.a : sign.start()].rstrip(), source[sign.end() : node.b].lstrip()
        for kept in [one] if sign[0] == "/" else [one, f"-{other}" if sign[0] == "-" else other]:
            yield Edit(node.lineno, node.a, node.b, kept, f"dropped operand of {sign[0]}")


# ---- tests ------------------------------------------------------------------


def first_failure(tree, tests, limit=None):
    """-> the test that fails first, None if all are green. What failed in the last run comes first (--ff)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--ff", "--tb=no", "--basetemp=../tests", *tests]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=tree, **pipes) as process:
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the programs that tests start, too
            return "the time limit"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, flags=re.MULTILINE)
    return None if process.returncode == 0 else failed[1] if failed else "an error outside of the tests"


def examine(args, tree):
    path, name, start, survivors = tree / args.script, Path(args.script).stem, time.time(), 0
    tests = args.tests or [f"tests/test_{test}.py" for test in TESTS.get(name, [name])]
    source = path.read_bytes().decode("latin-1")
    edits, possible = draw(source, args.n, args.seed, [int(line) for line in args.lines.split("-")])
    if failed := first_failure(tree, tests):
        sys.exit(f"STOPPED: the tests of {args.script} fail without any edit: {failed}")
    limit = 60 + 3 * (time.time() - start)
    print(f"{args.script}: the tests pass in {time.time() - start:.0f} s; {len(edits)} of {possible} edits")
    for done, edit in enumerate(edits, 1):
        path.write_bytes(edit.apply(source).encode("latin-1"))
        failed = first_failure(tree, tests, limit)
        survivors += failed is None
        verdict = f"line {edit.line}: {edit.kind}, killed by {failed}" if failed else f"SURVIVED {edit.show(source)}"
        print(f"[{done}/{len(edits)}, {time.time() - start:.0f} s] {verdict}", flush=True)
    print(f"{args.script}, seed {args.seed}: {survivors} of {len(edits)} edits survived, {time.time() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", help="e.g. focal.py")
    parser.add_argument("-n", type=int, default=100, help="edits to draw; 0 = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", default="1-1000000", help="draw only among the edits of these lines: 190-220")
    parser.add_argument("--tests", nargs="+", help="test files, by default the script's own")
    with tempfile.TemporaryDirectory() as folder:
        unwanted = shutil.ignore_patterns(".*", "__pycache__", "runs")
        examine(parser.parse_args(), shutil.copytree(ROOT, Path(folder) / "copy", ignore=unwanted))
