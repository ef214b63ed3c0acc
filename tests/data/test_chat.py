from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from spikingbrain_train.data.preprocess import preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.data.raw_document import RawDocument
from spikingbrain_train.data.token_file import TokenFile
from spikingbrain_train.errors import DataError

TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHATS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n}, a number 脑."}]
    for n in range(12)
]


@pytest.fixture(scope="module")
def chat_folder(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(hf_folder, tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def run(folder: Path, tokenizer: Path, records: list[dict], **changes: object) -> list[int]:
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prefix = str(folder / "out" / "d")
    preprocess(
        PreprocessOptions([str(folder / "in.jsonl")], prefix, str(tokenizer), overwrite=True, **changes)
    )
    dataset = TokenFile(prefix)
    return dataset.read(0, dataset.num_tokens).tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_conversations_become_what_transformers_makes_of_them(
    chat_folder: Path, tmp_path: Path, workers: int
) -> None:
    reference = AutoTokenizer.from_pretrained(str(chat_folder))
    expected = np.concatenate(
        [
            [*reference.apply_chat_template(chat, tokenize=True, return_dict=False), reference.eos_token_id]
            for chat in CHATS
        ]
    )
    records = [{"messages": chat} for chat in CHATS]
    found = run(tmp_path, chat_folder, records, chat_key="messages", workers=workers)
    assert found == expected.tolist()


def test_messages_of_share_gpt_are_understood(chat_folder: Path, tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    shared = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]} for chat in CHATS
    ]
    expected = run(tmp_path, chat_folder, [{"messages": chat} for chat in CHATS], chat_key="messages")
    assert run(tmp_path, chat_folder, shared, chat_key="conversations") == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": "hello"}, "is no conversation (it is no list of messages)"),
        ({"messages": []}, "is no conversation (it is no list of messages)"),
        ({"messages": [{"text": "x"}]}, "a message has neither role and content nor from and value"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "is no conversation (the chat template refuses it: unknown role)",
        ),
        ({"text": "x"}, "no field 'messages' (fields: text): name the messages with --chat-key"),
        ({"conversations": []}, "--chat-key conversations renders its messages"),
    ],
)
def test_what_is_no_conversation_is_one_sentence_with_its_line(
    chat_folder: Path, tmp_path: Path, record: dict, reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        run(tmp_path, chat_folder, [{"messages": CHATS[0]}, record], chat_key="messages")
    assert str(caught.value).startswith(f"{tmp_path}/in.jsonl:2: ") and reason in str(caught.value)


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        (
            {"messages": CHATS[0], "id": 1},
            "no field 'text' (fields: id, messages): --chat-key messages renders",
        ),
        ({"conversations": []}, "no field 'text' (fields: conversations): --chat-key conversations renders"),
        ({"content": "x", "id": 1}, "no field 'text' (fields: content, id): name the text with --text-key"),
        ({"text": CHATS[0]}, "the field 'text' is not a string: --chat-key text renders"),
        ({"text": 3}, "the field 'text' is not a string: name the text with --text-key"),
    ],
)
def test_records_without_text_are_told_the_setting(record: dict, advice: str) -> None:
    with pytest.raises(DataError) as caught:
        RawDocument("x.jsonl:1", json.dumps(record).encode(), True, 0).text("text")
    assert advice in str(caught.value)


def test_a_tokenizer_without_chat_template_is_refused(
    hf_folder: Path, spm_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="has no chat template, which --chat-key needs"):
        run(tmp_path, hf_folder, [{"messages": CHATS[0]}], chat_key="messages")
    with pytest.raises(DataError, match="is no tokenizer folder, so it has no chat template"):
        run(tmp_path, spm_file, [{"messages": CHATS[0]}], chat_key="messages")
