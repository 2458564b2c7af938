"""`--to hub` against a stub of the Hub's client: what is sent, and how refusals are told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from export_models import small_tokenizer, tiny_model
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from minnow import cli
from minnow.export import hub
from minnow.model.lora import LoraConfig, add_lora
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.stages import export


class StubApi:
    """Keeps what it is asked for."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - reset by the fixture
    error: Exception | None = None

    def create_repo(self, repo: str, **more: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("create", {"repo": repo, **more}))

    def upload_folder(self, **more: Any) -> SimpleNamespace:
        folder = Path(more["folder_path"])
        names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        sent = list(filter_repo_objects(names, allow_patterns=more["allow_patterns"]))
        self.calls.append(("upload", {"repo": more["repo_id"], "files": sent}))
        return SimpleNamespace(repo_url=f"https://huggingface.co/{more['repo_id']}")


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> type[StubApi]:
    monkeypatch.setattr(hub, "HfApi", StubApi)
    monkeypatch.setattr(StubApi, "calls", [])
    monkeypatch.setattr(StubApi, "error", None)
    return StubApi


def test_the_model_and_its_exports_are_sent_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stub: type[StubApi]
) -> None:
    folder = tiny_model(tmp_path)
    cli.main(["export", str(folder), "--to", "gguf", "--type", "q8_0"])
    (folder / "onnx").mkdir()
    for name in ("curves.png", "Modelfile", "onnx/model.onnx", "onnx/model.onnx.data"):
        (folder / name).touch()
    (folder / ".env").write_text("secret")
    (folder / "notes.txt").write_text("mine")
    (folder / "private").mkdir()
    (folder / "private" / "talks.json").write_text("mine too")
    assert cli.main(["export", str(folder), "--to", "hub", "somebody/fish", "--private", "true"]) == 0
    assert stub.calls[0] == ("create", {"repo": "somebody/fish", "private": True, "exist_ok": True})
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "generation_config.json", "model.safetensors", "chat_template.jinja"} <= written
    assert set(stub.calls[1][1]["files"]) == written - {".env", "notes.txt", "private/talks.json"}
    assert "https://huggingface.co/somebody/fish" in capsys.readouterr().out


def test_the_copy_of_a_hub_model_is_not_pushed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stub: type[StubApi]
) -> None:
    """Its card and licence are not downloaded: a card of ours went in their place, into the Hub client's cache."""
    cached = tiny_model(tmp_path)
    monkeypatch.setattr(export, "resolve_model_folder", lambda model: cached)
    assert cli.main(["export", "somebody/small", "--to", "hub", "me/small"]) == 2
    message = capsys.readouterr().err
    assert "somebody/small: --to hub pushes a folder of this machine" in message
    assert "hf download somebody/small --local-dir FOLDER" in message
    assert stub.calls == []
    assert not (cached / "README.md").exists()


def test_what_is_written_of_a_hub_model_lies_here_under_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it in the Hub client's copy, which has a commit's hash for a name."""
    cached = tmp_path / "models--somebody--small" / "snapshots" / "0123abcd"
    cached.parent.mkdir(parents=True)
    tiny_model(tmp_path).rename(cached)
    before = sorted(cached.iterdir())
    monkeypatch.setattr(export, "resolve_model_folder", lambda model: cached)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["export", "somebody/small", "--to", "ollama", "--type", "q8_0"]) == 0
    assert sorted(file.name for file in Path("small").iterdir()) == ["Modelfile", "model-q8_0.gguf"]
    assert "ollama create small -f" in capsys.readouterr().out
    assert sorted(cached.iterdir()) == before


def test_every_export_brings_the_card_up_to_date_and_the_hub_s_names_the_repository(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    assert cli.main(["export", str(folder), "--to", "gguf"]) == 0
    assert "somebody/fish" not in (folder / "README.md").read_text(encoding="utf-8")
    assert cli.main(["export", str(folder), "--to", "hub", "somebody/fish"]) == 0
    assert "somebody/fish" in (folder / "README.md").read_text(encoding="utf-8")


def test_an_adapter_goes_where_its_base_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stub: type[StubApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was sent with the path of its base on this machine, which tells strangers much and loads for nobody."""
    base = tiny_model(tmp_path)
    model = load_pretrained(base)
    add_lora(model, LoraConfig(rank=2), base=str(base))
    folder = tmp_path / "adapter"
    save_pretrained(model, folder, small_tokenizer())
    assert cli.main(["export", str(folder), "--to", "hub", "somebody/fin"]) == 2
    said = capsys.readouterr().err
    assert f"an adapter of {base}, a folder of this machine" in said
    assert f"minnow merge-lora {folder}" in said
    assert not stub.calls
    monkeypatch.chdir(tmp_path)
    config = folder / "adapter_config.json"
    written = config.read_text()
    for named, code in (("run/model", 2), ("somebody/fish", 0)):
        config.write_text(written.replace(json.dumps(str(base)), json.dumps(named)))
        assert cli.main(["export", str(folder), "--to", "hub", "somebody/fin"]) == code
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(stub.calls[1][1]["files"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no token"), "run `hf auth login`"),
        (HFValidationError("Repo id must be in the form ..."), "refused (Repo id must be in the form"),
        (
            httpx.ConnectError("Name or service not known"),
            "the upload to the Hugging Face Hub failed (Name or service not known)",
        ),
        (httpx.ReadTimeout(""), "the upload to the Hugging Face Hub failed (ReadTimeout)"),
    ],
)
def test_refusals_are_told_in_a_line(
    error: Exception,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stub: type[StubApi],
) -> None:
    monkeypatch.setattr(stub, "error", error)
    assert cli.main(["export", str(tiny_model(tmp_path)), "--to", "hub", "somebody/fish"]) == 2
    assert message in capsys.readouterr().err
