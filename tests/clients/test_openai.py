"""The official OpenAI client for Python, unmodified, against Freehold's gateway.

Run by cli/tests/end_to_end.rs with FREEHOLD_BASE_URL, FREEHOLD_CHAT_MODEL and FREEHOLD_EMBEDDING_MODEL."""

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
