"""One timed run in figures, and what no run can have given."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.acceptance.sampler import Samples
from pipeline.errors import PipelineError
from pipeline.runners.session import Generation
from pipeline.runners.vllm.timing import RequestTiming, VllmGeneration


@dataclass(frozen=True, kw_only=True)
class DeviceUse:
    """The card during one timed run.

    Attributes:
        peak_memory_bytes: Most device memory in use at any reading, by anybody.
        seconds: From the first reading to the last; somewhat longer than the run itself.
        energy_j: Joules in that time; None where the card does not tell.
    """

    peak_memory_bytes: int
    seconds: float
    energy_j: float | None

    @staticmethod
    def of(samples: Samples) -> DeviceUse | None:
        """The figures of a series of readings; None of an empty one, as on a CPU."""
        peak = samples.peak_memory_bytes
        if peak is None:
            return None
        return DeviceUse(peak_memory_bytes=peak, seconds=samples.seconds, energy_j=samples.energy_j)


@dataclass(frozen=True, kw_only=True)
class SpeedSample:
    """One timed run.

    Attributes:
        output_tokens_per_s: batch x osl / seconds from the start of the prefill to the last token:
            the definition of vLLM's benchmark ("output token throughput") for a closed batch.
        ttft_ms: Milliseconds to the first token of the batch.
        itl_ms: (total - ttft) / (osl - 1), in milliseconds: the mean gap between the tokens of one
            request, the first excluded. Where the runtime tells the times of single requests, the
            mean of theirs: the first tokens of a large batch do not all come together.
        total_tokens_per_s: (prompt tokens + batch x osl) / the same seconds; None where the prompts
            are not known.
        prompt_tokens: Of all requests; None where the prompts are not known.
        output_tokens: batch x osl; None where only figures are known.
        requests: Times of each request, where the runtime tells them.
        device: The card meanwhile; None where there is none, or nobody looked.
    """

    output_tokens_per_s: float
    ttft_ms: float
    itl_ms: float
    total_tokens_per_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    requests: tuple[RequestTiming, ...] = ()
    device: DeviceUse | None = None

    @staticmethod
    def of(
        generation: Generation,
        *,
        prompts: Sequence[Sequence[int]] | None = None,
        osl: int | None = None,
        device: DeviceUse | None = None,
    ) -> SpeedSample:
        """The figures of one generation.

        Args:
            generation: What the session gave back.
            prompts: What it was given; the number of its answers is held against it.
            osl: How many tokens it was asked for; the length of its answers is held against it.
            device: The card meanwhile.

        Raises:
            PipelineError: Too few tokens or answers, or times that no run can have: a rate made of
                them would be worth nothing.
        """
        return SpeedSample.of_waves(
            [generation], prompts=None if prompts is None else [prompts], osl=osl, device=device
        )

    @staticmethod
    def of_waves(
        waves: Sequence[Generation],
        *,
        prompts: Sequence[Sequence[Sequence[int]]] | None = None,
        osl: int | None = None,
        device: DeviceUse | None = None,
    ) -> SpeedSample:
        """The figures of batches that ran one after the other, as one run.

        Tokens and seconds are added up; `ttft_ms` and `itl_ms` are means over the waves.
        Arguments and errors as in `of`, for each wave.
        """
        asked: Sequence[Sequence[Sequence[int]] | None] = prompts or [None] * len(waves)
        for wave, given in zip(waves, asked, strict=True):
            _require_possible(wave, None if given is None else len(given), osl)
        total_s = sum(wave.total_s for wave in waves)
        made = sum(int(wave.tokens.size) for wave in waves)
        read = None if prompts is None else sum(len(p) for wave in prompts for p in wave)
        return SpeedSample(
            output_tokens_per_s=made / total_s,
            ttft_ms=1e3 * statistics.fmean(wave.ttft_s for wave in waves),
            itl_ms=statistics.fmean(_itl_ms(wave) for wave in waves),
            total_tokens_per_s=None if read is None else (read + made) / total_s,
            prompt_tokens=read,
            output_tokens=made,
            requests=tuple(request for wave in waves for request in _requests(wave)),
            device=device,
        )

    def to_json(self) -> dict[str, Any]:
        """The raw figures of this run, for the report."""
        figures: dict[str, Any] = {
            name: _rounded(getattr(self, name))
            for name in ("output_tokens_per_s", "ttft_ms", "itl_ms", "total_tokens_per_s")
        }
        if self.requests:
            figures["requests"] = [
                {name: _rounded(value) for name, value in vars(request).items()}
                for request in self.requests
            ]
        if self.device:
            figures |= device_figures([self])
        return {name: value for name, value in figures.items() if value is not None}


def _requests(generation: Generation) -> tuple[RequestTiming, ...]:
    return generation.requests if isinstance(generation, VllmGeneration) else ()


def _itl_ms(generation: Generation) -> float:
    gaps = int(generation.tokens.shape[1]) - 1
    if gaps < 1:
        return 0.0
    if requests := _requests(generation):
        return statistics.fmean(request.itl_ms or 0.0 for request in requests)
    return 1e3 * (generation.total_s - generation.ttft_s) / gaps


def _require_possible(generation: Generation, batch: int | None, osl: int | None) -> None:
    """Refuse what no run can have given.

    Raises:
        PipelineError: Saying what was asked for and what came.
    """
    shape = generation.tokens.shape
    wanted = (shape[0] if batch is None else batch, shape[-1] if osl is None else osl)
    if shape != wanted or generation.tokens.size == 0:
        raise PipelineError(
            f"asked the runner for {wanted[0]} answers of {wanted[1]} tokens, got an array "
            f"{list(shape)}; its speed cannot be measured: see that it ignores end-of-sequence and "
            "that its limits hold the workload"
        )
    requests = _requests(generation)
    # A request's times are of other clocks than those of the whole call (pipeline.runners.vllm).
    ordered = bool(requests) or generation.ttft_s <= generation.total_s
    times = [generation.ttft_s, generation.total_s]
    times += [getattr(one, name) or 0.0 for one in requests for name in vars(one)]
    possible = all(math.isfinite(value) and value >= 0 for value in times)
    if not possible or not ordered or not generation.total_s > 0:
        raise PipelineError(
            f"the runner reports {generation.ttft_s} s to the first and {generation.total_s} s to "
            f"the last of {generation.tokens.size} tokens, or a request's time that is negative or "
            "not a number: no run takes such a time; measure again, and report it if it stays so"
        )


def device_figures(runs: Sequence[SpeedSample]) -> dict[str, Any]:
    """Memory and energy of all runs together; nothing where the card was not sampled.

    Energy, seconds and tokens are added up before they are divided: the card's counter is too
    coarse for a single short run.
    """
    used = [run.device for run in runs if run.device is not None]
    if not used or len(used) != len(runs):
        return {}
    figures: dict[str, Any] = {"peak_memory_bytes": max(use.peak_memory_bytes for use in used)}
    energies = [use.energy_j for use in used if use.energy_j is not None]
    seconds = sum(use.seconds for use in used)
    tokens = sum(run.output_tokens or 0 for run in runs)
    if len(energies) == len(used) and seconds > 0 and tokens > 0:
        figures["mean_power_w"] = round(sum(energies) / seconds, 2)
        figures["joules_per_token"] = round(sum(energies) / tokens, 6)
    return figures


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
