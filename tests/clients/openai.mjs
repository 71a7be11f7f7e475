// The official OpenAI client for JavaScript, unmodified, against Freehold's gateway.
// Run by cli/tests/end_to_end.rs from a folder that has the client in node_modules.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(`${process.env.FREEHOLD_CLIENTS}/index.js`));
const { OpenAI } = require("openai");
const client = new OpenAI({ baseURL: process.env.FREEHOLD_BASE_URL, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const chat = process.env.FREEHOLD_CHAT_MODEL;
const embedding = process.env.FREEHOLD_EMBEDDING_MODEL;
const messages = [{ role: "user", content: "What is the capital of France? Answer in one sentence." }];

const tests = {
  async "models are listed"() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    assert.ok(names.includes(chat) && names.includes(embedding), names.join());
  },
  async "a chat is answered"() {
    const answer = await client.chat.completions.create({ model: chat, messages, temperature: 0, max_tokens: 24 });
    assert.match(answer.choices[0].message.content, /Paris/);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },
  async "a stream comes in pieces and ends with usage"() {
    const stream = await client.chat.completions.create({
      model: chat, messages, temperature: 0, max_tokens: 24, stream: true, stream_options: { include_usage: true },
    });
    let text = "", pieces = 0, usage = null;
    for await (const chunk of stream) {
      const piece = chunk.choices[0]?.delta?.content;
      if (piece) { text += piece; pieces += 1; }
      usage = chunk.usage ?? usage;
    }
    assert.match(text, /Paris/);
    assert.ok(pieces > 2 && usage.completion_tokens > 2);
  },
  async "text is completed"() {
    const answer = await client.completions.create({ model: chat, prompt: "The capital of France is", max_tokens: 4, temperature: 0 });
    assert.ok(answer.choices[0].text.trim().length > 0);
  },
  async "texts become vectors"() {
    const answer = await client.embeddings.create({ model: embedding, input: ["one", "two"] });
    assert.deepEqual(answer.data.map((item) => item.embedding.length), [384, 384]);
  },
  async "errors come as the client's own"() {
    await assert.rejects(client.chat.completions.create({ model: "nobody", messages }), OpenAI.NotFoundError);
    await assert.rejects(client.chat.completions.create({ model: chat, messages, top_p: 7 }), OpenAI.BadRequestError);
  },
  async "a client that leaves frees its place"() {
    for (let round = 0; round < 8; round += 1) {
      const stream = await client.chat.completions.create({ model: chat, messages, max_tokens: 400, stream: true });
      for await (const _ of stream) break;
    }
    await tests["a chat is answered"]();
  },
};

let failed = 0;
for (const [name, test] of Object.entries(tests)) {
  try {
    await test();
    console.log(`ok ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED ${name}: ${error}`);
  }
}
process.exit(failed ? 1 : 0);
