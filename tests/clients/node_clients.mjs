// OpenAI's client for Node and the Vercel AI SDK as they are on npm, against a running server.
//
//     node node_clients.mjs http://127.0.0.1:5000 smollm2
//
// `run.sh` installs them and starts the server. It prints a line a case; the status is 1 if one failed.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const question = "What is the weather in Lisbon?";
const Person = z.object({ name: z.string(), age: z.number().int().min(0).max(150) });
const weather = {
  type: "function",
  function: {
    name: "weather",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const vercel = createOpenAICompatible({
  name: "megatron-star",
  baseURL: `${url}/v1`,
  supportsStructuredOutputs: true,
  includeUsage: true,
})(model);
const common = { model, messages: [{ role: "user", content: question }], max_tokens: 40, temperature: 0 };

const cases = {
  async "openai: chat"() {
    const answer = await openai.chat.completions.create(common);
    assert.ok(answer.choices[0].message.content.length > 0 && answer.usage.completion_tokens > 0);
  },
  async "openai: chat, streamed"() {
    const stream = openai.chat.completions.stream({ ...common, stream_options: { include_usage: true } });
    const answer = await stream.finalChatCompletion();
    const whole = await openai.chat.completions.create(common);
    assert.equal(answer.choices[0].message.content, whole.choices[0].message.content);
    assert.ok((await stream.totalUsage()).completion_tokens > 0);
  },
  async "openai: a tool that must be called, streamed"() {
    const stream = openai.chat.completions.stream({
      ...common,
      tools: [weather],
      tool_choice: { type: "function", function: { name: "weather" } },
    });
    const { message } = (await stream.finalChatCompletion()).choices[0];
    assert.equal(message.tool_calls[0].function.name, "weather");
    assert.equal(typeof JSON.parse(message.tool_calls[0].function.arguments).city, "string");
  },
  async "openai: structured output"() {
    const response_format = zodResponseFormat(Person, "person");
    const answer = await openai.chat.completions.parse({ ...common, max_tokens: 120, response_format });
    Person.parse(answer.choices[0].message.parsed);
  },
  async "openai: responses"() {
    const answer = await openai.responses.parse({
      model,
      input: "A person named Bo.",
      max_output_tokens: 120,
      temperature: 0,
      text: { format: zodTextFormat(Person, "person") },
    });
    Person.parse(answer.output_parsed);
  },
  async "openai: completions, models"() {
    const answer = await openai.completions.create({ model, prompt: "Once upon", max_tokens: 4, logprobs: 2 });
    assert.equal(answer.choices[0].logprobs.tokens.length, 4);
    const served = [];
    for await (const { id } of openai.models.list()) served.push(id);
    assert.ok(served.includes(model));
  },
  async "vercel: text, streamed"() {
    const result = streamText({ model: vercel, prompt: question, maxOutputTokens: 20, temperature: 0 });
    let text = "";
    for await (const piece of result.textStream) text += piece;
    assert.ok(text.length > 0 && (await result.usage).outputTokens > 0);
  },
  async "vercel: structured output"() {
    const result = await generateText({
      model: vercel,
      prompt: "A person named Bo.",
      maxOutputTokens: 120,
      temperature: 0,
      output: Output.object({ schema: Person }),
    });
    Person.parse(result.output);
  },
  async "vercel: a tool is called and its result read"() {
    const result = await generateText({
      model: vercel,
      prompt: question,
      maxOutputTokens: 60,
      temperature: 0,
      toolChoice: { type: "tool", toolName: "weather" },
      tools: {
        weather: tool({
          inputSchema: z.object({ city: z.string() }),
          execute: async ({ city }) => `grey in ${city}`,
        }),
      },
    });
    assert.equal(result.toolResults[0].toolName, "weather");
    assert.match(result.toolResults[0].output, /^grey in /);
  },
};

let failed = 0;
for (const [name, run] of Object.entries(cases)) {
  try {
    await run();
    console.log(`passed  ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}: ${error.stack}`);
  }
}
process.exit(failed ? 1 : 0);
