"""A real llama.cpp to compare with: `python benchmarks/llama_cpp_model.py` fetches and builds it once.

Its source is the one that the sdist of llama-cpp-python on PyPI carries. It lies in the folder that the variable
MINNOW_LLAMA_CPP names, by default ~/.cache/minnow/llama.cpp. Needs cmake and a C++ compiler; takes minutes.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from other_server import answering

VERSION = "0.3.36"  # of llama-cpp-python; its llama.cpp is v0.5.0-dev
FOLDER = Path(os.environ.get("MINNOW_LLAMA_CPP") or Path.home() / ".cache" / "minnow" / "llama.cpp")
PROBE = FOLDER / "build" / "bin" / "llama_probe"
SERVER = FOLDER / "build" / "bin" / "llama-server"
SOURCE = Path(__file__).with_name("llama_probe.cpp")

_FLAGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "GGML_OPENMP": "OFF",  # its threads spin, which is bad company on a small machine
    # Portable AVX2 code: ggml's AMX kernels crash with quantised weights on some CPUs.
    "GGML_NATIVE": "OFF",
    "GGML_AVX2": "ON",
    "GGML_FMA": "ON",
    "GGML_F16C": "ON",
    "GGML_BMI2": "ON",
}


def build(jobs: int = 1) -> None:
    """Fetch, build libllama and llama-server, and the probe against them; what is there already is kept."""
    if not (FOLDER / "CMakeLists.txt").exists():
        _fetch()
    flags = [f"-D{key}={value}" for key, value in _FLAGS.items()]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    if not (FOLDER / "build" / "CMakeCache.txt").exists():
        subprocess.run(["cmake", "-B", "build", *generator, *flags], cwd=FOLDER, check=True)
    targets = ["--target", "llama", "llama-server"]
    subprocess.run(["cmake", "--build", "build", "-j", str(jobs), *targets], cwd=FOLDER, check=True)
    build_probe()


def build_probe() -> None:
    """Compile the probe, if it is older than its source."""
    if PROBE.exists() and PROBE.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    library = FOLDER / "build" / "bin"
    include = [f"-I{FOLDER / 'include'}", f"-I{FOLDER / 'ggml' / 'include'}"]
    link = [f"-L{library}", f"-Wl,-rpath,{library}", "-lllama", "-lggml", "-lggml-base"]
    subprocess.run(["c++", "-O2", "-std=c++17", str(SOURCE), *include, *link, "-o", str(PROBE)], check=True)


def _fetch() -> None:
    with tempfile.TemporaryDirectory() as folder:
        package = f"llama-cpp-python=={VERSION}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", package, "-d", folder]
        subprocess.run(pip, check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (source,) = Path(folder).glob("*/vendor/llama.cpp")
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, FOLDER)


class LlamaCpp:
    """llama.cpp with one GGUF file open, through the probe; close it, or use it in a `with`.

    cache: number format of keys and values, "f32" or "f16" (llama.cpp's default). context: most tokens at once.
    """

    def __init__(self, path: Path, *, cache: str = "f32", context: int = 512) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([str(PROBE), str(path), cache, str(context)], **pipes)  # type: ignore[call-overload]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`; with `special`, control tokens written in it are control tokens."""
        return self._ids(f"tokenize {int(special)} {text.encode().hex()}")

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest next ids one after another, at most `count`, an end-of-generation id included."""
        return self._ids(f"greedy {count} {' '.join(map(str, ids))}")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of `ids`: fp32 [len(ids), vocabulary]."""
        rows, columns = self._ids(f"logits {' '.join(map(str, ids))}")
        data = self._process.stdout.read(rows * columns * 4)
        return np.frombuffer(data, np.float32).reshape(rows, columns)

    def _ids(self, command: str) -> list[int]:
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp stopped with exit code {self._process.wait()}")
        return [int(word) for word in line.split()]


def llama_server(path: Path, mmproj: Path) -> AbstractContextManager[str]:
    """llama.cpp's server with the two files of a model that looks at pictures, in float32: its address."""
    words = ["-m", str(path), "--mmproj", str(mmproj), "--jinja", "-t", "1", "-c", "256"]
    return answering([str(SERVER), *words, "-ctk", "f32", "-ctv", "f32"])


def llama_sees(address: str, picture: Path, question: str, count: int) -> list[int]:
    """The likeliest ids one after another behind a question about a picture, in the template of the file."""
    data = base64.b64encode(picture.read_bytes()).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": question}]}]
    template = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    prompt = {"prompt_string": _post(f"{address}/apply-template", template)["prompt"], "multimodal_data": [data]}
    wanted = {"n_predict": count, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    return _post(f"{address}/completion", {"prompt": prompt} | wanted)["tokens"]


def _post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


if __name__ == "__main__":
    build(jobs=os.cpu_count() or 1)
    print(f"llama.cpp is in {FOLDER}")
