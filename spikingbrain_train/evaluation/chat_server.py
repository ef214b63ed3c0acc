"""transformers' OpenAI-compatible server over one model that is loaded already.

``transformers serve`` (release 5) looks a model's class up by name among those of transformers, so that it
cannot load a folder that brings its own code. Here the parts of that server are put together around a model
that this project loaded, with its checks of the folder.

Requests are computed by ``model.generate``, one after the other. Continuous batching is never asked for: it
keeps pages of keys and values, and a recurrent state is not made of any.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation.chat_prompts import chat_prompt
from spikingbrain_train.evaluation.pretrained import load_text_tokenizer

try:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager, TimedModel
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState
except ImportError as error:
    from transformers import __version__

    raise ConfigurationError(
        f"spikingbrain-serve is written against the server of transformers 5.23, and transformers "
        f"{__version__} lacks part of it ({error}); install that"
    ) from error


class OneModel(ModelManager):
    """A model and its tokenizer under one name, loaded before the server starts and never unloaded."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.force_model = name  # requests that name another are refused by transformers' handlers
        self.loaded_models[name] = TimedModel(model, timeout_seconds=-1, processor=tokenizer)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: there is no revision of a folder."""
        return model_id

    def get_gen_models(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """What /v1/models lists: this model, not what lies in the cache of the hub."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "local"}]


class ChatServer:
    """Answers /v1/chat/completions and /v1/completions, whole or as a stream, and what else there is."""

    def __init__(self, model: PreTrainedModel, folder: Path, name: str) -> None:
        """Put the server together.

        Args:
            model: on its device, in evaluation mode. Its generation configuration is what requests start
                from; tokens with which the chat template ends an answer are added to those that end a text.
            folder: of its tokenizer.
            name: what requests may call it.

        Raises:
            DataError: the folder has no tokenizer, or one that cannot decode a stream.
        """
        tokenizer = load_text_tokenizer(folder)
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer in {folder} has no tokenizer.json, from which transformers' server decodes; "
                "save it with a class of transformers that writes one"
            )
        self.name, self.chats = name, bool(getattr(tokenizer, "chat_template", None))
        if self.chats:
            _end_answers(model, chat_prompt(tokenizer, folder, "?").ends)
        models, state = OneModel(name, model, tokenizer), GenerationState(continuous_batching=False)
        shared = {"model_manager": models, "generation_state": state}
        self.app = build_server(
            models,
            ChatCompletionHandler(**shared),
            completion_handler=CompletionHandler(**shared),
            response_handler=ResponseHandler(**shared),
            transcription_handler=TranscriptionHandler(models, state),
            systemone_handler=SystemOneHandler(**shared),
            generation_state=state,
        )

    def run(self, host: str, port: int) -> None:
        """Listen until the process is interrupted.

        Raises:
            ConfigurationError: the address cannot be listened at.
        """
        logging.set_verbosity_error()  # one remark a request otherwise
        config = uvicorn.Config(self.app, host=host, port=port, log_level="warning")
        listening = _listen(host, port)
        where = f"http://{host}:{listening.getsockname()[1]}"
        print(f"{self.name} answers at {where}/v1 (Ctrl-C ends it)", flush=True)
        if not self.chats:
            print("its tokenizer has no chat template: only /v1/completions can be asked", flush=True)
        uvicorn.Server(config).run(sockets=[listening])


def _end_answers(model: PreTrainedModel, ends: frozenset[int]) -> None:
    ending = model.generation_config.eos_token_id
    known = [] if ending is None else [ending] if isinstance(ending, int) else list(ending)
    model.generation_config.eos_token_id = [*known, *sorted(ends - set(known))] or None


def _listen(host: str, port: int) -> socket.socket:
    """A socket, before the server starts: who asked for any port is told which one it is."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        raise ConfigurationError(
            f"--host {host} --port {port} cannot be listened at ({error.strerror}); give another port, or 0 "
            "for one that is free"
        ) from error
    return listening
