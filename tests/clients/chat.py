"""The official OpenAI client as a program that calls a model: once, or for as long as it is let.

    chat.py URL MODEL             one question; prints the answer
    chat.py URL MODEL --forever   one after the other; prints a line of JSON for each

Run by tests/tests/end_to_end in the network of a pod."""

import json
import sys
import time

import openai

PARIS = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def ask(client, model):
    answer = client.chat.completions.create(model=model, messages=PARIS, temperature=0, max_tokens=24)
    return answer.choices[0].message.content


def main(url, model, forever):
    # Nothing is tried again here: what fails shall be seen.
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=15)
    if not forever:
        print(ask(client, model))
        return
    while True:
        begun, problem = time.time(), None
        try:
            text = ask(client, model)
            problem = None if "Paris" in text else f"it said {text!r}"
        except openai.OpenAIError as error:
            problem = f"{type(error).__name__}: {error}"
        line = {"at": begun, "took": round(time.time() - begun, 3), "problem": problem}
        print(json.dumps(line), flush=True)
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--forever" in sys.argv)
