"""vLLM loads a checkpoint package unmodified, with the arguments that its manifest gives.

`ENGINESMITH_PACKAGE` names the package folder, such as one made by
`enginesmith build smollm2 compiler=checkpoint runner=transformers`.
"""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

PROMPTS = {
    "What is the capital of France?": "Paris",
    "What is 2 + 2?": "4",
    "Which planet do we live on?": "Earth",
}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_vllm_answers_from_the_package(kv_cache_dtype: str) -> None:
    import vllm

    package = Path(os.environ["ENGINESMITH_PACKAGE"])
    limits = json.loads((package / "manifest.json").read_text())["limits"]
    engine = vllm.LLM(
        model=str(package / "engine"),
        max_model_len=limits["max_seq_len"],
        max_num_seqs=limits["max_batch_size"],
        kv_cache_dtype=kv_cache_dtype,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    sampling = vllm.SamplingParams(temperature=0, max_tokens=48)
    answers = [output.outputs[0].text for output in engine.chat(chats, sampling)]
    print(kv_cache_dtype, answers)

    # A model of 135 M parameters in FP8 does not get everything right; nonsense gets nothing right.
    right = [word in answer for word, answer in zip(PROMPTS.values(), answers, strict=True)]
    assert sum(right) >= 1
