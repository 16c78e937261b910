// ai-sdk and openai-node against BASE_URL (with /v1) and MODEL; exits 1 if a check fails.
import assert from 'node:assert';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { Output, generateText, jsonSchema, streamText, tool } from 'ai';
import OpenAI from 'openai';

const model = process.env.MODEL, baseURL = process.env.BASE_URL;
const provider = createOpenAICompatible({
  name: 'asyncllm', baseURL, includeUsage: true, supportsStructuredOutputs: true,
});
const ai = { model: provider(model), temperature: 0, maxRetries: 0 };
const client = new OpenAI({ baseURL, apiKey: 'x', maxRetries: 0 });
const messages = [{ role: 'user', content: 'Hi' }];
const oslo = [{ role: 'user', content: 'Weather in Oslo?' }];
const city = {
  type: 'object', properties: { city: { type: 'string' } }, required: ['city'], additionalProperties: false,
};
const ok = {
  type: 'object', properties: { ok: { type: 'boolean' } }, required: ['ok'], additionalProperties: false,
};
const weather = { type: 'function', function: { name: 'weather', parameters: city } };

const checks = {
  async 'ai-sdk text'() {
    const { text, usage } = await generateText({ ...ai, prompt: 'Hi', maxOutputTokens: 6 });
    assert(text && usage.outputTokens > 0);
    return text;
  },
  async 'ai-sdk stream'() {
    const answer = streamText({ ...ai, prompt: 'Hi', maxOutputTokens: 6 });
    let text = '', pieces = 0;
    for await (const piece of answer.textStream) { text += piece; pieces++; }
    const usage = await answer.usage;
    assert(pieces > 1 && usage.inputTokens > 0 && usage.outputTokens === 6, JSON.stringify(usage));
    assert.equal(await answer.finishReason, 'length');
    return text;
  },
  async 'ai-sdk forced tool, streamed'() {
    const answer = streamText({
      ...ai, messages: oslo, maxOutputTokens: 128, toolChoice: 'required',
      tools: { weather: tool({ inputSchema: jsonSchema(city) }) },
    });
    const calls = await answer.toolCalls;
    assert(calls.length > 0 && calls.every((c) => c.toolName === 'weather' && c.input.city));
    assert.equal(await answer.finishReason, 'tool-calls');
    return JSON.stringify(calls[0].input);
  },
  async 'ai-sdk object'() {
    const { output } = await generateText({
      ...ai, prompt: 'Is it good?', maxOutputTokens: 32, output: Output.object({ schema: jsonSchema(ok) }),
    });
    assert.equal(typeof output.ok, 'boolean');
    return JSON.stringify(output);
  },
  async 'openai-node stream'() {
    const stream = await client.chat.completions.create({
      model, messages, max_tokens: 4, temperature: 0, stream: true, stream_options: { include_usage: true },
    });
    let text = '', end = null, usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? '';
      end = chunk.choices[0]?.finish_reason ?? end;
      usage = chunk.usage ?? usage;
    }
    assert(text && end === 'length' && usage.completion_tokens === 4, JSON.stringify([text, end, usage]));
    return text;
  },
  async 'openai-node stream helper, forced tool'() {
    const runner = client.chat.completions.stream({
      model, messages: oslo, max_tokens: 128, temperature: 0, tools: [weather],
      tool_choice: { type: 'function', function: { name: 'weather' } },
    });
    const { message, finish_reason } = (await runner.finalChatCompletion()).choices[0];
    assert.equal(finish_reason, 'tool_calls');
    assert(JSON.parse(message.tool_calls[0].function.arguments).city);
    return message.tool_calls[0].function.arguments;
  },
  async 'openai-node parsed answer'() {
    const answer = await client.chat.completions.parse({
      model, messages, max_tokens: 32, temperature: 0,
      response_format: { type: 'json_schema', json_schema: { name: 'answer', strict: true, schema: ok } },
    });
    assert.equal(typeof answer.choices[0].message.parsed.ok, 'boolean');
    return JSON.stringify(answer.choices[0].message.parsed);
  },
  async 'openai-node completion'() {
    const answer = await client.completions.create({ model, prompt: 'One, two,', max_tokens: 4 });
    assert.equal(answer.usage.completion_tokens, 4);
    return answer.choices[0].text;
  },
  async 'openai-node response, streamed'() {
    const runner = client.responses.stream({ model, input: 'Hi', max_output_tokens: 16 });
    const types = [];
    for await (const event of runner) types.push(event.type);
    const answer = await runner.finalResponse();
    assert.equal(types[0], 'response.created');
    assert(answer.output_text);
    return answer.output_text;
  },
  async 'openai-node ends a stream early'() {
    const stream = await client.chat.completions.create({ model, messages, max_tokens: 4000, stream: true });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
    return 'closed';
  },
  async 'openai-node is refused'() {
    const wrong = client.chat.completions.create({ model, messages, max_tokens: -1 });
    await assert.rejects(wrong, (error) => error.status === 400 && error.param === 'max_tokens');
    return '400';
  },
};

let failed = 0;
for (const [name, run] of Object.entries(checks)) {
  let line;
  try {
    line = `PASS ${name} ${await run()}`;
  } catch (error) {
    failed++;
    line = `FAIL ${name} ${error.name} ${error.message}`;
  }
  console.log(line.replaceAll('\n', ' ').slice(0, 300));
}
console.log(`${failed} failed`);
process.exit(failed > 0 ? 1 : 0);
