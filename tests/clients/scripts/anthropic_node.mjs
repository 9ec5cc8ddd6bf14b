// Anthropic's SDK for Node: npm install @anthropic-ai/sdk
import fs from 'fs';
import Anthropic from '@anthropic-ai/sdk';
import { VERSION } from '@anthropic-ai/sdk/version';
const { URL: url, KEY, FIRST, SECOND } = process.env;
console.log('@anthropic-ai/sdk', VERSION);
const client = new Anthropic({ baseURL: url, apiKey: KEY });
const input_schema = { type: 'object', properties: { path: { type: 'string' } }, required: ['path'] };
const tools = [{ name: 'read_file', description: 'Reads a file', input_schema }];
const messages = [{ role: 'user', content: FIRST }];
for (const question of [SECOND, null]) {
  for (;;) {
    const message = await client.messages.stream({ model: 'claude', max_tokens: 2000, messages, tools }).finalMessage();
    messages.push({ role: 'assistant', content: message.content });
    if (message.stop_reason !== 'tool_use') { console.log(message.content.map(block => block.text ?? '').join('')); break; }
    messages.push({ role: 'user', content: message.content.filter(block => block.type === 'tool_use').map(block => (
      { type: 'tool_result', tool_use_id: block.id, content: fs.readFileSync(block.input.path, 'utf8') })) });
  }
  if (question) { messages.push({ role: 'user', content: question }); console.log('--- second turn'); }
}
