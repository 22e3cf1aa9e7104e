from __future__ import annotations

import peft
import pytest
import torch

from sft.errors import UserError
from sft.evaluation.chat import Chat, Sampling, converse

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def loaded(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    model.generation_config.eos_token_id = None  # replies are as long as they may
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.fixture
def adapted(loaded):
    model = peft.get_peft_model(
        loaded[0], peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    ).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=10)
    return model, loaded[1]


class Streamed:
    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


def test_a_reply_is_the_greedy_continuation_of_the_conversation(loaded):
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, Sampling(max_new_tokens=4), "four")
    streamer = Streamed()
    reply = chat.say("one two", streamer)
    given = tokenizer("system four user one two assistant", return_tensors="pt")["input_ids"]
    expected = model.generate(given, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert reply == tokenizer.decode(expected[0, given.shape[1] :], skip_special_tokens=True)
    assert streamer.ids == expected[0].tolist()
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    chat.say("three")
    assert [m["content"] for m in chat.messages][3] == "three"


def test_without_a_template_each_message_is_continued_alone(loaded):
    model, tokenizer = loaded
    raw = Chat(model, tokenizer, Sampling(max_new_tokens=4), raw=True)
    first = raw.say("one two")
    raw.say("three four")
    assert raw.say("one two") == first
    tokenizer.chat_template = None
    assert Chat(model, tokenizer, Sampling(max_new_tokens=4)).say("one two") == first
    for options in ({"raw": True}, {}):
        with pytest.raises(UserError, match=r"--system: .* is no chat template"):
            Chat(model, tokenizer, Sampling(), "x", **options)


def test_the_adapter_goes_off_and_on(adapted):
    model, tokenizer = adapted
    chat = Chat(model, tokenizer, Sampling(max_new_tokens=8), raw=True)
    tuned = chat.say("one two")
    assert "off" in chat.command("/base")
    base = chat.say("one two")
    assert "on" in chat.command("/adapter")
    assert chat.say("one two") == tuned != base
    stock = Chat(model.unload(), tokenizer, Sampling(max_new_tokens=8), raw=True)
    assert stock.say("one two") == base
    assert stock.command("/base") == "/base: there is no adapter on this model"


def test_what_is_drawn_follows_from_the_seed(loaded):
    def replies(seed):
        chat = Chat(*loaded, Sampling(max_new_tokens=8, temperature=2.0, seed=seed), raw=True)
        return [chat.say("one"), chat.say("one")]

    state = torch.get_rng_state()
    assert replies(0) == replies(0) != replies(5)
    assert replies(0)[0] != replies(0)[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_lines_are_messages_or_commands(loaded):
    chat, told = Chat(*loaded, Sampling(max_new_tokens=2), "four"), []
    lines = ["one", "", "/what", "/help", "/clear", "/quit", "two"]
    converse(chat, iter(lines), None, told.append)
    assert told[0].startswith("/what: unknown")
    assert told[1].startswith("/base")
    assert told[2] == "cleared"
    assert chat.messages == [{"role": "system", "content": "four"}]
    assert chat.replies == 1


def test_the_oldest_turns_go_when_there_is_no_room(loaded):
    chat = Chat(*loaded, Sampling(max_new_tokens=1), "four")
    for i in range(6):
        chat.say(" ".join(["one"] * (10 + i)))
    assert chat.messages[0]["role"] == "system"
    assert chat.messages[1]["role"] == "user"
    assert len(chat.messages[-2]["content"].split()) == 15
    assert len(chat.messages) < 13
    told = []
    converse(chat, ["one " * 99], None, told.append)
    assert told[0].startswith("the message has ")


def test_a_classifier_does_not_talk(loaded):
    from transformers import LlamaForSequenceClassification

    with pytest.raises(UserError, match="TARGET: predicts no text"):
        Chat(LlamaForSequenceClassification(loaded[0].config), loaded[1], Sampling())
