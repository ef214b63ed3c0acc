"""Loss on the answers of conversations, against the spans that a reader finds in the rendered text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spikingbrain_train.data.chat import ChatTemplate
from spikingbrain_train.data.chat_loss import ChatExamples, Example
from spikingbrain_train.data.raw_document import RawDocument
from spikingbrain_train.errors import DataError

HEADER = "<|im_start|>{{ message.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    f"{HEADER}{{{{ message.content }}}}<|im_end|>\n{{% endfor %}}{PROMPT}"
)
MARKED = (
    f"{{% for message in messages %}}{HEADER}{{% if message.role == 'assistant' %}}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
    f"<|im_end|>\n{{% endfor %}}{PROMPT}"
)
WITHOUT_PROMPT = f"{{% for message in messages %}}{HEADER}{{{{ message.content }}}}<|im_end|>\n{{% endfor %}}"
INSTRUCTIONS = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}<|end|>{% endif %}{% endfor %}"
)
REASONING = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    f"{HEADER}{{% if message.role == 'assistant' and loop.index0 > ns.last %}}"
    "<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n"
    f"{{% endfor %}}{PROMPT}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    f"{{% for message in messages %}}{HEADER}{{{{ message.content }}}}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    f"<|im_end|>\n{{% endfor %}}{PROMPT}"
)
ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
CHAT = [
    {"role": "system", "content": "Answer in French 脑."},
    {"role": "user", "content": "What is one?"},
    {"role": "assistant", "content": "Un 🧠, naïvement.\n"},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Deux."},
]

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TEXT = {"type": "text", "text": "Part."}

Make = Callable[[str], ChatExamples]


@pytest.fixture(scope="module")
def make(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Examples by a template, with a tokenizer that knows the tokens around turns."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(hf_folder))
    special = [AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens([*special, AddedToken("<think>"), AddedToken("</think>")])
    saved = tmp_path_factory.mktemp("special")
    tokenizer.save_pretrained(str(saved))
    made: dict[str, ChatExamples] = {}

    def examples(template: str) -> ChatExamples:
        if template not in made:
            folder = shutil.copytree(saved, tmp_path_factory.mktemp("template") / "model")
            (folder / "chat_template.jinja").write_text(template)
            made[template] = ChatExamples(ChatTemplate(str(folder)))
        return made[template]

    return examples


def learnt(examples: ChatExamples, example: Example) -> str:
    """The text of the tokens with loss."""
    ids = [index for index, loss in zip(example.token_ids, example.loss, strict=True) if loss]
    return examples._backend.decode(ids, skip_special_tokens=False)


def only(examples: ChatExamples, messages: list[dict[str, Any]], **record: Any) -> Example:
    (example,) = examples.examples(messages, {"messages": messages, **record})
    return example


@pytest.mark.parametrize("template", [CHATML, MARKED, WITHOUT_PROMPT], ids=["prompt", "blocks", "neither"])
def test_loss_is_on_answers_and_the_token_that_ends_them(make: Make, template: str) -> None:
    examples = make(template)
    example = only(examples, CHAT)
    answers = ANSWER.findall(example.text)
    assert len(answers) == 2
    if template is WITHOUT_PROMPT:  # the header ends where the words of the answer begin
        answers = [answer.lstrip() for answer in answers]
    assert learnt(examples, example) == "".join(answers)
    assert examples._backend.decode(example.token_ids, skip_special_tokens=False) == example.text


def test_blocks_and_beginnings_agree_with_the_mask_of_transformers(make: Make) -> None:
    examples, reference = make(MARKED), AutoTokenizer.from_pretrained(make(MARKED)._template.folder)
    found = reference.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    example = only(examples, CHAT)
    assert example.token_ids == list(found["input_ids"])
    inside = [index for index, kept in enumerate(found["assistant_masks"]) if kept]
    assert [i for i in range(len(example.loss)) if example.loss[i]] == sorted(
        {*inside, *(i + 1 for i in inside)}
    )


def test_share_gpt_and_a_prompt_beside_the_messages_are_the_same_conversation(make: Make) -> None:
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[each["role"]], "value": each["content"]} for each in CHAT[1:]]
    assert (
        only(make(CHATML), shared, system=CHAT[0]["content"]).token_ids == only(make(CHATML), CHAT).token_ids
    )


def test_a_template_without_headers_learns_answer_and_end(make: Make) -> None:
    examples = make(INSTRUCTIONS)
    assert learnt(examples, only(examples, CHAT[1:])) == " Un 🧠, naïvement.\n<|end|> Deux.<|end|>"


def test_an_answer_in_front_of_all_has_no_header_in_its_loss(make: Make) -> None:
    examples = make(CHATML)
    example = only(examples, [{"role": "assistant", "content": "Hello"}, CHAT[1], CHAT[4]])
    assert learnt(examples, example) == "Hello<|im_end|>Deux.<|im_end|>"


def test_reasoning_that_later_turns_leave_out_is_learnt_where_it_was_written(make: Make) -> None:
    examples = make(REASONING)
    chat = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "reasoning_content": "One is odd.", "content": "Odd."},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "reasoning_content": "Two is even.", "content": "Even."},
    ]
    apart, whole = examples.examples(chat, {})
    assert learnt(examples, apart) == "<think>\nOne is odd.\n</think>\n\nOdd.<|im_end|>"
    assert learnt(examples, whole) == "<think>\nTwo is even.\n</think>\n\nEven.<|im_end|>"
    assert "One is odd" not in whole.text and "2?" not in apart.text


def test_tools_and_their_calls_stand_where_the_template_puts_them(make: Make) -> None:
    examples = make(TOOLS)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tool = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}
    chat = [
        CHAT[1],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    example = only(examples, chat, tools=[tool])
    assert '"description": "adds"' in example.text
    assert learnt(examples, example) == "".join(ANSWER.findall(example.text))
    assert learnt(examples, example).startswith('<tool_call>{"name": "add"')


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_half_of_a_surrogate_pair_in_a_conversation_is_named_with_its_line(make: Make, role: str) -> None:
    chat = [{**each, "content": "\ud800"} if each["role"] == role else each for each in CHAT]
    line = RawDocument("chats.jsonl:3", json.dumps({"messages": chat}).encode(), True, 0)
    with pytest.raises(DataError, match="^chats.jsonl:3: the text contains an unpaired surrogate"):
        line.examples("messages", make(CHATML).examples)


def test_an_answer_with_the_weight_0_bears_no_loss_and_stays_in_the_text(make: Make) -> None:
    for template in (CHATML, MARKED):
        examples = make(template)
        chat = [*CHAT[1:2], {**CHAT[2], "weight": 0}, CHAT[3], {**CHAT[4], "weight": 1}]
        example = only(examples, chat, system=CHAT[0]["content"])
        assert example.token_ids == only(examples, CHAT).token_ids
        assert learnt(examples, example) == "Deux.<|im_end|>"


def test_tools_that_a_template_does_not_show_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="leaves out the function 'add' of its tools"):
        make(CHATML).examples(CHAT, {"tools": [{"type": "function", "function": {"name": "add"}}]})


def with_tool(result: str, answer: str) -> list[dict[str, Any]]:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    return [CHAT[1], call, {"role": "tool", "content": result}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("result", "answer"), [("17 cats", "Many."), ("2", "It is 2.")], ids=["other", "repeated"]
)
def test_what_a_tool_answered_and_the_template_drops_is_refused_with_its_line(
    make: Make, result: str, answer: str
) -> None:
    """Also where the answer repeats it, so that it stands in the text nevertheless."""
    deaf = make(TOOLS.replace("in messages %}", "in messages if message.role != 'tool' %}", 1))
    line = RawDocument("c.jsonl:3", json.dumps({"messages": with_tool(result, answer)}).encode(), True, 0)
    said = r"^c.jsonl:3: .*the chat template leaves out message 3 \(tool\) or part of it: give a tokenizer"
    with pytest.raises(DataError, match=said):
        line.examples("messages", deaf.examples)
    assert line.examples("messages", make(TOOLS).examples)


def test_what_a_tool_answered_may_be_quoted_by_the_template(make: Make) -> None:
    """As Llama 3.1's does, which writes it as JSON."""
    content = "{{ message.content | tojson if message.role == 'tool' else message.content }}"
    examples = make(TOOLS.replace("{{ message.content }}", content))
    text = only(examples, with_tool('a "quoted" 脑\nline', "Two.")).text
    assert 'a \\"quoted\\" 脑\\nline' in text


def test_parts_of_a_content_are_read_by_a_template_that_knows_them(make: Make) -> None:
    parts = "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}"
    parts += "{% endif %}"
    examples = make(CHATML.replace("{{ message.content }}", parts))
    chat = [CHAT[1], {"role": "assistant", "content": [TEXT]}]
    assert learnt(examples, only(examples, chat)) == "Part.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML, "hello", "it is no list of messages"),
        (CHATML, [CHAT[1], 3], "message 2 is no JSON object, and needs role and content, or from and value"),
        (CHATML, [{"role": "user"}], "message 1 has the fields role, and needs role and content"),
        (CHATML, [CHAT[1]], "none of its messages is of the assistant"),
        (CHATML, [CHAT[1], {"role": "asistant", "content": "x"}], "message 2 has the role 'asistant'"),
        (CHATML, [CHAT[1], {"role": None, "content": "x"}], "the role of message 2 is None and no text"),
        (CHATML, [CHAT[1], {"role": "assistant", "content": " \n"}], "message 2 is an empty answer"),
        (
            CHATML,
            [CHAT[1], {"role": "assistant", "content": 3}],
            "content of message 2 (assistant) is no text",
        ),
        (
            INSTRUCTIONS.replace("else", "elif message.role == 'assistant'"),
            CHAT,
            "leaves out message 1 (system)",
        ),
        (
            CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}"),
            [CHAT[1], {"role": "assistant", "content": "<think>Hm.</think>One."}],
            "the chat template leaves out part of the answer in message 2: give a tokenizer",
        ),
        (
            CHATML.replace(PROMPT, "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"),
            CHAT,
            "nothing tells where the answer is: give a tokenizer whose template",
        ),
        (
            CHATML.replace("{{ message.content }}<|im_end|>", "{{ message.content }}"),
            CHAT,
            "the token behind",
        ),
        (
            CHATML,
            [CHAT[1], {"role": "assistant", "content": "x", "weight": 0.5}],
            "message 2 has the weight 0.5",
        ),
        (CHATML, [CHAT[1], {**CHAT[4], "weight": 0}], "every answer of the assistant has the weight 0"),
        (
            CHATML,
            [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}, CHAT[3], CHAT[4]],
            "the chat template leaves out part of the answer in message 2",
        ),
        (
            CHATML,
            [CHAT[1], {"role": "assistant", "content": [TEXT]}],
            "writes the content of message 2 with its",
        ),
        (
            CHATML.replace("{{ message.content }}", "{{ '' + message.content }}"),
            [{"role": "user", "content": [TEXT]}, CHAT[4]],
            "a template that knows no parts wants a content that is text",
        ),
    ],
)
def test_what_is_no_example_is_said_in_a_sentence(
    make: Make, template: str, messages: Any, reason: str
) -> None:
    if reason == "the token behind":  # of the next turn stands for the end: as templates of GLM have it
        examples = make(template)
        example = only(examples, messages)
        assert learnt(examples, example).endswith("Deux.\n<|end|>")
        return
    with pytest.raises(ValueError) as caught:
        make(template).examples(messages, {})
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_ends_no_answer_is_refused_in_the_middle(make: Make) -> None:
    plain = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="writes no special token behind the answer in message 3"):
        make(plain).examples(CHAT, {})
    examples = make(plain)
    assert learnt(examples, only(examples, CHAT[3:])) == "Deux.\n<|end|>"


def test_a_token_of_header_and_answer_is_the_headers(make: Make) -> None:
    examples = make(CHATML)
    example = only(examples, [CHAT[1], {"role": "assistant", "content": "  Un."}])
    assert learnt(examples, example).lstrip() == "Un.<|im_end|>"
    starts = [start for start, _ in examples._backend.encode(example.text).offsets]
    assert starts[int(example.loss.argmax())] >= example.text.index("assistant\n") + len("assistant\n")
