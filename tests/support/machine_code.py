"""What an assembler made of a kernel, as nvdisasm prints it: operands of products that a loop overwrites.

ptxas 12.8 and 12.9 give the left sides of two warp-group products (wgmma) the same registers although one of them was
loaded before a loop and is read in each pass, and the other is computed inside: from the second pass on, the first
product reads what belongs to the second. The PTX is right, so that only the machine code shows it.
"""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """``conditional``: it may not be executed."""

    conditional: bool
    name: str
    operands: str


def overwritten(text: str) -> list[str]:
    """Products in loops whose left side, in registers, was written both before the loop and in it.

    A left side that a loop carries from pass to pass on purpose is named too; no kernel of ours has one.
    """
    code, following = _flow(text)
    sides = {
        i: range(int(m[1]), int(m[1]) + 4) for i, x in enumerate(code) if (m := _LEFT.match(f"{x.name} {x.operands}"))
    }
    writers = _writers(code, following, {r for side in sides.values() for r in side})
    found = []
    for i, side in sides.items():
        behind = _reached(following, i)
        inside = {j for j in behind if i in _reached(following, j)} if i in behind else set()
        if any(writers[i].get(r, set()) & inside and writers[i][r] - inside for r in side):
            found.append(f"{code[i].name} {code[i].operands}")
    return found


_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{ )?(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_LEFT = re.compile(r"HGMMA\S* R\d+, R(\d+),")
_PREDICATE = r"!?U?P[T\d]+"
_FIRST = re.compile(rf"(?:{_PREDICATE}\s*,\s*)*R(\d+)\b")
_NO_RESULT = ("ST", "RED", "BAR", "BRA", "SYNCS", "UTMA", "WARPGROUP", "MEMBAR", "EXIT", "DEPBAR", "R2UR")


def _flow(text: str) -> tuple[list[Instruction], list[list[int]]]:
    """The instructions, and those that may follow each."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _LINE.match(line):
            code.append(Instruction(bool(found[1]), found[2], found[3]))
    following = []
    for i, (conditional, name, operands) in enumerate(code):
        after = [i + 1] if i + 1 < len(code) else []
        if name.startswith("BRA"):
            goes = labels[re.findall(r"\.L_x_\d+", operands)[-1]]
            after = [goes, *(after if conditional or re.match(_PREDICATE, operands) else [])]
        elif name.startswith("EXIT") and not conditional:
            after = []
        following.append(after)
    return code, following


def _results(instruction: Instruction) -> range:
    """Registers that it writes."""
    _, name, operands = instruction
    first = _FIRST.match(operands)
    if first is None or name.startswith(_NO_RESULT):
        return range(0)
    if shape := re.match(r"HGMMA\.64x(\d+)x", name):
        number = int(shape[1]) // 2
    elif name.startswith("LDSM"):
        number = int(name[-1]) if name[-2:] in (".2", ".4") else 1
    else:
        number = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    return range(int(first[1]), int(first[1]) + number)


def _writers(code: list[Instruction], following: list[list[int]], of: set[int]) -> list[dict[int, set[int]]]:
    """For each instruction and register: the instructions that may have written what it finds there."""
    found: list[dict[int, set[int]]] = [{} for _ in code]
    work, seen = [0], {0}
    while work:
        i = work.pop()
        leaves = dict(found[i])
        for r in of.intersection(_results(code[i])):
            leaves[r] = {i} | (leaves.get(r, set()) if code[i].conditional else set())
        for j in following[i]:
            grown = {r: found[j].get(r, set()) | w for r, w in leaves.items()}
            if j not in seen or any(w != found[j].get(r) for r, w in grown.items()):
                found[j] = found[j] | grown
                seen.add(j)
                work.append(j)
    return found


def _reached(following: list[list[int]], i: int) -> set[int]:
    """Instructions that may be executed after instruction i."""
    found: set[int] = set()
    work = [i]
    while work:
        for j in following[work.pop()]:
            if j not in found:
                found.add(j)
                work.append(j)
    return found
