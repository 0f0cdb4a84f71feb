"""Reads a TensorRT-RTX plan: proves in which types its GEMMs multiply, without a GPU.

An engine for another GPU can be neither loaded nor inspected here, but its bytes hold the compiled
graph as text, in sections:

    accelerators={sm89 } ... fully_connected={ name="A_U1+B_U2" output={..} input={"x" "w" ..} .. }
    tensor={ .. name="x" .. type=fp8_e4m3 .. }

A GEMM whose kernel unpacks 4-bit weights reads the output of a node `int4_block_dq` beside it:

    mul={ name="int4_block_dq" output={"w" } input={"codes" "scales" } .. }

Each optimization profile has a large section and, where a 16-bit GEMM is fused with what follows
it, a small one for that GEMM. The format is undocumented; it was read from plans of TensorRT-RTX
1.7.1 (2026-11-24), and every other version is refused. What does not parse fails the build.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from pipeline.core.errors import PipelineError
from pipeline.quant.spec import QuantSpec

KNOWN_VERSIONS = frozenset({(1, 7, 1)})
_MAGIC = b"vtrt"
_VERSION_BYTES = slice(24, 28)
_ANY = ("*",)
"""Target of sections that hold nothing specific to one SM, such as a single 16-bit GEMM."""

Buffer = bytes | mmap.mmap

_SECTION = re.compile(rb"accelerators=\{([^}]*)\}")
_GEMM = re.compile(rb'fully_connected=\{ name="([^"]*)" output=\{[^}]*\} input=\{([^}]*)\}')
_QUOTED = re.compile(rb'"([^"]*)"')
_UNPACKED = re.compile(
    rb'mul=\{ name="int4_block_dq[^"]*" output=\{"([^"]*)" \} input=\{"([^"]*)" "[^"]*" \}'
)
_GEMM_START = re.compile(rb"fully_connected=\{")
# A literal first keeps the search fast over gigabytes of weights; it finds `sub_tensor={` as well.
_TENSOR = re.compile(rb"tensor=\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_NAME = re.compile(rb'\bname="([^"]*)"')
_TYPE = re.compile(rb"\btype=(\w+)")
_SUFFIXES = re.compile(r"(?: \[profile (\d+)\])?(?:_U\d+)?$")


class PlanError(PipelineError):
    """The plan is not what was asked for, or cannot be read."""


@dataclass(frozen=True)
class Gemm:
    """One matrix multiplication: profile, fused modules, types of its operands, targets."""

    profile: int
    modules: tuple[str, ...]
    operand_types: tuple[str, str]
    accelerators: tuple[str, ...]

    def multiplies(self, precision: QuantSpec) -> bool:
        """Whether the weight is stored in its type, and the input too where that is rounded.

        With both it runs on that type's tensor cores.
        """
        pattern, (x, weight) = precision.onnx, self.operand_types
        if pattern is None:
            return False
        return weight == pattern.operands and (pattern.input is None or x == weight)


def read_plan(plan: Buffer) -> tuple[Gemm, ...]:
    """Every GEMM that the text of a plan shows."""
    if plan[:4] != _MAGIC or len(plan) < 64:
        raise PlanError("this is no TensorRT-RTX plan: its header is missing")
    version = tuple(plan[_VERSION_BYTES])
    if version[:3] not in KNOWN_VERSIONS:
        raise PlanError(
            f"the plan is of TensorRT-RTX {'.'.join(map(str, version))}, whose text format is "
            f"not known here; use {', '.join('.'.join(map(str, v)) for v in KNOWN_VERSIONS)}"
        )
    starts = [(match.start(), match.group(1)) for match in _SECTION.finditer(plan)]
    if not starts:
        raise PlanError("the plan holds no readable section; its content cannot be proven")
    ends = [start for start, _ in starts[1:]] + [len(plan)]
    return tuple(
        gemm
        for (start, names), end in zip(starts, ends, strict=True)
        for gemm in _gemms(plan, start, end, tuple(names.decode().split()))
    )


def _gemms(plan: Buffer, start: int, end: int, accelerators: tuple[str, ...]) -> tuple[Gemm, ...]:
    matches = list(_GEMM.finditer(plan, start, end))
    if len(matches) != sum(1 for _ in _GEMM_START.finditer(plan, start, end)):
        raise PlanError("the plan holds GEMMs that cannot be read; its content cannot be proven")
    types: dict[str, str] = {}
    for match in _TENSOR.finditer(plan, start, end):
        name, kind = _NAME.search(match[1]), _TYPE.search(match[1])
        if name and kind:
            types[name[1].decode()] = kind[1].decode()
    for match in _UNPACKED.finditer(plan, start, end):
        types[match[1].decode()] = types.get(match[2].decode(), "")
    return tuple(_gemm(match, types, accelerators) for match in matches)


def _gemm(match: re.Match[bytes], types: dict[str, str], accelerators: tuple[str, ...]) -> Gemm:
    parts = match.group(1).decode().split("+")
    names = [_SUFFIXES.sub("", part) for part in parts]
    profiles = {int(suffix.group(1) or 0) for part in parts if (suffix := _SUFFIXES.search(part))}
    if len(profiles) != 1:
        raise PlanError(f"GEMM {names} belongs to no single profile of the plan")
    operands = [name.decode() for name in _QUOTED.findall(match.group(2))][:2]
    found = [types.get(name) or types.get(name.removesuffix("^deref")) for name in operands]
    if len(found) != 2 or None in found:
        raise PlanError(f"the operand types of GEMM {names} cannot be read from the plan")
    return Gemm(profiles.pop(), tuple(names), (str(found[0]), str(found[1])), accelerators)


def prove_plan(
    plan: Buffer,
    precision: QuantSpec,
    *,
    sm: int,
    profiles: int,
    quantized_linears: Collection[str],
    kept_16bit: Collection[str],
) -> dict[str, int]:
    """Prove that a plan, for this SM only, computes exactly the wanted linears in a precision.

    Each of `quantized_linears` must be in exactly one GEMM of it in every profile; those of
    `kept_16bit` may be in other GEMMs, beside lm_head.
    """
    title = precision.title
    wanted = set(quantized_linears)
    gemms = read_plan(plan)
    quantized = [gemm for gemm in gemms if gemm.multiplies(precision)]
    other = [gemm for gemm in gemms if gemm not in quantized]
    bound = quantized if precision.onnx and precision.onnx.input else []  # to kernels of one SM
    for gemm in gemms:
        if gemm.accelerators != (f"sm{sm}",) and (gemm in bound or gemm.accelerators != _ANY):
            raise PlanError(
                f"GEMM {gemm.modules} of the plan is for {gemm.accelerators}, sm{sm} was asked for"
            )
    found = {gemm.profile for gemm in gemms}
    if found != set(range(profiles)):
        raise PlanError(f"the plan has profiles {sorted(found)}, {profiles} were asked for")
    for profile in range(profiles):
        where = f"profile {profile} of the plan"
        here, rest = _modules(quantized, profile), _modules(other, profile)
        if missing := sorted(wanted - here.keys()):
            raise PlanError(
                f"{where} does not compute {len(missing)} linears in {title}, first {missing[0]}; "
                f"{title} was asked for"
            )
        if surplus := sorted(name for name, n in here.items() if n > 1 or name not in wanted):
            raise PlanError(f"{where} has unexpected {title} GEMMs, first {surplus[0]}")
        if strange := sorted(rest.keys() - {*kept_16bit, "lm_head"}):
            raise PlanError(f"{where} has unexpected 16-bit GEMMs, first {strange[0]}")
    counts = {"quantized_gemms": len(quantized), "other_gemms": len(other)}
    return {"profiles": profiles, **counts, "quantized_linears": len(wanted)}


def _modules(gemms: list[Gemm], profile: int) -> Counter[str]:
    return Counter(name for gemm in gemms if gemm.profile == profile for name in gemm.modules)
