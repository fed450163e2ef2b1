"""The upper part of lora_scratch.py stays short and plain enough to be read from top to bottom."""

import ast
from pathlib import Path

import pytest

import lora_scratch

SOURCE = Path(lora_scratch.__file__).read_text(encoding="utf-8")
PLUMBING, FENCE, REST = "# === PLUMBING", "# ---- one step of training ----", "# ---- the rest"
STEP = ["autocast", "logits", "loss", "backward", "unscale_", "clip_grad_norm_", "step", "update", "step", "zero_grad"]


def depth(statement: ast.stmt) -> int:
    """How many levels of statements there are: 1 for a line, 2 for an if with a line in it."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return 0  # a function counts for itself
    inner = [child for child in ast.walk(statement) if isinstance(child, ast.stmt) and child is not statement]
    return 1 + max(map(depth, inner), default=0)


def what_it_does(statement: ast.stmt) -> list[str]:
    """The names that a plain statement assigns or calls, one a statement, in their order."""
    if isinstance(statement, ast.With):
        entered = [item.context_expr.func.id for item in statement.items]
        return entered + [name for inner in statement.body for name in what_it_does(inner)]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets]
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return [statement.value.func.attr]
    return [ast.unparse(statement)]


def faults(source: str) -> list[str]:
    """What is wrong with the story in this text of the file."""
    lines = source.splitlines()
    places = [i for i, line in enumerate(lines, start=1) if line.startswith(PLUMBING)]
    if len(places) != 1:
        return ["no line PLUMBING"]
    found = [f"line {i} is too long" for i, line in enumerate(lines[: places[0]], start=1) if len(line) > 110]
    if places[0] > 275:
        found.append("the story is too long")
    tree = ast.parse("\n".join(lines[: places[0]]))
    nodes = list(ast.walk(tree))
    if any(isinstance(node, ast.Try) for node in nodes):
        found.append("except")
    if sum(isinstance(node, ast.Raise) for node in nodes) > 1:
        found.append("raise")
    functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    levels = {name: max(map(depth, function.body)) for name, function in functions.items()}
    found += [f"{name} is nested too deep" for name, level in levels.items() if level > (4 if name == "train" else 5)]
    train = functions["train"]
    if train.end_lineno - train.lineno >= 50:
        found.append("train is too long")
    fence = [i for i, line in enumerate(lines, start=1) if line.strip() == FENCE]
    rest = [i for i, line in enumerate(lines, start=1) if line.strip().startswith(REST)]
    if len(fence) != 1 or len(rest) != 1 or not train.lineno < fence[0] < rest[0] < train.end_lineno:
        return [*found, "no fence"]
    inside = [node for node in ast.walk(train) if isinstance(node, ast.stmt) and fence[0] < node.lineno < rest[0]]
    outermost = [node for node in inside if node.col_offset == min(other.col_offset for other in inside)]
    if [name for statement in outermost for name in what_it_does(statement)] != STEP:
        found.append("the step is another")
    return found


def test_the_story_is_short_and_plain() -> None:
    assert faults(SOURCE) == []


def put_before(mark: str, text: str) -> str:
    """The file with lines put before the first one that contains `mark`, as far indented as that one."""
    lines = SOURCE.splitlines()
    i = next(i for i, line in enumerate(lines) if mark in line)
    indent = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
    return "\n".join([*lines[:i], *(indent + line for line in text.split("\n")), *lines[i:]])


NEST = "if a:\n    if a:\n        if a:\n            if a:\n                if a:\n                    b()"


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (SOURCE.replace(PLUMBING, "# === MORE"), "no line PLUMBING"),
        (put_before(PLUMBING, "\n" * 99), "the story is too long"),
        (put_before("# === The method", f"# {'x' * 120}"), "is too long"),
        (put_before("optimizer.zero_grad()", "try:\n    a()\nexcept ValueError:\n    b()"), "except"),
        (put_before("logits = predict(", "raise ValueError"), "raise"),
        (put_before("logits = predict(", NEST), "evaluate is nested too deep"),
        (put_before("args = parse_flags(", NEST), "main is nested too deep"),
        (put_before("state.losses[step] =", "if a:\n    if b:\n        c()"), "train is nested too deep"),
        (put_before("state.losses[step] =", "a()\n" * 15), "train is too long"),
        (put_before("optimizer.zero_grad()", "if step == 3:\n    a.save()"), "the step is another"),
        (put_before("optimizer.zero_grad()", "progress.report(step)"), "the step is another"),
        (put_before("logits = network(", "network.train()"), "the step is another"),
        (SOURCE.replace("optimizer.zero_grad()", "pass"), "the step is another"),
        (SOURCE.replace("scaler.unscale_(optimizer)", ""), "the step is another"),
        (SOURCE.replace(FENCE, ""), "no fence"),
        (SOURCE.replace(REST, "# and"), "no fence"),
    ],
)
def test_what_would_spoil_it_is_noticed(changed: str, fault: str) -> None:
    assert changed != SOURCE and any(fault in found for found in set(faults(changed)) - set(faults(SOURCE)))
