"""The official OpenAI client for Python, unmodified, against Freehold's gateway.

Run by cli/tests/end_to_end.rs with FREEHOLD_BASE_URL, FREEHOLD_CHAT_MODEL and FREEHOLD_EMBEDDING_MODEL."""

import json
import math
import os
import sys
import threading

import openai

client = openai.OpenAI(base_url=os.environ["FREEHOLD_BASE_URL"], api_key="none", max_retries=0, timeout=120)
CHAT = os.environ["FREEHOLD_CHAT_MODEL"]
EMBEDDING = os.environ["FREEHOLD_EMBEDDING_MODEL"]
PARIS = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def test_models_are_listed():
    names = [model.id for model in client.models.list()]
    assert CHAT in names and EMBEDDING in names, names
    assert client.models.retrieve(CHAT).id == CHAT


def test_a_chat_is_answered_with_exact_usage():
    answer = client.chat.completions.create(model=CHAT, messages=PARIS, temperature=0, max_tokens=24)
    assert "Paris" in answer.choices[0].message.content, answer
    assert answer.choices[0].message.role == "assistant"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.prompt_tokens > 5


def test_a_stream_says_what_the_plain_answer_says():
    plain = client.chat.completions.create(model=CHAT, messages=PARIS, temperature=0, max_tokens=24)
    stream = client.chat.completions.create(model=CHAT, messages=PARIS, temperature=0, max_tokens=24, stream=True,
                                            stream_options={"include_usage": True})
    text, reason, usage = "", None, None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    assert text == plain.choices[0].message.content
    assert reason == plain.choices[0].finish_reason
    assert usage == plain.usage, (usage, plain.usage)


def test_max_tokens_and_stop_end_an_answer():
    short = client.chat.completions.create(model=CHAT, messages=PARIS, temperature=0, max_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    stopped = client.chat.completions.create(model=CHAT, messages=PARIS, temperature=0, max_tokens=24, stop=["Paris"])
    assert stopped.choices[0].finish_reason == "stop" and "Paris" not in stopped.choices[0].message.content


def test_a_seed_repeats_and_logprobs_are_told():
    def ask():
        return client.chat.completions.create(model=CHAT, messages=PARIS, temperature=1.5, seed=7, max_tokens=12,
                                              logprobs=True, top_logprobs=2)
    first, second = ask(), ask()
    assert first.choices[0].message.content == second.choices[0].message.content
    entries = first.choices[0].logprobs.content
    assert entries and all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in entries)


def test_probabilities_are_told_with_their_bytes():
    answer = client.chat.completions.create(model=CHAT, messages=PARIS, temperature=0, max_tokens=16, logprobs=True,
                                            top_logprobs=5)
    entries = answer.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert text.strip() == answer.choices[0].message.content.strip(), (text, answer)
    for entry in entries:
        assert abs(entry.top_logprobs[0].logprob - entry.logprob) < 1e-6, "greedy takes the likeliest"
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) < 1.001
    plain = client.completions.create(model=CHAT, prompt="One, two, three,", temperature=0, max_tokens=6, logprobs=2)
    told = plain.choices[0].logprobs
    assert "".join(told.tokens) == plain.choices[0].text and told.text_offset[0] == 0
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)


def test_several_answers_count_their_prompt_once():
    def ask(**more):
        return client.chat.completions.create(model=CHAT, messages=PARIS, temperature=1.5, seed=3, max_tokens=12, **more)
    one, three = ask(), ask(n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert three.choices[0].message.content == one.choices[0].message.content
    assert len({choice.message.content for choice in three.choices}) > 1
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    texts = ["", "", ""]
    for chunk in ask(n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in three.choices]


def test_a_stop_string_is_found_across_tokens():
    story = [{"role": "user", "content": "Count from one to ten in words."}]
    def ask(**more):
        return client.chat.completions.create(model=CHAT, messages=story, temperature=0, max_tokens=30, **more)
    whole = ask().choices[0].message.content
    for start in range(1, len(whole) - 5, 7):
        stop = whole[start:start + 5]
        found = ask(stop=[stop]).choices[0]
        assert found.message.content == whole[:whole.index(stop)] and found.finish_reason == "stop", (stop, found)


PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "home"],
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
                   "home": {"$ref": "#/$defs/place"}},
    "$defs": {"place": {"enum": ["Paris", "Rome"]}},
}


def check_person(text):
    person = json.loads(text)
    assert set(person) == {"name", "age", "home"} and len(person["name"]) <= 12 and 0 <= person["age"] <= 120, person
    assert person["home"] in ("Paris", "Rome"), person


def test_answers_follow_a_schema():
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    ask = [{"role": "user", "content": "Invent a person."}]
    for temperature in (0, 1.3):
        answer = client.chat.completions.create(model=CHAT, messages=ask, temperature=temperature, seed=1, n=2,
                                                response_format=form, logprobs=True, top_logprobs=5)
        for choice in answer.choices:
            assert choice.finish_reason == "stop", choice
            check_person(choice.message.content)
    stream = client.chat.completions.create(model=CHAT, messages=ask, temperature=0, response_format=form, stream=True)
    check_person("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
    plain = client.completions.create(model=CHAT, prompt="Is it so? ", max_tokens=9, temperature=1,
                                      extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert plain.choices[0].text in ("yes", "no"), plain
    bad = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "text"}}}
    found = expect(openai.BadRequestError,
                   lambda: client.chat.completions.create(model=CHAT, messages=ask, response_format=bad))
    assert found.param == "response_format" and "text" in str(found), found


TOOLS = [
    {"type": "function", "function": {"name": "register", "description": "Registers a person.", "parameters": PERSON}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {},
                                                                      "additionalProperties": False}}},
]


def test_tools_are_called():
    ask = [{"role": "user", "content": "Register Ann, who is 41 and lives in Rome."}]
    chosen = {"type": "function", "function": {"name": "register"}}
    answer = client.chat.completions.create(model=CHAT, messages=ask, tools=TOOLS, tool_choice=chosen, temperature=0)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and not message.content, answer
    [call] = message.tool_calls
    assert call.type == "function" and call.function.name == "register", call
    check_person(call.function.arguments)
    # The way back: the call and its result are part of the conversation.
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    after = client.chat.completions.create(model=CHAT, messages=[*ask, message, result], tools=TOOLS, max_tokens=8)
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens

    required = client.chat.completions.create(model=CHAT, messages=ask, tools=TOOLS, tool_choice="required",
                                              temperature=1.3, seed=5, parallel_tool_calls=False)
    [call] = required.choices[0].message.tool_calls
    assert call.function.name in ("register", "clock")

    with client.chat.completions.stream(model=CHAT, messages=ask, tools=TOOLS, tool_choice=chosen, temperature=0) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls", streamed
    assert streamed.message.tool_calls[0].function.arguments == message.tool_calls[0].function.arguments

    none = client.chat.completions.create(model=CHAT, messages=ask, tools=TOOLS, tool_choice="none", max_tokens=8)
    assert none.choices[0].message.tool_calls is None
    found = expect(openai.BadRequestError, lambda: client.chat.completions.create(
        model=CHAT, messages=ask, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "fly"}}))
    assert found.param == "tool_choice.function.name", found


def test_text_is_completed():
    answer = client.completions.create(model=CHAT, prompt="The capital of France is", temperature=0, max_tokens=4)
    assert answer.choices[0].text.strip(), answer
    stream = client.completions.create(model=CHAT, prompt="One, two, three,", temperature=0, max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_texts_become_vectors():
    texts = ["a cat sits on the mat", "a kitten is on the rug", "the stock market fell sharply"]
    answer = client.embeddings.create(model=EMBEDDING, input=texts)
    vectors = [item.embedding for item in answer.data]
    assert [len(vector) for vector in vectors] == [384] * 3

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b))

    assert abs(cosine(vectors[0], vectors[0]) - 1) < 1e-3
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.2
    floats = client.embeddings.create(model=EMBEDDING, input=texts[0], encoding_format="float").data[0].embedding
    assert all(abs(a - b) < 1e-5 for a, b in zip(floats, vectors[0]))


def expect(error, call):
    try:
        call()
    except error as found:
        return found
    raise AssertionError(f"expected {error.__name__}")


def test_errors_come_as_the_clients_own_exceptions():
    found = expect(openai.NotFoundError, lambda: client.chat.completions.create(model="nobody", messages=PARIS))
    assert CHAT in str(found), found
    found = expect(openai.BadRequestError,
                   lambda: client.chat.completions.create(model=CHAT, messages=PARIS, temperature=99))
    assert found.param == "temperature", found
    expect(openai.BadRequestError, lambda: client.embeddings.create(model=CHAT, input="text"))


def test_a_client_that_leaves_frees_its_place():
    for _ in range(12):
        stream = client.chat.completions.create(model=CHAT, messages=PARIS, max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
    test_a_chat_is_answered_with_exact_usage()


def test_several_at_once():
    answers = []

    def ask():
        answers.append(client.chat.completions.create(model=CHAT, messages=PARIS, temperature=0, max_tokens=16))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len({answer.choices[0].message.content for answer in answers}) == 1 and len(answers) == 6


if __name__ == "__main__":
    tests = [(name, test) for name, test in list(globals().items()) if name.startswith("test_")]
    failed = 0
    for name, test in tests:
        try:
            test()
            print(f"ok {name}")
        except Exception as error:  # a suite tells of every failure
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}")
    sys.exit(1 if failed else 0)
