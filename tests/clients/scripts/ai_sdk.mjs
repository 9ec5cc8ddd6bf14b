// Vercel's AI SDK: npm install ai @ai-sdk/openai
import fs from 'fs';
import { createRequire } from 'module';
import { generateText, jsonSchema, stepCountIs, streamText, tool } from 'ai';
import { createOpenAI } from '@ai-sdk/openai';
const require = createRequire(import.meta.url);
const { URL: url, KEY, FIRST, SECOND } = process.env;
console.log('ai', require('ai/package.json').version, '@ai-sdk/openai', require('@ai-sdk/openai/package.json').version);
const model = createOpenAI({ baseURL: `${url}/v1`, apiKey: KEY })('scripted');  // speaks /v1/responses
const inputSchema = jsonSchema({ type: 'object', properties: { path: { type: 'string' } }, required: ['path'] });
const execute = async ({ path }) => fs.readFileSync(path, 'utf8');
const tools = { read_file: tool({ description: 'Reads a file', inputSchema, execute }) };
const messages = [{ role: 'user', content: FIRST }];
const first = streamText({ model, tools, messages, stopWhen: stepCountIs(4) });
for await (const text of first.textStream) process.stdout.write(text);
console.log('\n--- second turn');
messages.push(...(await first.response).messages, { role: 'user', content: SECOND });
console.log((await generateText({ model, tools, messages, stopWhen: stepCountIs(4) })).text);
