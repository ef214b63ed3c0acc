"""spikingbrain-serve answers as the model in the folder generates: the real server, on a free port.

The text of every answer and its number of tokens are those of ``model.generate`` on the prompt that the chat
template makes, greedily, in float32: the same code computes both, so nothing is rounded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.evaluation.pretrained import load_causal_lm, load_text_tokenizer
from spikingbrain_train.evaluation.serve_command_line import PACKAGES, serve
from tests.distributed.gradients import CASES
from tests.distributed.pool import RankPool
from tests.docs.pages import commands
from tests.evaluation.exported_folders import check_both_commands, save_text

MISSING = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
needs_server = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (the extra serve)"
)
# The form of Qwen's: transformers' server looks for its anchor in what a model of type qwen2 says.
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "The for statement"}]
NEW_TOKENS = 12
_7B = replace(CASES["GLA, low-rank gate"].model, mixers=["gla", "swa"])
MODELS: dict[str, ModelConfig] = {
    "gla_swa": _7B,
    "spikingbrain": CASES["76B-like"].model,
    "qwen2": replace(_7B, mixers=["full"]),
}


class Server:
    """A running spikingbrain-serve and the folder that it answers with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = ["-m", "spikingbrain_train", "serve", "--model", str(folder), "--trust-remote-code"]
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", "0", "--dtype", "float32", "--device", "cpu"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert self.process.stdout is not None
        self.announced = self.process.stdout.readline()
        assert "answers at http://" in self.announced, f"it ended with {self.process.wait()}"
        self.url = self.announced.split(" answers at ")[1].split()[0]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(answer.read().decode())

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@pytest.fixture(scope="module", params=MODELS)
def server(
    request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(request.param)
    export = check_both_commands(ranks, folder, MODELS[request.param], save_text(folder / "text"))
    described = export / "tokenizer_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"chat_template": TEMPLATE}))
    config = json.loads((export / "config.json").read_text())
    assert config["model_type"] == request.param
    # A random model likes one token best, and it may be one without text, or half of a character.
    tokenizer = load_text_tokenizer(export)
    texts = {token: tokenizer.decode([token]) for token in range(config["vocab_size"])}
    textless = [
        token for token, text in texts.items() if not text.isprintable() or "\ufffd" in text or not text
    ]
    defaults = {"repetition_penalty": 1.5, "suppress_tokens": textless}
    stored = export / "generation_config.json"
    before = json.loads(stored.read_text()) if stored.is_file() else {}
    stored.write_text(json.dumps(before | defaults))
    running = Server(export)
    yield running
    code = running.end()
    assert code in (0, 130, -signal.SIGINT), code


def expected(folder: Path) -> tuple[str, int, int]:
    """Greedy text, its tokens and those of the prompt, by transformers on the folder."""
    model = load_causal_lm(folder, trust_remote_code=True, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = load_text_tokenizer(folder)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    whole = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
    length = prompt["input_ids"].shape[1]
    return tokenizer.decode(whole[length:], skip_special_tokens=True), len(whole) - length, length


@needs_server
@pytest.mark.slow
def test_answers_are_what_the_model_generates_whole_and_as_a_stream(server: Server) -> None:
    text, tokens, length = expected(server.folder)
    assert text and tokens > 1
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": NEW_TOKENS}
    whole = json.loads(server.ask("/chat/completions", body))
    assert whole["choices"][0]["message"]["content"] == text
    assert (whole["usage"]["completion_tokens"], whole["usage"]["prompt_tokens"]) == (tokens, length)

    lines = server.ask("/chat/completions", body | {"stream": True}).splitlines()
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    said = [piece["choices"][0]["delta"].get("content") for piece in pieces]
    assert "".join(piece for piece in said if piece) == text
    assert len([piece for piece in said if piece]) > 1, "it came in one piece"

    again = json.loads(server.ask("/chat/completions", body))
    assert again["choices"] == whole["choices"], "a request leaves something behind in the next"

    raw = f"<|im_start|>user\n{MESSAGES[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    completed = json.loads(
        server.ask("/completions", {"prompt": raw, "temperature": 0, "max_tokens": NEW_TOKENS})
    )
    assert completed["choices"][0]["text"] == text

    name = server.folder.name
    assert server.announced.startswith(f"{name} answers at ")
    assert [model["id"] for model in json.loads(server.ask("/models"))["data"]] == [name]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.ask("/chat/completions", body | {"model": "another"})


@needs_server
@pytest.mark.slow
def test_requests_of_the_page_are_answered(server: Server) -> None:
    asked = [command.words for command in commands("docs/guides/serve.md") if command.words[0] == "curl"]
    assert len(asked) == 2
    for words in asked:
        body = json.loads(words[words.index("-d") + 1]) | {"max_tokens": 3}
        answer = server.ask(words[1].partition("/v1")[2], body)
        assert '"finish_reason":"length"' in answer.replace(" ", "") or "stop" in answer


def test_what_cannot_be_served_is_refused_before_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            serve(["--model", str(tmp_path), *arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert "spikingbrain-serve needs uvicorn; install the extra" in refusal()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "--port 70000 is no port" in refusal("--port", "70000")
    assert "--name is empty" in refusal("--name", " ")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "iter_0000003").mkdir()
    assert "spikingbrain-export" in refusal()
